"""Inputs of the linear layers on calibration text: the model's own samples, or a text of the user's.

Own samples need no download and suit any vocabulary (data-free calibration, LLM-QAT, arXiv:2305.17888). All of it runs
the float graph that was just checked against PyTorch, on plain onnxruntime; no module is hooked.
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
from edgeformer.export.check.graph_run import Graph
from edgeformer.export.options import ExportOptions
from edgeformer.export.passes.edit import ancestors
from edgeformer.export.passes.linear import linears
from edgeformer.export.progress import Progress
from edgeformer.export.source import Source

LENGTH = 256  # tokens of a sequence, where the model's context allows
SAMPLED = "own samples"
_HELD = 1 << 30  # bytes of Hessians in memory at a time
_PIECE = 1 << 28  # bytes of layer inputs in memory at a time

Inputs = tuple[str, ...]  # values of the graph that one weight is applied to, mostly one


@dataclass(frozen=True)
class Calibration:
    """A float graph with its cache, and the tokens to run it on."""

    path: Path
    ids: NDArray[np.int64]  # [sequences, length]
    source: str  # for the manifest


def enough(model: ir.Model) -> int:
    """Tokens to fit a model to: 3 for each input of its widest layer, in 512 to 16384.

    On SmolLM2 (1536 inputs) numbers from 2048 to 16384 gave a KL divergence of 0.16 to 0.18 in q4, and another draw of
    as many changes it by as much.
    """
    return min(max(3 * max((layer.inputs for layer in linears(model)), default=0), 512), 16384)


def calibration(source: Source, options: ExportOptions, model: ir.Model, path: Path, progress: Progress) -> Calibration:
    """The text that `options` name for `model`, a language model with a cache, which is saved at `path`.

    Raises:
        ExportError: the user's text cannot be read, or the model has no tokenizer for it.
    """
    # Half the context at most: there are models whose positions start behind a padding token, and end before it.
    count, length = options.calibration_tokens or enough(model), min(LENGTH, (source.context or 2 * LENGTH) // 2)
    if options.calibration_text is None:
        sequences = max(1, count // length)
        drawn = own_samples(path, source.inputs[0].high, sequences, min(count, length), progress)
        return Calibration(path, drawn, SAMPLED)
    ids = read_tokens(source, options.calibration_text, count)
    length = min(length, len(ids))
    return Calibration(path, ids[: len(ids) // length * length].reshape(-1, length), options.calibration_text.name)


def own_samples(path: Path, vocabulary: int, sequences: int, length: int, progress: Progress) -> NDArray[np.int64]:
    """int64 [sequences, length]: texts drawn from the model itself at temperature 1, each from a random first token."""
    graph, generator = Graph(path, mapped=True), np.random.default_rng(0)
    ids, past = generator.integers(0, vocabulary, (sequences, 1)), None
    drawn = [ids]
    for position in progress.track(range(length - 1), "draw samples"):
        feeds = {"input_ids": ids, "position_ids": np.full_like(ids, position), "logits_to_keep": np.array(1)}
        with _can_run(position + 1):
            outputs, past = graph(feeds, past)
        logits = outputs["logits"][:, -1]  # [sequences, vocabulary]
        # The largest of logits with Gumbel noise, -log(exponential), is a draw from their softmax. One in 2**23 is 0.
        drops = generator.standard_exponential(logits.shape, np.float32)
        noise = -np.log(np.maximum(drops, np.finfo(np.float32).tiny))
        ids = (logits + noise).argmax(-1, keepdims=True)
        drawn.append(ids)
    return np.concatenate(drawn, axis=1)


@contextmanager
def _can_run(length: int) -> Iterator[None]:
    """An ExportError for what onnxruntime raises, which has no class of its own: mostly a table of positions ends."""
    try:
        yield
    except Exception as error:
        told = str(error).strip().splitlines()[-1][:300]
        raise ExportError(
            f"the float graph, right so far, does not run on calibration text of {length} tokens ({told}). Is the "
            f"model's context shorter than its config says (expected one of {', '.join(NAMES)})? Give fewer "
            "--calibration-tokens than the context has, or --calibration none to round to the nearest."
        ) from error


def hessians(
    calibration: Calibration, sizes: Mapping[Inputs, int], progress: Progress
) -> Iterator[dict[Inputs, torch.Tensor]]:
    """{inputs: X^T X / tokens, float32 [K, K]} for the keys of `sizes`, whose last axes are K, in groups, in order.

    A group's matrices fit in 1 GiB; it is computed by a graph that ends where the group does. A caller may take out
    what it has used.
    """
    for group in _groups(sizes):
        part = calibration.path.with_name("calibration.onnx")
        names = list(dict.fromkeys(name for inputs in group for name in inputs))
        _cut(calibration.path, part, names)
        graph = Graph(part, mapped=True)
        count, length = calibration.ids.shape
        rows = max(1, _PIECE // (4 * length * sum(sizes[inputs] * len(inputs) for inputs in group)))
        positions = np.arange(length)
        sums = {inputs: torch.zeros(sizes[inputs], sizes[inputs]) for inputs in group}
        for first in progress.track(range(0, count, rows), "calibrate"):
            ids = calibration.ids[first : first + rows]
            feeds = {"input_ids": ids, "position_ids": np.broadcast_to(positions, ids.shape)}
            with _can_run(length):
                outputs = graph.values(feeds)  # a latent cache is a layer's input itself
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
    held = 0
    for inputs, size in sizes.items():
        if group and held + 4 * size * size > _HELD:
            yield group
            group, held = [], 0
        group.append(inputs)
        held += 4 * size * size
    if group:
        yield group


def _cut(path: Path, part: Path, names: Sequence[str]) -> None:
    """Writes the graph that computes the values `names` alone; its weights stay in the file of the whole."""
    model = ir.load(path)
    values = {value.name: value for node in model.graph for value in node.outputs}
    wanted = [values[name] for name in names]
    needed = ancestors(node for value in wanted if (node := value.producer()) is not None)
    # onnxruntime's Attention wants to give its present where it is given a past
    presents = [value for value in model.graph.outputs if value.producer() in needed and value not in wanted]
    model.graph.outputs[:] = [*wanted, *presents]
    common.RemoveUnusedNodesPass()(model)
    ir.save(model, part)
