"""The gate: the written graph gives the numbers that PyTorch gives, or nothing is written."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from edgeformer.errors import EdgeformerError, ExportError, ParityError
from edgeformer.export.inputs import axes
from edgeformer.export.source import Source, run

F32 = NDArray[np.float32]
T = TypeVar("T")

# Of the reference's range. Two float32 programs that order their sums differently drift apart by about 1e-6 of it in a
# few dozen layers; a wrong mask, position or weight moves it by 1e-2 and more.
TOLERANCE = 1e-4
# Half precision rounds at 2**-11 = 5e-4 of a value. A few hundred such roundings on the way to a logit add up as their
# square root, to about 1e-2 of the range; a wrong graph was already refused in float32.
FLOAT16_TOLERANCE = 2e-2
IN_CACHE = "in the cache"
STEPS = (5, 1, 1, 1, 2)  # a prefill, single tokens, and a pair
LONG, LONGEST = 523, 1100  # tokens: beyond one pass of the native engine; beyond a window, if it is no larger
SHORTER = (267, 139, 67, 37)  # where the model takes no more
_BORDERS = (129, 257, 513)  # the native cache grows by chunks of 128 tokens, a pass has 512 rows
_COMPARED = 1 << 24  # logits of a long text: with a large vocabulary those of the last positions alone
_SHAPES = ((1, 9), (2, 5), (2, 12))  # (first axis, the next one); each further axis is _APART longer
_LARGE = {139: 4, 37: 14}  # length -> batch: more rows than a pass of 512; the first longer than a chunk of attention
_APART = 2  # so that a swapped height and width show


@dataclass(frozen=True)
class Check:
    """One comparison: the largest difference as a fraction of the reference's range, and where it is."""

    name: str
    worst: float
    where: str


def compare(name: str, reference: Mapping[str, F32], found: Mapping[str, Any]) -> Check:
    """The worst difference over all outputs.

    Raises:
        ParityError: an output is missing, has another shape, or is not finite where the reference is.
    """
    worst = Check(name, 0.0, "")
    for output, expected in reference.items():
        actual = found.get(output)
        if actual is None or actual.shape != expected.shape:
            got = "nothing" if actual is None else f"shape {actual.shape}"
            raise ParityError(
                f"parity, {name}: output {output!r} has {got}, PyTorch gives shape {expected.shape}. An `if` on a size "
                "is decided once, while tracing: write what holds at every size."
            )
        if not expected.size:
            continue
        if not np.isfinite(expected).all():
            raise ParityError(f"parity, {name}: PyTorch itself gives NaN or infinity in {output!r}; check the weights.")
        span = float(expected.max() - expected.min()) or 1.0
        difference = np.abs(np.asarray(actual, np.float64) - expected) / span
        difference[np.isnan(difference)] = np.inf
        position = np.unravel_index(int(difference.argmax()), difference.shape)
        value = float(difference[position])
        if value >= worst.worst:
            where = f"{output}[{', '.join(str(int(i)) for i in position)}]"
            worst = Check(
                name, value, f"{where}: {float(actual[position]):.6g}, PyTorch {float(expected[position]):.6g}"
            )
    return worst


def gate(checks: Iterator[Check], tolerance: float = TOLERANCE) -> dict[str, Any]:
    """Runs the checks; their numbers for the manifest.

    Raises:
        ParityError: one is over the tolerance; the message says which output, position and size.
    """
    done = []
    for check in checks:
        if not check.worst <= tolerance:
            raise ParityError(
                f"parity, {check.name}: {check.where}; off by {check.worst:.2e} of the output's range, "
                f"allowed {tolerance:.0e}."
            )
        done.append(check)
    worst = max(done, key=lambda check: check.worst)
    return {
        "tolerance": tolerance,
        "worst": worst.worst,
        "where": f"{worst.name}: {worst.where}",
        "steps": [asdict(check) for check in done],
    }


class Runs(Protocol):
    """A graph that can be run: the file on plain onnxruntime (`Graph`), or one of our engines (`engines.Running`)."""

    def __call__(self, feeds: Mapping[str, Any], past: Any = None) -> tuple[dict[str, Any], Any]:
        """(outputs, what to pass as `past` with the tokens that follow)."""


