"""Moves the subgraph that depends only on the encoder's output from the decoder's graph to the encoder's.

In a traced decoder, each cross-attention projects `encoder_hidden_states` to keys and values at every step, though no
decoded token changes them. After this pass the encoder computes them once, as outputs, and the decoder takes them as
inputs.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common

from edgeformer.errors import ExportError
from edgeformer.export.passes.edit import nodes
from edgeformer.export.source import ENCODER_STATES


def hoist(encoder: ir.Model, decoder: ir.Model, result: str) -> dict[str, str]:
    """Moves the nodes, in place; returns {new output of the encoder: input of the decoder that it feeds}.

    `result` is the encoder's output that `encoder_hidden_states` stands for. Keys and values of the i-th
    cross-attention are named `present.{i}.encoder.key|value` in the encoder and `past_key_values.{i}.encoder.key|value`
    in the decoder; other values are named `encoder.{n}` in both.

    Raises:
        ExportError: a node of the decoder reads the encoder's output together with decoded tokens.
    """
    states = _named(decoder.graph.inputs, ENCODER_STATES)
    output = _named(encoder.graph.outputs, result)
    movable = _movable(decoder, states)
    crossing = [
        value
        for node in decoder.graph
        for value in node.outputs
        if movable.get(value) and any(use.node.outputs[0] not in movable for use in value.uses())
    ]
    names = _names(decoder, crossing)
    copies = _copy(encoder, decoder, states, output, crossing)
    wires: dict[str, str] = {}
    for value, (given, taken) in zip(crossing, names, strict=True):
        copy = copies[value]
        copy.name, copy.shape, copy.type = given, value.shape, value.type
        encoder.graph.outputs.append(copy)
        entry = ir.Value(name=taken, shape=value.shape, type=value.type)
        decoder.graph.inputs.append(entry)
        for use in tuple(value.uses()):
            if use.node.outputs[0] not in movable:
                use.node.replace_input_with(use.idx, entry)
        wires[given] = taken
    common.RemoveUnusedNodesPass()(decoder)
    _redirect_sizes(decoder, {value for value, made in movable.items() if made})
    common.RemoveUnusedNodesPass()(decoder)
    if states.uses():
        readers = ", ".join(sorted({use.node.op_type for use in states.uses()}))
        raise ExportError(
            f"the decoder reads {ENCODER_STATES} in {readers}, together with decoded tokens; expected "
            "nodes that depend on the encoder's output only, such as the projections of a cross-attention."
        )
    decoder.graph.inputs.remove(states)
    return wires


def _movable(decoder: ir.Model, states: ir.Value) -> dict[ir.Value, bool]:
    """{value that the encoder can compute: True if it depends on the encoder's output, False for sizes}."""
    known = {_symbol(dim) for dim in states.shape or ()}
    found: dict[ir.Value, bool] = {states: True}
    for node in decoder.graph:
        inputs = [value for value in node.inputs if value is not None]
        if node.op_type == "Shape":
            dims = _measured(node)
            if dims and all(isinstance(dim, int) or _symbol(dim) in known for dim in dims):
                found[node.outputs[0]] = False
            continue
        if all(value in found or _is_constant(value) for value in inputs):
            for output in node.outputs:
                found[output] = any(found.get(value, False) for value in inputs)
    return found


def _copy(
    encoder: ir.Model, decoder: ir.Model, states: ir.Value, output: ir.Value, crossing: list[ir.Value]
) -> dict[ir.Value, ir.Value]:
    """Appends to the encoder copies of the nodes that `crossing` depends on; returns {old value: its copy}."""
    made: dict[ir.Value, ir.Value] = {states: output}
    needed: set[ir.Node] = set()
    queue = [value.producer() for value in crossing]
    while queue:
        node = queue.pop()
        if node is not None and node not in needed:
            needed.add(node)
            if node.op_type != "Shape":
                queue.extend(value.producer() for value in node.inputs if value is not None and value is not states)
    for node in tuple(decoder.graph):
        if node not in needed:
            continue
        inputs: list[ir.Value | None]
        if node.op_type == "Shape":
            inputs, attributes = [output], _same_dims_of(node, output)
        else:
            inputs = [None if value is None else made.get(value) or _constant(encoder, value) for value in node.inputs]
            attributes = dict(node.attributes)
        copy = ir.Node("", node.op_type, inputs, list(attributes.values()), num_outputs=len(node.outputs))
        for old, new in zip(node.outputs, copy.outputs, strict=True):
            new.shape, new.type, new.name = old.shape, old.type, f"decoder.{old.name}"
            made[old] = new
        encoder.graph.append(copy)
    return made


def _constant(encoder: ir.Model, value: ir.Value) -> ir.Value:
    """The encoder's initializer with the content of the decoder's `value`."""
    taken = {out.name for node in encoder.graph for out in node.outputs}
    name = str(value.name)
    while (known := encoder.graph.initializers.get(name)) is not None or name in taken:
        if known is not None and _same_content(known, value):
            return known
        name = f"decoder.{name}"  # names of both graphs are numbered from 0
    copy = ir.Value(name=name, shape=value.shape, type=value.type, const_value=value.const_value)
    encoder.graph.register_initializer(copy)
    return copy


def _same_content(one: ir.Value, other: ir.Value) -> bool:
    a, b = one.const_value, other.const_value
    return a is b or (a is not None and b is not None and a.dtype == b.dtype and np.array_equal(a.numpy(), b.numpy()))


def _same_dims_of(node: ir.Node, output: ir.Value) -> dict[str, ir.Attr]:
    """Attributes for a Shape of `output` that returns the same sizes as the Shape `node`, matched by axis name."""
    wanted = [_symbol(dim) for dim in _measured(node)]
    dims = [_symbol(dim) for dim in output.shape or ()]
    for start in range(len(dims)):
        if dims[start : start + len(wanted)] == wanted:
            end = start + len(wanted)
            return {"start": ir.AttrInt64("start", start), "end": ir.AttrInt64("end", end)}
    raise ExportError(
        f"the encoder's output has axes {dims}; expected {', '.join(map(str, wanted))} next to each other."
    )


def _redirect_sizes(decoder: ir.Model, moved: set[ir.Value]) -> None:
    """`Shape(moved value)` -> `Shape(input of the decoder with the same axis)`."""
    for node in nodes(decoder, "Shape"):
        dims = [_symbol(dim) for dim in _measured(node)]
        if node.inputs[0] not in moved or len(dims) != 1:
            continue
        for other in decoder.graph.inputs:
            axes = [_symbol(dim) for dim in other.shape or ()]
            if other not in moved and dims[0] in axes:
                start = axes.index(dims[0])
                node.replace_input_with(0, other)
                node.attributes["start"] = ir.AttrInt64("start", start)
                node.attributes["end"] = ir.AttrInt64("end", start + 1)
                break


def _names(decoder: ir.Model, crossing: list[ir.Value]) -> list[tuple[str, str]]:
    """The (encoder's output, decoder's input) names of each value."""
    attentions = [
        node
        for node in decoder.graph
        if node.op_type == "Attention" and (node.inputs[1] in crossing or node.inputs[2] in crossing)
    ]
    names: dict[ir.Value, tuple[str, str]] = {}
    for layer, node in enumerate(attentions):
        for index, part in ((1, "key"), (2, "value")):
            value = node.inputs[index]
            if value is not None and value in crossing and value not in names:
                names[value] = (f"present.{layer}.encoder.{part}", f"past_key_values.{layer}.encoder.{part}")
    return [names.get(value, (f"encoder.{n}", f"encoder.{n}")) for n, value in enumerate(crossing)]


def _measured(shape: ir.Node) -> list[int | ir.SymbolicDim]:
    """The axes whose sizes a Shape node returns; [] if its input has no known shape."""
    source = shape.inputs[0]
    if source is None or source.shape is None:
        return []
    start, end = (
        int(shape.attributes[name].value) if name in shape.attributes else default
        for name, default in (("start", 0), ("end", len(source.shape)))
    )
    return list(source.shape)[start:end]


def _symbol(dim: int | ir.SymbolicDim) -> int | str | None:
    return dim if isinstance(dim, int) else dim.value


def _is_constant(value: ir.Value) -> bool:
    return value.is_initializer() and not value.is_graph_input()


def _named(values: Iterable[ir.Value], name: str) -> ir.Value:
    return next(value for value in values if value.name == name)
