"""float32 -> float16, for GPUs: weights, activations and KV cache; angles and indices stay float32.

`round_to_float16` simulates it in a float32 graph, to bound the error that an engine may have.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir

from edgeformer.export.passes.edit import ancestors, nodes

_F32, _F16 = ir.DataType.FLOAT, ir.DataType.FLOAT16
_LAYERS = frozenset(["MatMul", "Gemm", "Conv", "Attention", "Einsum"])  # what depends on one is an activation
_MOVES = ("Reshape", "Transpose", "Slice", "Concat", "Split", "Squeeze", "Unsqueeze", "Expand", "Gather", "Identity")


def to_float16(model: ir.Model) -> None:
    """Every float32 value -> float16, except what Cos, Sin and indices are computed from.

    In half precision an angle above 1024 is rounded to whole numbers, and the bucket of a relative position (T5:
    log(distance / 16) * c, cast to an integer) becomes its neighbour.
    """
    exact = _exact_nodes(model)
    kept = _exact_values(model, exact)
    for value in kept:
        _read_as(model, value, exact, _F16)
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        if value.dtype == _F32 and value not in kept:
            _halve(value)
    for node in model.graph:
        if node in exact:
            continue
        _halve_attributes(node)
        for output in node.outputs:
            if output.dtype == _F32:
                output.type = ir.TensorType(_F16)  # a new object: clones of the graph share the type


def round_to_float16(model: ir.Model) -> None:
    """Rounds every value that `to_float16` makes float16, where it is computed; all stay float32.

    Engines may round less, where they compute several operators at once, and add in another order.
    """
    exact = _exact_nodes(model)
    kept = _exact_values(model, exact)
    for value in model.graph.initializers.values():
        if value.dtype == _F32 and value not in kept and value.const_value is not None:
            wide = value.const_value
            value.const_value = ir.LazyTensor(_rounded(wide), _F32, ir.Shape(wide.shape.numpy()), name=value.name)
    for node in model.graph:
        for name, tensor in _tensors(node) if node not in exact else ():
            node.attributes[name] = ir.AttrTensor(name, _rounded(tensor)())
    computed = [value for node in model.graph if node.op_type not in _MOVES for value in node.outputs]
    for value in dict.fromkeys((*model.graph.inputs, *kept, *computed)):
        if value.dtype == _F32:
            _read_as(model, value, exact, _F16, _F32)


def _exact_nodes(model: ir.Model) -> set[ir.Node]:
    """Cos, Sin and casts to integers, with all that their values depend on; not integers of computed activations.

    Of what a Shape reads, only the size matters.
    """
    exact: set[ir.Node] = set()
    for node in nodes(model, "Cos", "Sin", "Cast"):
        is_angle = node.op_type != "Cast"
        if is_angle or ir.DataType(node.attributes["to"].value).is_integer():
            needed = ancestors([node], without=("Shape", "Size"))
            if is_angle or not any(one.op_type in _LAYERS for one in needed):
                exact |= needed
    return exact


def _exact_values(model: ir.Model, exact: set[ir.Node]) -> dict[ir.Value, None]:
    """The float32 values that these nodes read or compute, in the graph's order."""
    found = [value for node in model.graph if node in exact for value in (*node.inputs, *node.outputs)]
    return dict.fromkeys(value for value in found if value is not None and value.dtype == _F32)


def _read_as(model: ir.Model, value: ir.Value, exact: set[ir.Node], *types: ir.DataType) -> None:
    """What is not exact reads `value` through casts to these types, one after the other; if anything does."""
    maker = value.producer()
    uses = [use for use in value.uses() if use.node not in exact]
    is_output = value.is_graph_output() and maker not in exact
    if not uses and not is_output:
        return
    y, casts = value, []
    for kind in types:
        cast = ir.Value(type=ir.TensorType(kind), shape=value.shape)
        casts.append(ir.node("Cast", [y], {"to": int(kind)}, outputs=[cast]))
        y = cast
    if maker is None:
        model.graph.insert_before(model.graph[0], casts)
    else:
        model.graph.insert_after(maker, casts)
    for use in uses:
        use.node.replace_input_with(use.idx, y)
    if is_output:
        y.name, value.name = value.name, f"{value.name}.exact"
        model.graph.outputs[model.graph.outputs.index(value)] = y


def _rounded(wide: ir.TensorProtocol) -> Callable[[], ir.TensorProtocol]:
    return lambda: ir.Tensor(_half(wide).astype(np.float32))


def _half(wide: ir.TensorProtocol) -> np.ndarray[Any, np.dtype[np.float16]]:
    """The values rounded; what is too large becomes the largest."""
    limit = np.float32(65504)
    values: np.ndarray[Any, np.dtype[np.float16]] = np.clip(wide.numpy(), -limit, limit).astype(np.float16)
    return values


def _halve_attributes(node: ir.Node) -> None:
    """The type that a Cast, an EyeLike or the like makes, and the value of a Constant or ConstantOfShape."""
    for name in ("to", "dtype"):
        if name in node.attributes and node.attributes[name].value == int(_F32):
            node.attributes[name] = ir.AttrInt64(name, int(_F16))
    for name, tensor in _tensors(node):
        node.attributes[name] = ir.AttrTensor(name, ir.Tensor(_half(tensor)))
    if node.op_type == "ConstantOfShape" and "value" not in node.attributes:  # zeros of float32
        node.attributes["value"] = ir.AttrTensor("value", ir.Tensor(np.zeros(1, np.float16)))
    for name in ("value_float", "value_floats"):
        if name in node.attributes:
            wide = ir.Tensor(np.array(node.attributes.pop(name).value, np.float32))
            node.attributes["value"] = ir.AttrTensor("value", ir.Tensor(_half(wide)))


def _tensors(node: ir.Node) -> list[tuple[str, ir.TensorProtocol]]:
    """(name, value) of the attributes that are float32 tensors."""
    tensors = [(name, a.value) for name, a in node.attributes.items() if a.type == ir.AttributeType.TENSOR]
    return [(name, value) for name, value in tensors if value.dtype == _F32]


def _halve(value: ir.Value) -> None:
    value.type = ir.TensorType(_F16)
    if value.const_value is not None:
        wide = value.const_value

        def half() -> ir.TensorProtocol:  # converted when it is written: memory never has a second copy of all weights
            return ir.Tensor(_half(wide))

        value.const_value = ir.LazyTensor(half, _F16, ir.Shape(wide.shape.numpy()), name=value.name)