@dataclass(frozen=True)
class Sample:
    """Inputs of one run with PyTorch's outputs for them."""

    name: str  # its sizes, for messages
    feeds: Mapping[str, torch.Tensor]
    reference: Mapping[str, F32]

    def against(self, graph: Runs) -> Check:
        """What `graph` gives for the same inputs, compared."""
        outputs, _ = graph({name: value.numpy() for name, value in self.feeds.items()})
        return compare(self.name, *(without_padding(values, self.feeds) for values in (self.reference, outputs)))


def _require_the_same_again(source: Source, first: Sample) -> None:
    """Nothing, where the module gives the same numbers for the same inputs.

    Raises:
        ExportError: it does not.
    """
    for name, values in run(source, first.feeds).items():
        if not np.array_equal(values, first.reference[name], equal_nan=True):
            raise ExportError(
                f"the forward gives other numbers for {name!r} when it is called again with the same inputs, so no "
                "graph can be compared with it: it draws random numbers (torch.rand, dropout with training=True), or "
                "changes a buffer of the module. Take that out of the forward."
            )


def samples(source: Source) -> list[Sample]:
    """PyTorch's outputs at several shapes, each axis of its own size.

    All are made before any is compared: PyTorch and the graph hold their weights in different files, and where memory
    has room for one, reading now this and now that one would fetch both anew at every turn.

    Raises:
        ExportError: the module does not run at one of the shapes.
    """
    done = [_sample(source, first, other, seed) for seed, (first, other) in enumerate(_SHAPES)]
    return done + ([] if source.is_language_model else _large(source))


def _large(source: Source) -> list[Sample]:
    """A batch of more rows than one pass of the native engine has, of a model that reads sequences."""
    named = [value for value in source.inputs if len({dim for dim in value.shape if isinstance(dim, str)}) == 2]
    if len(axes(source.inputs)) != 2 or not named or any(value.unit > 1 for value in named):
        return []
    found = at_longest(tuple(_LARGE), source, lambda length: _sample(source, _LARGE[length], length, len(_SHAPES)))
    return [] if found is None else [found]


def at_longest(lengths: Sequence[int], source: Source, make: Callable[[int], T]) -> T | None:
    """What `make` gives for the first of `lengths` that the model takes; None where it takes none of them."""
    for length in lengths:
        if source.context is None or length <= source.context:
            try:
                return make(length)
            except (IndexError, RuntimeError, ValueError):  # a table of positions that is shorter, and nobody says so
                continue
    return None


def _sample(source: Source, first: int, other: int, seed: int) -> Sample:
    names = axes(source.inputs)
    sizes = {axis: first if index == 0 else other + _APART * (index - 1) for index, axis in enumerate(names)}
    feeds = {value.name: value.sample(sizes, seed + index) for index, value in enumerate(source.inputs)}
    if "position_ids" in feeds and source.context is not None:  # the first ones begin at 0, later ones elsewhere
        feeds["position_ids"] = feeds["position_ids"] + min(7 * seed, max(0, source.context - other))
    shown = ", ".join(f"{axis} {size}" for axis, size in sizes.items())
    try:
        found = Sample(shown, feeds, run(source, feeds))
        if seed == 0:
            _require_the_same_again(source, found)
        return found
    except EdgeformerError:
        raise
    except Exception as error:
        raise ExportError(
            f"PyTorch's own forward fails at {shown}: {type(error).__name__}: {error}. Give axes that must be equal "
            "one name, and write a size that cannot change as a number in the input's shape."
        ) from error


