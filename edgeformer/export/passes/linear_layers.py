"""Gemm and MatMul with a constant matrix -> `MatMul(x, Transpose(W)) (+ bias)`, with W [N, K] as in `nn.Linear`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common
from onnx_ir.tape import Tape

from edgeformer.export.passes.edit import constant, infer_shapes, initializer, integers, nodes, producer, replace
from edgeformer.export.passes.reshape import same_dims


@dataclass(frozen=True)
class LinearLayer:
    """One linear layer of a graph: `MatMul(x, Transpose(weight))`."""

    node: ir.Node  # the MatMul
    x: ir.Value  # [..., K]
    weight: ir.Value  # initializer [N, K]

    @property
    def inputs(self) -> int:
        """K."""
        return int(self.weight.shape[1])  # type: ignore[index, arg-type]


def linear_layers(model: ir.Model) -> Iterator[LinearLayer]:
    """The linear layers with a float32 weight, in order."""
    for node in nodes(model, "MatMul"):
        transpose = producer(node.inputs[1], "Transpose")
        weight = transpose.inputs[0] if transpose is not None else None
        if weight is not None and node.inputs[0] is not None and _is_matrix(weight):
            yield LinearLayer(node, node.inputs[0], weight)


def canonical_linear_layers(model: ir.Model) -> set[str]:
    """`Gemm(x, W, b)`, `MatMul(x, W)` -> `MatMul(x, Transpose(W)) + b`; returns the weights that were transposed.

    A Gemm comes from a two-dimensional call, or from a layer that stores [K, N]. The Reshapes that flatten its leading
    axes and restore them are removed too.
    """
    transposed: dict[str, ir.Value] = {}
    for node in nodes(model, "Gemm", "MatMul"):
        weight = node.inputs[1]
        if node.op_type == "MatMul" and weight is not None and _is_matrix(weight):
            tape = Tape()
            new = _matmul(tape, node.inputs[0], _as_rows(model, weight, transposed))
            replace(model, node, tape, new)
        elif node.op_type == "Gemm" and weight is not None and _is_matrix(weight) and _is_plain(node):
            rows = weight if integers(node, "transB") else _as_rows(model, weight, transposed)
            _replace_gemm(model, node, rows)
    common.RemoveUnusedNodesPass()(model)
    infer_shapes(model)
    return set(transposed)


def _is_matrix(value: ir.Value) -> bool:
    float32 = value.type is not None and value.dtype == ir.DataType.FLOAT
    return value.is_initializer() and float32 and value.shape is not None and len(value.shape) == 2


def _is_plain(gemm: ir.Node) -> bool:
    scaled = any(gemm.attributes[a].value != 1.0 for a in ("alpha", "beta") if a in gemm.attributes)
    return not scaled and not integers(gemm, "transA")


def _as_rows(model: ir.Model, weight: ir.Value, transposed: dict[str, ir.Value]) -> ir.Value:
    """An initializer [N, K] under the name of the [K, N] `weight`."""
    name = weight.name
    assert name is not None
    if name not in transposed:
        matrix, shape = weight.const_value, weight.shape
        assert matrix is not None and shape is not None
        others = len(weight.uses()) > 1
        if not others:
            weight.name = f"{name}.columns"  # unused now; removed with the dead nodes
        # Transposed at each read: memory never has a second copy of all weights.
        rows = ir.LazyTensor(
            lambda: ir.Tensor(np.ascontiguousarray(matrix.numpy().T)), ir.DataType.FLOAT, ir.Shape(shape[::-1])
        )
        transposed[name] = initializer(model, f"{name}.rows" if others else name, rows)
    return transposed[name]


def _matmul(tape: Tape, x: ir.Value | None, weight: ir.Value) -> ir.Value:
    return tape.op("MatMul", [x, tape.op("Transpose", [weight], {"perm": [1, 0]})])


def _replace_gemm(model: ir.Model, gemm: ir.Node, weight: ir.Value) -> None:
    x, bias = gemm.inputs[0], gemm.inputs[2] if len(gemm.inputs) > 2 else None
    last, flat = gemm, producer(x, "Reshape")
    uses = tuple(gemm.outputs[0].uses())
    back = uses[0].node if len(uses) == 1 and uses[0].node.op_type == "Reshape" else None
    tape = Tape()
    if flat is not None and back is not None and (rows := _rows(model, tape, flat.inputs[0], back.outputs[0])):
        x, last = rows, back
    y = _matmul(tape, x, weight)
    if bias is not None:
        y = tape.op("Add", [y, bias])
    replace(model, last, tape, y)


def _rows(model: ir.Model, tape: Tape, before: ir.Value | None, after: ir.Value) -> ir.Value | None:
    """`before` with its inner axes joined to K, if its leading axes are those of `after`; else None."""
    if before is None or before.shape is None or after.shape is None:
        return None
    lead = len(after.shape) - 1
    if not same_dims(ir.Shape(before.shape[:lead]), ir.Shape(after.shape[:lead])):
        return None
    if len(before.shape) == lead + 1:
        return before
    inner = before.shape[lead:]  # for example heads and head size
    if not all(isinstance(dim, int) for dim in inner):
        return None
    joined = int(np.prod([int(dim) for dim in inner]))  # type: ignore[arg-type]
    shape = constant(model, f"join_{lead}_{joined}", np.array([0] * lead + [joined], np.int64))
    return tape.op("Reshape", [before, shape])
