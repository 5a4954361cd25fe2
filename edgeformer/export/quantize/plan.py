"""Quantizes a graph: the scheme for linear layers, int8 for embedding tables, a choice for the output layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import torch

from edgeformer.errors import ExportError
from edgeformer.export.blocks import Blocks, quantize
from edgeformer.export.options import CALIBRATED
from edgeformer.export.passes.linear_layers import LinearLayer, linear_layers
from edgeformer.export.passes.quantized_nodes import quantize_embeddings, quantize_linears, tables
from edgeformer.export.progress import Progress
from edgeformer.export.quantize import gptq
from edgeformer.export.quantize.calibrate import Calibration, hessians
from edgeformer.export.quantize.weights import Parameters, QuantizedWeight
from edgeformer.export.source import Source


@dataclass(frozen=True)
class Plan:
    """How the weights of a model's graphs are quantized."""

    scheme: str  # of linear layers
    head: str | None  # of the output layer; None: tied where the model ties it, else as `scheme`
    block: int
    transposed: frozenset[str]  # names of weights that a graph stores transposed compared with the module
    calibration: Calibration | None = None  # inputs that four-bit weights are fitted to; None: round to nearest


@dataclass(frozen=True)
class Quantization:
    """The quantized weights of a bundle, none if the scheme is `none`."""

    scheme: str
    weights: Sequence[QuantizedWeight] = ()
    calibration: Calibration | None = None


def quantize_graph(model: ir.Model, source: Source, plan: Plan, progress: Progress) -> list[QuantizedWeight]:
    """Quantizes the graph in place; returns the quantized weights. `plan.calibration` must be of this graph.

    Raises:
        ExportError: nothing can be quantized, or `--head tied` is given for a model that does not tie its head.
    """
    known = Parameters(source.module.state_dict())
    embedded = {str(table.name): table for table in tables(model) if table.name in known}
    layers = {str(layer.weight.name): layer.weight for layer in linear_layers(model)}
    layers = {name: weight for name, weight in layers.items() if name.removesuffix(".rows") in known}
    head = list(layers)[-1] if layers and source.is_language_model else None
    if plan.head == "tied" and head not in embedded:
        raise ExportError("--head tied: this model's head has a weight of its own; choose q4a, q4, q8 or none.")

    wanted = {name: plan.scheme if name not in embedded else "tied" for name in layers}
    if head is not None:
        wanted[head] = plan.head or wanted[head]

    done: list[QuantizedWeight] = []
    for_tables: dict[str, Blocks] = {}
    for_layers = _calibrated(model, known, wanted, plan, progress)
    fitted = frozenset(for_layers)
    for name in progress.track([*embedded, *(n for n in layers if n not in embedded)], f"quantize {plan.scheme}"):
        if name in embedded:
            blocks = _blocks(source, embedded[name], "keep" if plan.scheme == "keep" else "q8", plan.block)
            if blocks is not None:
                for_tables[name] = blocks
                done.append(QuantizedWeight(name, blocks))
        if name in layers:
            how = wanted[name]
            if name not in fitted:
                blocks = for_tables.get(name) if how == "tied" else _blocks(source, layers[name], how, plan.block)
                if blocks is not None:
                    for_layers[name] = blocks
            blocks = for_layers.get(name)
            if how != "tied" and (blocks is not None or name in embedded):
                plain = name.removesuffix(".rows")
                transposed = plain in plan.transposed or name in plan.transposed
                done.append(QuantizedWeight(plain, blocks, transposed, name in embedded, name in fitted))
    if not done:
        raise ExportError("the graph has no linear layer or embedding of the module to quantize; use --quantize none.")
    quantize_linears(model, lambda name, _: for_layers.get(name))
    quantize_embeddings(model, lambda name, _: for_tables.get(name))
    return done


def _calibrated(
    model: ir.Model,
    known: Mapping[str, torch.Tensor],
    wanted: Mapping[str, str],
    plan: Plan,
    progress: Progress,
) -> dict[str, Blocks]:
    """The blocks of all layers whose scheme in `wanted` has four bits, fitted to their inputs in `plan.calibration`.

    A slice of a stack (an expert) is left out: its inputs are the few tokens that are routed to it, but the graph runs
    every expert on every token.
    """
    if plan.calibration is None:
        return {}
    weights: dict[str, LinearLayer] = {}
    read: dict[str, dict[str, None]] = {}  # weight -> its inputs: several where layers share the weight
    for layer in linear_layers(model):
        name = str(layer.weight.name)
        own = dict.__contains__(known, name.removesuffix(".rows"))
        if own and wanted.get(name) in CALIBRATED and layer.inputs >= plan.block and layer.x.producer() is not None:
            weights[name] = layer
            read.setdefault(name, {})[str(layer.x.name)] = None
    readers: dict[tuple[str, ...], list[str]] = {}
    for name, values in read.items():
        readers.setdefault(tuple(values), []).append(name)
    sizes = {inputs: weights[names[0]].inputs for inputs, names in readers.items()}
    found: dict[str, Blocks] = {}
    for group in hessians(plan.calibration, sizes, progress):
        for inputs in progress.track(tuple(group), "quantize"):
            factor = gptq.inverse_factor(group.pop(inputs))
            for name in readers[inputs]:
                found[name] = gptq.fit_blocks(_values_of(weights[name].weight), factor, wanted[name], plan.block)
    return found


def _values_of(weight: ir.Value) -> np.ndarray:
    assert weight.const_value is not None
    return np.ascontiguousarray(weight.const_value.numpy())


def _blocks(source: Source, weight: ir.Value, wanted: str, block: int) -> Blocks | None:
    """The blocks of a weight; None if it stays float: `none`, float in the source, or narrower than a block."""
    if wanted == "none":
        return None
    values = _values_of(weight)
    if wanted == "keep":
        return source.kept(values) if source.kept is not None else None
    if values.shape[1] < block:
        return None  # such a layer reads raw features: quantizing it costs much accuracy and saves nothing
    return quantize(values, wanted, block)
