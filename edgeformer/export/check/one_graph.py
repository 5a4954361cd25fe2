"""Parity of a model that is one graph: samples at several shapes, and texts fed through the KV cache."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from edgeformer.bundle.signature import F32
from edgeformer.errors import EdgeformerError, ExportError, ParityError
from edgeformer.export.check.parity import (
    SHORT_PIECES,
    SHORTER,
    Comparison,
    Runs,
    at_longest,
    compare_outputs,
    long_pieces,
    unpadded,
    without_padding,
)
from edgeformer.export.inputs import axes
from edgeformer.export.source import Source, pytorch_outputs

_LONG, _LONGEST = 523, 1100  # tokens: more than one pass of the native engine; more than most sliding windows
_COMPARED = 1 << 24  # logits of a long text; with a large vocabulary only those of the last positions are compared
_SHAPES = ((1, 9), (2, 5), (2, 12))  # (first axis, second axis); each further axis is _APART longer than the one before
_APART = 2  # different sizes, so that a swapped height and width are seen
_LARGE = {139: 4, 37: 14}  # length -> batch: more rows than a pass of 512; the first is longer than an attention chunk
_REFERENCE_LENGTH = 24
_REFERENCE_ROWS = 8  # logits of all positions would be megabytes
_AFTER_CACHE = "in the cache"


@dataclass(frozen=True)
class Sample:
    """Inputs of one run, and PyTorch's outputs for them."""

    name: str  # its sizes, for messages
    feeds: Mapping[str, torch.Tensor]
    reference: Mapping[str, F32]

    def against(self, graph: Runs) -> Comparison:
        """Compares the graph's outputs for the same inputs."""
        outputs, _ = graph({name: value.numpy() for name, value in self.feeds.items()})
        return compare_outputs(
            self.name, *(without_padding(values, self.feeds) for values in (self.reference, outputs))
        )


@dataclass(frozen=True)
class Text:
    """Token ids, PyTorch's logits of one forward without a cache, and the pieces in which a graph is fed the ids."""

    name: str
    ids: NDArray[np.int64]  # [batch, length]
    logits: F32  # [batch, length or fewer, vocab]: those of the last positions
    pieces: tuple[int, ...]

    def against(self, graph: Runs) -> Iterator[Comparison]:
        """Compares the logits of each piece; the KV cache is passed from one piece to the next."""
        past, start, length = None, 0, self.ids.shape[1]
        skipped = length - self.logits.shape[1]
        for piece in self.pieces:
            end = start + piece
            keep = max(0, end - max(start, skipped))
            positions = np.broadcast_to(np.arange(start, end), (len(self.ids), piece))
            feeds = {"input_ids": self.ids[:, start:end], "position_ids": positions}
            if keep < piece:
                feeds["logits_to_keep"] = np.array(max(1, keep))
            outputs, past = graph(feeds, past)
            if keep:
                name = f"{self.name}, tokens {end - keep} to {end - 1} after {start} {_AFTER_CACHE}"
                expected = self.logits[:, end - keep - skipped : end - skipped]
                yield compare_outputs(name, {"logits": expected}, outputs)
            start = end


@dataclass(frozen=True)
class OneGraphExpected:
    """PyTorch's outputs for all samples and texts."""

    samples: Sequence[Sample]
    texts: Sequence[Text]

    def against(self, graphs: Mapping[str, Runs]) -> Iterator[Comparison]:
        """Compares what the graph gives for the same inputs."""
        for sample in self.samples:
            yield sample.against(graphs["model"])
        for text in self.texts:
            yield from text.against(graphs["model"])

    def one_sample(self) -> OneGraphExpected:
        """The first sample alone."""
        return OneGraphExpected(self.samples[:1], ())

    def in_one_piece(self) -> OneGraphExpected:
        """All samples, and each text once, without the cache."""
        texts: dict[bytes, Text] = {}
        for text in self.texts:  # of a long text, all logits come first
            texts.setdefault(text.ids.tobytes(), replace(text, pieces=(text.ids.shape[1],)))
        return OneGraphExpected(self.samples, tuple(texts.values()))


@dataclass(frozen=True)
class OneGraphChecks:
    """The checks of a source that is one graph; `cached` if the graph has a KV cache."""

    source: Source
    cached: bool

    def expected(self) -> OneGraphExpected:
        """PyTorch's outputs for everything that is compared.

        Raises:
            ExportError: the module does not run at one of the shapes.
        """
        done = samples(self.source)
        return OneGraphExpected(done, _texts(self.source) if self.cached and self.source.is_language_model else [])

    def advice(self, error: ParityError) -> str:
        """How to correct a module whose float graph is wrong, if the error shows the cause; else empty."""
        positioned = any(value.name == "position_ids" for value in self.source.inputs)
        if positioned or not self.source.is_language_model or _AFTER_CACHE not in str(error):
            return ""
        return (
            "Without a cache the graph is right, so its positions do not continue after the cached tokens: take them "
            "as an argument, forward(input_ids, position_ids), instead of counting them in the forward."
        )

    def reference_inputs(self) -> dict[str, torch.Tensor]:
        """The input that is stored in the bundle for `edgeformer verify`."""
        names = axes(self.source.inputs)
        sizes = {axis: 1 if index == 0 else _REFERENCE_LENGTH for index, axis in enumerate(names)}
        if self.source.is_language_model:
            return _text_feeds(self.source, sizes, 99)
        return {value.name: value.sample(sizes, 99 + index) for index, value in enumerate(self.source.inputs)}

    def in_pytorch(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, F32]:
        """PyTorch's outputs for `reference_inputs`."""
        return pytorch_outputs(self.source, inputs)

    def in_graphs(self, inputs: Mapping[str, torch.Tensor], graphs: Mapping[str, Runs]) -> dict[str, Any]:
        """The graph's outputs for `reference_inputs`."""
        return graphs["model"]({name: value.numpy() for name, value in inputs.items()})[0]

    @property
    def reference_rows(self) -> slice:
        """The positions whose outputs are stored."""
        return slice(-_REFERENCE_ROWS, None) if self.source.is_language_model else slice(None)


