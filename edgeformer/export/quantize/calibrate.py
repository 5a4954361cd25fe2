"""Inputs of the linear layers on calibration text: samples of the model itself, or the user's text.

Samples need no download and suit any vocabulary (data-free calibration, LLM-QAT, arXiv:2305.17888). Everything runs on
plain onnxruntime, with the float graph that was just checked against PyTorch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common
import torch
from numpy.typing import NDArray

from edgeformer.bundle.context import NAMES
from edgeformer.errors import ExportError
from edgeformer.export.check.accuracy import read_tokens
from edgeformer.export.check.graph_run import OrtGraph
from edgeformer.export.options import SAMPLES, ExportOptions
from edgeformer.export.passes.edit import ancestors
from edgeformer.export.passes.linear_layers import linear_layers
from edgeformer.export.progress import Progress
from edgeformer.export.source import AnySource, Source

LENGTH = 256  # tokens of a sequence; half the context where that is shorter
SAMPLED = "own samples"
_MEMORY = 1 << 30  # bytes of Hessians in memory at a time
_PIECE = 1 << 28  # bytes of layer inputs in memory at a time

Inputs = tuple[str, ...]  # names of the values that one weight is applied to; mostly one


@dataclass(frozen=True)
class Calibration:
    """A float graph with its cache, and the tokens to run it on."""

    path: Path
    ids: NDArray[np.int64]  # [sequences, length]
    source: str  # for the manifest


def calibrates(options: ExportOptions, scheme: str, source: AnySource, layers: int | None = None) -> bool:
    """Whether weights are to be fitted to calibration text. `layers` with a KV cache: None if not known yet.

    Raises:
        ExportError: calibration is requested, but it is not possible for this model or scheme, or the text is missing.
    """
    wanted = options.calibrates(scheme)
    possible = isinstance(source, Source) and source.is_language_model and layers != 0
    if wanted and (options.calibration is not None or options.calibration_tokens is not None):
        if not possible:
            reason = "has no cache" if source.first.is_language_model else f"is made for {source.first.task}"
            raise ExportError(
                f"calibration runs a language model with a KV cache on text; this model {reason}. Leave it out: "
                "weights are then rounded to the nearest."
            )
        text = options.calibration_text
        if text is not None and not text.is_file():
            raise ExportError(f"there is no text {text} to calibrate on; name a file, or {SAMPLES} or none.")
    return wanted and possible


def enough(model: ir.Model) -> int:
    """Calibration tokens for a model: 3 for each input of its widest layer, from 512 to 16384.

    On SmolLM2 (1536 inputs) 2048 to 16384 tokens gave a KL divergence of 0.16 to 0.18 in q4, and another random draw
    of the same size changes it as much.
    """
    return min(max(3 * max((layer.inputs for layer in linear_layers(model)), default=0), 512), 16384)


def calibration(source: Source, options: ExportOptions, model: ir.Model, path: Path, progress: Progress) -> Calibration:
    """The text that `options` choose for `model`, the float graph of a language model with a cache, saved at `path`.

    Raises:
        ExportError: the user's text cannot be read, or the model has no tokenizer for it.
    """
    # Half the context at most: some models start their positions after a padding row and have fewer than they say.
    count, length = options.calibration_tokens or enough(model), min(LENGTH, (source.context or 2 * LENGTH) // 2)
    if options.calibration_text is None:
        sequences = max(1, count // length)
        drawn = own_samples(path, source.inputs[0].high, sequences, min(count, length), progress)
        return Calibration(path, drawn, SAMPLED)
    ids = read_tokens(source, options.calibration_text, count)
    length = min(length, len(ids))
    return Calibration(path, ids[: len(ids) // length * length].reshape(-1, length), options.calibration_text.name)


def own_samples(path: Path, vocabulary: int, sequences: int, length: int, progress: Progress) -> NDArray[np.int64]:
    """int64 [sequences, length]: texts sampled from the model at temperature 1, each with a random first token."""
    graph, generator = OrtGraph(path, mapped=True), np.random.default_rng(0)
    ids, past = generator.integers(0, vocabulary, (sequences, 1)), None
    drawn = [ids]
    for position in progress.track(range(length - 1), "draw samples"):
        feeds = {"input_ids": ids, "position_ids": np.full_like(ids, position), "logits_to_keep": np.array(1)}
        with _can_run(position + 1):
            outputs, past = graph(feeds, past)
        logits = outputs["logits"][:, -1]  # [sequences, vocabulary]
        # The Gumbel-max trick: argmax(logits - log(exponential)) is a draw from their softmax. One draw in 2**23 is 0.
        drops = generator.standard_exponential(logits.shape, np.float32)
        noise = -np.log(np.maximum(drops, np.finfo(np.float32).tiny))
        ids = (logits + noise).argmax(-1, keepdims=True)
        drawn.append(ids)
    return np.concatenate(drawn, axis=1)


@contextmanager
def _can_run(length: int) -> Iterator[None]:
    """Turns any error of onnxruntime into an ExportError. The usual cause: the text has too many positions."""
    try:
        yield
    except Exception as error:
        reason = str(error).strip().splitlines()[-1][:300]
        raise ExportError(
            f"the float graph, right so far, does not run on calibration text of {length} tokens ({reason}). Is the "
            f"model's context shorter than its config says (expected one of {', '.join(NAMES)})? Give fewer "
            "--calibration-tokens than the context has, or --calibration none to round to the nearest."
        ) from error


def hessians(
    calibration: Calibration, sizes: Mapping[Inputs, int], progress: Progress
) -> Iterator[dict[Inputs, torch.Tensor]]:
    """{inputs: X^T X / tokens, float32 [K, K]} for the keys of `sizes` ({inputs: K}), in groups, in order.

    A group's matrices fit in 1 GiB; each group is computed by a graph that is cut after it. The caller may pop the
    matrices it has used.
    """
    for group in _groups(sizes):
        part = calibration.path.with_name("calibration.onnx")
        names = list(dict.fromkeys(name for inputs in group for name in inputs))
        _cut(calibration.path, part, names)
        graph = OrtGraph(part, mapped=True)
        count, length = calibration.ids.shape
        rows = max(1, _PIECE // (4 * length * sum(sizes[inputs] * len(inputs) for inputs in group)))
        positions = np.arange(length)
        sums = {inputs: torch.zeros(sizes[inputs], sizes[inputs]) for inputs in group}
        for first in progress.track(range(0, count, rows), "calibrate"):
            ids = calibration.ids[first : first + rows]
            feeds = {"input_ids": ids, "position_ids": np.broadcast_to(positions, ids.shape)}
            with _can_run(length):
                outputs = graph.values(feeds)  # also the cache: a latent cache is the input of a layer
            for inputs in group:
                for name in inputs:
                    x = torch.from_numpy(outputs[name]).flatten(0, -2)  # [tokens, K]
                    sums[inputs].addmm_(x.T, x)
        for total in sums.values():
            total /= calibration.ids.size
        del graph
        part.unlink()
        yield sums


def _groups(sizes: Mapping[Inputs, int]) -> Iterator[list[Inputs]]:
    group: list[Inputs] = []
    used = 0
    for inputs, size in sizes.items():
        if group and used + 4 * size * size > _MEMORY:
            yield group
            group, used = [], 0
        group.append(inputs)
        used += 4 * size * size
    if group:
        yield group


def _cut(path: Path, part: Path, names: Sequence[str]) -> None:
    """Writes the graph that computes only the values `names`; its weights stay in the data file of `path`."""
    model = ir.load(path)
    values = {value.name: value for node in model.graph for value in node.outputs}
    wanted = [values[name] for name in names]
    needed = ancestors(node for value in wanted if (node := value.producer()) is not None)
    # onnxruntime's Attention must have a present output if it has a past input
    presents = [value for value in model.graph.outputs if value.producer() in needed and value not in wanted]
    model.graph.outputs[:] = [*wanted, *presents]
    common.RemoveUnusedNodesPass()(model)
    ir.save(model, part)