def without_padding(outputs: Mapping[str, Any], feeds: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Outputs with a row for each token are zero where the token is padding: what stands there means nothing."""
    mask = feeds.get("attention_mask")
    if mask is None:
        return dict(outputs)
    seen = mask.numpy() != 0  # [batch, sequence]

    def shown(value: Any) -> Any:
        per_token = value.ndim >= 3 and value.shape[:2] == seen.shape
        return np.where(seen.reshape(*seen.shape, *[1] * (value.ndim - 2)), value, 0) if per_token else value

    return {name: shown(value) for name, value in outputs.items()}


@dataclass(frozen=True)
class Text:
    """Token ids with PyTorch's logits of one forward without a cache, and the pieces in which a graph is fed them."""

    name: str
    ids: NDArray[np.int64]  # [batch, length]
    logits: F32  # [batch, length or fewer, vocab]: those of the last positions
    pieces: tuple[int, ...]

    def against(self, graph: Runs) -> Iterator[Check]:
        """The logits that `graph` gives from piece to piece, with a KV cache between them."""
        past, start, length = None, 0, self.ids.shape[1]
        skipped = length - self.logits.shape[1]
        for piece in self.pieces:
            end = start + piece
            keep = max(0, end - max(start, skipped))
            feeds = {"input_ids": self.ids[:, start:end], "position_ids": _positions(self.ids, start, end)}
            if keep < piece:
                feeds["logits_to_keep"] = np.array(max(1, keep))
            outputs, past = graph(feeds, past)
            if keep:
                name = f"{self.name}, tokens {end - keep} to {end - 1} after {start} {IN_CACHE}"
                expected = self.logits[:, end - keep - skipped : end - skipped]
                yield compare(name, {"logits": expected}, outputs)
            start = end


def _positions(ids: NDArray[np.int64], start: int, end: int) -> NDArray[np.int64]:
    return np.broadcast_to(np.arange(start, end), (ids.shape[0], end - start))


def texts(source: Source) -> list[Text]:
    """Short texts fed in `STEPS`, of one and of two sequences, then `long_texts`."""
    done = []
    for batch in (1, 2):
        sizes = {"batch": batch, "sequence": sum(STEPS)}
        feeds = text_feeds(source, sizes, 7 * batch)
        done.append(Text(f"batch {batch}", feeds["input_ids"].numpy(), run(source, feeds)["logits"], STEPS))
    return done + long_texts(source)


def text_feeds(source: Source, sizes: Mapping[str, int], seed: int) -> dict[str, torch.Tensor]:
    """Inputs for one text; no token of it is padding, as in any real one: some models do not count its position."""
    feeds = {value.name: value.sample(sizes, seed) for value in source.inputs}
    return feeds | {"input_ids": unpadded(feeds["input_ids"], source)}


def unpadded(ids: torch.Tensor, source: Source) -> torch.Tensor:
    """The token ids of `source`'s first input with another one wherever padding stands."""
    padding = source.config.get("pad_token_id")
    if not isinstance(padding, int):
        return ids
    return torch.where(ids == padding, (padding + 1) % source.inputs[0].high, ids)


def long_texts(source: Source) -> list[Text]:
    """One long text of as many tokens as the model takes, in one run and in pieces around every border.

    Longer than a chunk of the native cache (128), two of them, one pass of the native engine (512), and the sliding
    window; empty where the model takes no more than the short texts have.
    """

    def made(length: int) -> list[Text]:
        feeds = text_feeds(source, {"batch": 1, "sequence": length}, 3)
        logits = run(source, feeds)["logits"]
        kept = np.ascontiguousarray(logits[:, -max(1, _COMPARED // logits.shape[2]) :])
        ids, name = feeds["input_ids"].numpy(), f"{length} tokens"
        return [
            Text(f"{name} at once", ids, kept, (length,)),
            Text(f"{name} at once, logits_to_keep 3", ids, kept[:, -3:], (length,)),
            Text(name, ids, kept, pieces(length)),
        ]

    wanted = max(LONG, min(_window(source) + 11, LONGEST))
    return at_longest((wanted, *SHORTER), source, made) or []


def _window(source: Source) -> int:
    """The sliding window that the configuration names, 0 without one."""
    named = (source.config.get(name) for name in ("sliding_window", "attention_window_size", "window_size"))
    return max((value for value in named if isinstance(value, int)), default=0)


def pieces(length: int) -> tuple[int, ...]:
    """Sizes that add up to `length`: prefills, and single tokens across each border of `_BORDERS`."""
    found: list[int] = []
    at = 0
    for border in (*(b for b in _BORDERS if b + 7 < length), length - 2):
        found += [border - 2 - at, 1, 1, 1, 1]
        at = border + 2
    return tuple(found)


def against(graph: Runs, expected: Sequence[Sample], written: Sequence[Text] = ()) -> Iterator[Check]:
    """Every comparison of PyTorch's outputs with a graph's."""
    for sample in expected:
        yield sample.against(graph)
    for text in written:
        yield from text.against(graph)