# ---------------------------------------------------------------------------------------- samples


def samples(source: Source) -> list[Sample]:
    """PyTorch's outputs at several shapes, with a different size for each axis.

    Raises:
        ExportError: the module does not run at one of the shapes.
    """
    done = [_sample(source, first, other, seed) for seed, (first, other) in enumerate(_SHAPES)]
    return done + ([] if source.is_language_model else _large(source))


def _large(source: Source) -> list[Sample]:
    """For a model that reads sequences, a batch with more rows than one pass of the native engine."""
    named = [value for value in source.inputs if len({dim for dim in value.shape if isinstance(dim, str)}) == 2]
    if len(axes(source.inputs)) != 2 or not named or any(value.unit > 1 for value in named):
        return []
    found = at_longest(tuple(_LARGE), source, lambda length: _sample(source, _LARGE[length], length, len(_SHAPES)))
    return [] if found is None else [found]


def _sample(source: Source, first: int, other: int, seed: int) -> Sample:
    names = axes(source.inputs)
    sizes = {axis: first if index == 0 else other + _APART * (index - 1) for index, axis in enumerate(names)}
    feeds = {value.name: value.sample(sizes, seed + index) for index, value in enumerate(source.inputs)}
    if "position_ids" in feeds and source.context is not None:  # positions of the first sample begin at 0, others later
        feeds["position_ids"] = feeds["position_ids"] + min(7 * seed, max(0, source.context - other))
    name = ", ".join(f"{axis} {size}" for axis, size in sizes.items())
    try:
        found = Sample(name, feeds, pytorch_outputs(source, feeds))
        if seed == 0:
            _require_deterministic(source, found)
        return found
    except EdgeformerError:
        raise
    except Exception as error:
        raise ExportError(
            f"PyTorch's own forward fails at {name}: {type(error).__name__}: {error}. Give axes that must be equal "
            "one name, and write a size that cannot change as a number in the input's shape."
        ) from error


def _require_deterministic(source: Source, first: Sample) -> None:
    """Runs the module a second time on the same inputs.

    Raises:
        ExportError: it gives other numbers.
    """
    for name, values in pytorch_outputs(source, first.feeds).items():
        if not np.array_equal(values, first.reference[name], equal_nan=True):
            raise ExportError(
                f"the forward gives other numbers for {name!r} when it is called again with the same inputs, so no "
                "graph can be compared with it: it draws random numbers (torch.rand, dropout with training=True), or "
                "changes a buffer of the module. Take that out of the forward."
            )


# ---------------------------------------------------------------------------------------- texts


def _texts(source: Source) -> list[Text]:
    """Short texts fed in `SHORT_PIECES`, of one and of two sequences, then long ones."""
    done = []
    for batch in (1, 2):
        feeds = _text_feeds(source, {"batch": batch, "sequence": sum(SHORT_PIECES)}, 7 * batch)
        done.append(
            Text(f"batch {batch}", feeds["input_ids"].numpy(), pytorch_outputs(source, feeds)["logits"], SHORT_PIECES)
        )
    return done + _long_texts(source)


def _text_feeds(source: Source, sizes: Mapping[str, int], seed: int) -> dict[str, torch.Tensor]:
    """Inputs for one text without padding tokens: some models do not count the position of one."""
    feeds = {value.name: value.sample(sizes, seed) for value in source.inputs}
    return feeds | {"input_ids": unpadded(feeds["input_ids"], source)}


def _long_texts(source: Source) -> list[Text]:
    """One text as long as the model's context allows, in one run and in pieces around every border.

    It is longer than a chunk of the native KV cache (128), than two of them, than one pass of the native engine (512)
    and than the sliding window. Empty if the context is no longer than the short texts.
    """

    def made(length: int) -> list[Text]:
        feeds = _text_feeds(source, {"batch": 1, "sequence": length}, 3)
        logits = pytorch_outputs(source, feeds)["logits"]
        kept = np.ascontiguousarray(logits[:, -max(1, _COMPARED // logits.shape[2]) :])
        ids, name = feeds["input_ids"].numpy(), f"{length} tokens"
        return [
            Text(f"{name} at once", ids, kept, (length,)),
            Text(f"{name} at once, logits_to_keep 3", ids, kept[:, -3:], (length,)),
            Text(name, ids, kept, long_pieces(length)),
        ]

    wanted = max(_LONG, min(_window(source) + 11, _LONGEST))
    return at_longest((wanted, *SHORTER), source, made) or []


def _window(source: Source) -> int:
    """The sliding window that the configuration names, 0 without one."""
    named = (source.config.get(name) for name in ("sliding_window", "attention_window_size", "window_size"))
    return max((value for value in named if isinstance(value, int)), default=0)
