"""float32 -> float16, for GPUs: weights, activations and KV cache; rotary angles stay float32 up to Cos and Sin.

`round_to_float16` simulates it in a float32 graph, to bound the error that an engine may have.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.tape import Tape

from edgeformer.export.passes.edit import ancestors, nodes

_F32, _F16 = ir.DataType.FLOAT, ir.DataType.FLOAT16
_MOVES = ("Reshape", "Transpose", "Slice", "Concat", "Split", "Squeeze", "Unsqueeze", "Expand", "Gather", "Identity")


def to_float16(model: ir.Model) -> None:
    """Every float32 value -> float16, except those that only Cos and Sin depend on.

    Those stay float32: in half precision an angle above 1024 is rounded to whole numbers.
    """
    angles, precise = _precise(model)
    for node in nodes(model, "Cos", "Sin"):
        tape = Tape()
        half = tape.op("Cast", [node.outputs[0]], {"to": int(_F16)})
        half.shape = node.outputs[0].shape
        for use in tuple(node.outputs[0].uses()):
            if use.node is not half.producer() and use.node not in angles:
                use.node.replace_input_with(use.idx, half)
        model.graph.insert_after(node, tape.nodes)
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        if value.dtype == _F32 and value not in precise:
            _halve(value)
    for node in model.graph:
        if node in angles:
            continue
        if node.op_type == "Cast" and node.attributes["to"].value == int(_F32):
            node.attributes["to"] = ir.AttrInt64("to", int(_F16))
        for output in node.outputs:
            if output.dtype == _F32:
                output.type = ir.TensorType(_F16)  # a new object: clones of the graph share the type


def round_to_float16(model: ir.Model) -> None:
    """Rounds every value that `to_float16` makes float16, where it is computed; all stay float32.

    Engines may round less, where they compute several operators at once, and add in another order.
    """
    angles, precise = _precise(model)
    for value in model.graph.initializers.values():
        if value.dtype == _F32 and value not in precise and value.const_value is not None:
            wide = value.const_value
            value.const_value = ir.LazyTensor(_rounded(wide), _F32, ir.Shape(wide.shape.numpy()), name=value.name)
    computed = [
        value
        for node in model.graph
        if node.op_type in ("Cos", "Sin") or (node not in angles and node.op_type not in _MOVES)
        for value in node.outputs
    ]
    for value in (*model.graph.inputs, *computed):
        if value.dtype == _F32 and value not in precise - set(computed):
            _round_uses(model, value, angles)


def _precise(model: ir.Model) -> tuple[set[ir.Node], set[ir.Value]]:
    """(the nodes that stay float32: Cos, Sin and what they depend on; their inputs and outputs)."""
    angles = ancestors([node for node in model.graph if node.op_type in ("Cos", "Sin")])
    return angles, {value for node in angles for value in (*node.inputs, *node.outputs) if value is not None}


def _round_uses(model: ir.Model, value: ir.Value, angles: set[ir.Node]) -> None:
    """What reads `value` reads it rounded to float16."""
    tape = Tape()
    half = tape.op("Cast", [value], {"to": int(_F16)})
    y = tape.op("Cast", [half], {"to": int(_F32)})
    half.shape, half.type = value.shape, ir.TensorType(_F16)
    y.shape, y.type = value.shape, value.type
    maker = value.producer()
    if maker is None:
        model.graph.insert_before(model.graph[0], tape.nodes)
    else:
        model.graph.insert_after(maker, tape.nodes)
    for use in tuple(value.uses()):
        if use.node is not half.producer() and use.node not in angles:
            use.node.replace_input_with(use.idx, y)
    if value.is_graph_output():
        name, value.name = value.name, f"{value.name}.exact"
        y.name = name
        model.graph.outputs[model.graph.outputs.index(value)] = y


def _rounded(wide: ir.TensorProtocol) -> Callable[[], ir.TensorProtocol]:
    return lambda: ir.Tensor(_half(wide).astype(np.float32))


def _half(wide: ir.TensorProtocol) -> np.ndarray[Any, np.dtype[np.float16]]:
    """The values rounded; what is too large becomes the largest."""
    limit = np.float32(65504)
    values: np.ndarray[Any, np.dtype[np.float16]] = np.clip(wide.numpy(), -limit, limit).astype(np.float16)
    return values


def _halve(value: ir.Value) -> None:
    value.type = ir.TensorType(_F16)
    if value.const_value is not None:
        wide = value.const_value

        def half() -> ir.TensorProtocol:  # converted when it is written: memory never has a second copy of all weights
            return ir.Tensor(_half(wide))

        value.const_value = ir.LazyTensor(half, _F16, ir.Shape(wide.shape.numpy()), name=value.name)
