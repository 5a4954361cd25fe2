"""Which weight is quantized how: the scheme for linear layers, int8 for embeddings, and the choice for the head."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import torch

from edgeformer.errors import ExportError
from edgeformer.export.blocks import Blocks, quantize
from edgeformer.export.options import CALIBRATED, ExportOptions
from edgeformer.export.passes.linear import Linear, linears
from edgeformer.export.passes.quantized_nodes import quantize_embeddings, quantize_linears, tables
from edgeformer.export.progress import Progress
from edgeformer.export.quantize import gptq
from edgeformer.export.quantize.calibrate import Calibration, hessians
from edgeformer.export.scratch import on_disk, put
from edgeformer.export.source import Source


@dataclass(frozen=True)
class Quantized:
    """One weight of the module that the bundle holds as blocks."""

    name: str  # in the module's state dict
    blocks: Blocks | None  # None: float, which only an own head can be
    transposed: bool = False  # the module holds [K, N]
    own_head: bool = False  # a second form of an embedding's table, for the head alone
    calibrated: bool = False  # its integers were fitted to the layer's inputs


def quantize_graph(
    model: ir.Model,
    source: Source,
    options: ExportOptions,
    scheme: str,
    transposed: frozenset[str],
    progress: Progress,
    calibration: Calibration | None = None,
) -> list[Quantized]:
    """Quantizes the graph in place; returns what stands in it now. `calibration` is of this very graph.

    Raises:
        ExportError: nothing can be quantized, or `--head tied` is asked for a model that does not tie its head.
    """
    known = _Parameters(source.module.state_dict())
    embedded = {str(table.name): table for table in tables(model) if table.name in known}
    layers = {str(layer.weight.name): layer.weight for layer in linears(model)}
    layers = {name: weight for name, weight in layers.items() if name.removesuffix(".rows") in known}
    head = list(layers)[-1] if layers and source.is_language_model else None
    if options.head == "tied" and head not in embedded:
        raise ExportError("--head tied: this model's head has a weight of its own; choose q4a, q4, q8 or none.")

    wanted = {name: scheme if name not in embedded else "tied" for name in layers}
    if head is not None:
        wanted[head] = options.head or wanted[head]

    done: list[Quantized] = []
    for_tables: dict[str, Blocks] = {}
    for_layers = _calibrated(model, known, wanted, options.block, calibration, progress) if calibration else {}
    fitted = frozenset(for_layers)
    for name in progress.track([*embedded, *(n for n in layers if n not in embedded)], f"quantize {scheme}"):
        if name in embedded:
            blocks = _blocks(source, embedded[name], "keep" if scheme == "keep" else "q8", options.block)
            if blocks is not None:
                for_tables[name] = blocks
                done.append(Quantized(name, blocks))
        if name in layers:
            how = wanted[name]
            if name not in fitted:
                blocks = for_tables.get(name) if how == "tied" else _blocks(source, layers[name], how, options.block)
                if blocks is not None:
                    for_layers[name] = blocks
            blocks = for_layers.get(name)
            if how != "tied" and (blocks is not None or name in embedded):
                plain = name.removesuffix(".rows")
                turned = plain in transposed or name in transposed
                done.append(Quantized(plain, blocks, turned, name in embedded, name in fitted))
    if not done:
        raise ExportError("the graph has no linear layer or embedding of the module to quantize; use --quantize none.")
    quantize_linears(model, lambda name, weight: for_layers.get(name))
    quantize_embeddings(model, lambda name, table: for_tables.get(name))
    return done


def _calibrated(
    model: ir.Model,
    known: Mapping[str, torch.Tensor],
    wanted: Mapping[str, str],
    block: int,
    calibration: Calibration,
    progress: Progress,
) -> dict[str, Blocks]:
    """The blocks of all layers whose scheme in `wanted` has four bits, fitted to the inputs they have in `calibration`.

    A slice of a stack (an expert) is left out: its inputs are those of the few tokens that choose it, which the graph,
    running every expert on every token, does not tell apart.
    """
    weights: dict[str, Linear] = {}
    read: dict[str, dict[str, None]] = {}  # weight -> the values it is applied to: several where layers share it
    for layer in linears(model):
        name = str(layer.weight.name)
        own = dict.__contains__(known, name.removesuffix(".rows"))
        if own and wanted.get(name) in CALIBRATED and layer.inputs >= block and layer.x.producer() is not None:
            weights[name] = layer
            read.setdefault(name, {})[str(layer.x.name)] = None
    readers: dict[tuple[str, ...], list[str]] = {}
    for name, values in read.items():
        readers.setdefault(tuple(values), []).append(name)
    sizes = {inputs: weights[names[0]].inputs for inputs, names in readers.items()}
    found: dict[str, Blocks] = {}
    for group in hessians(calibration, sizes, progress):
        for inputs in progress.track(tuple(group), "quantize"):
            factor = gptq.inverse_factor(group.pop(inputs))
            for name in readers[inputs]:
                found[name] = gptq.quantize(_values_of(weights[name].weight), factor, wanted[name], block)
    return found


def _values_of(weight: ir.Value) -> np.ndarray:
    assert weight.const_value is not None
    return np.ascontiguousarray(weight.const_value.numpy())


def _blocks(source: Source, weight: ir.Value, wanted: str, block: int) -> Blocks | None:
    """None leaves the weight as it is: `none` says so, the source keeps it as float, or it is narrower than a block."""
    if wanted == "none":
        return None
    values = _values_of(weight)
    if wanted == "keep":
        return source.kept(values) if source.kept is not None else None
    if values.shape[1] < block:
        return None  # a layer narrower than a block reads raw features: rounding them costs much and saves nothing
    return quantize(values, wanted, block)


@contextlib.contextmanager
def holding(module: torch.nn.Module, weights: Sequence[Quantized]) -> Iterator[None]:
    """`module` with the values that the blocks stand for, in mapped files; as it was when the block ends."""
    state = _Parameters(module.state_dict(keep_vars=True))
    saved: list[tuple[torch.Tensor, torch.Tensor]] = []
    heads: list[tuple[torch.nn.Module, str, torch.nn.Parameter]] = []
    try:
        with torch.no_grad():
            for weight in (w for w in weights if w.own_head):
                heads += _untie(module, state, weight)
            others = [w for w in weights if not w.own_head]

            def whole(weight: Quantized) -> str:
                return state.whole(weight.name)

            for name, parts in itertools.groupby(sorted(others, key=whole), key=whole):
                saved += put(module, state[name], on_disk(_held(state[name], name, list(parts))))
        yield
    finally:
        for tensor, before in saved:
            tensor.data = before
        for owner, name, parameter in heads:
            setattr(owner, name, parameter)


class _Parameters(dict[str, torch.Tensor]):
    """A state dict in which `stack.3` is the slice 3 of the parameter `stack`, as `passes.slices` names it."""

    def __contains__(self, name: object) -> bool:
        return dict.__contains__(self, name) or (isinstance(name, str) and self._slice(name) is not None)

    def __missing__(self, name: str) -> torch.Tensor:
        found = self._slice(name)
        if found is None:
            raise KeyError(name)
        return found

    def whole(self, name: str) -> str:
        """The parameter that `name` is, or is a slice of."""
        return name if dict.__contains__(self, name) else name.rpartition(".")[0]

    def _slice(self, name: str) -> torch.Tensor | None:
        stack, _, index = name.rpartition(".")
        inside = dict.__contains__(self, stack) and index.isdigit() and int(index) < len(self[stack])
        return self[stack][int(index)] if inside else None


def _held(original: torch.Tensor, name: str, weights: Sequence[Quantized]) -> torch.Tensor:
    """What the module is to hold in the place of `original`: one weight, or a stack of which these are slices."""
    if weights[0].name == name:
        return _values(weights[0], original)
    stack = _Parameters({name: original.detach().clone()})
    for weight in weights:
        stack[weight.name].copy_(_values(weight, stack[weight.name]))
    return stack[name]


def _values(weight: Quantized, original: torch.Tensor) -> torch.Tensor:
    if weight.blocks is None:
        return original.detach()
    values = torch.from_numpy(weight.blocks.dequantize())
    return values.T if weight.transposed else values


def _untie(
    module: torch.nn.Module, state: Mapping[str, torch.Tensor], weight: Quantized
) -> list[tuple[torch.nn.Module, str, torch.nn.Parameter]]:
    """Gives the head a parameter of its own beside the embedding it shares with; returns what to put back."""
    shared, before = state[weight.name], []
    own = on_disk(_values(weight, shared))
    for owner in module.modules():
        for name, parameter in tuple(owner.named_parameters(recurse=False)):
            if parameter.data_ptr() == shared.data_ptr() and not isinstance(owner, torch.nn.Embedding):
                before.append((owner, name, parameter))
                setattr(owner, name, torch.nn.Parameter(own))
    if not before:
        raise ExportError(
            f"no module but an embedding holds {weight.name}, so its head cannot be checked; use --head tied."
        )
    return before
