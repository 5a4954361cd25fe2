"""`x[mask] = f(y[mask])`, traced as NonZero, GatherND and ScatterND -> `Where(mask, f(y), x)`.

Tensors whose sizes depend on values are slow or unsupported in engines. Where f computes each selected element (or row)
independently, f of all elements and a Where give the same numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common
from onnx_ir.tape import Tape

from edgeformer.export.passes.edit import array, constant, integers, nodes, producer, replace

_VIEWS = ("Squeeze", "Unsqueeze", "Reshape", "Expand", "Identity", "Transpose")
_ELEMENTWISE = (
    "Add", "Sub", "Mul", "Div", "Pow", "Neg", "Abs", "Exp", "Sqrt", "Erf", "Tanh", "Sigmoid", "Relu", "Gelu",
    "Softplus", "Cast", "Identity", "Reciprocal",
)  # fmt: skip


@dataclass
class _Dense:
    """Rebuilds f on all elements: the axes of the mask replace the one axis of the selected elements."""

    mask: ir.Value
    axes: int  # of the mask
    tape: Tape

    def value(self, selected: ir.Value | None) -> ir.Value | None:
        """`selected` computed for all elements; None if an operator mixes the selected elements."""
        node = None if selected is None else selected.producer()
        if selected is None or node is None or node.domain != "" or selected.shape is None:
            return None
        rest = list(selected.shape)[1:]
        if node.op_type == "GatherND":
            data = node.inputs[0]
            same = integers(node, "batch_dims") == 0 and _selects(node.inputs[1]) is self.mask
            fits = data is not None and data.shape is not None and len(data.shape) == self.axes + len(rest)
            return data if same and fits else None
        if node.op_type in _ELEMENTWISE:
            inputs = [self._operand(value, len(rest)) for value in node.inputs]
        elif node.op_type == "MatMul":  # with a matrix on the right, rows are independent
            weight = _fixed_rank(node.inputs[1])
            inputs = [self.value(node.inputs[0]) if rest and weight == 2 else None, node.inputs[1]]
        elif node.op_type in ("LayerNormalization", "RMSNormalization") and integers(node, "axis", -1) == -1 and rest:
            inputs = [self.value(node.inputs[0]), *node.inputs[1:]]
            if not all(value is None or _fixed_rank(value) is not None for value in node.inputs[1:]):
                return None
        else:
            return None
        if any(value is None for value in inputs):
            return None
        made = self.tape.op(node.op_type, inputs, dict(node.attributes))
        source = next(v for v in inputs if v is not None and _fixed_rank(v) is None)
        made.type = selected.type
        made.shape = None if source.shape is None else ir.Shape([*list(source.shape)[: self.axes], *rest])
        return made

    def _operand(self, value: ir.Value | None, rest: int) -> ir.Value | None:
        content = array(value)
        if content is not None and (content.size == 1 or content.ndim <= rest):
            return value
        return self.value(value)


def masked_assignments(model: ir.Model) -> None:
    """`ScatterND(x, NonZero(mask), f(GatherND(y, NonZero(mask))))` -> `Where(mask, f(y), x)`.

    f may also be a constant. An f that mixes the selected elements is left unchanged.
    """
    changed = False
    for node in nodes(model, "ScatterND"):
        base, indices, updates = node.inputs
        reduction = node.attributes.get("reduction")
        mask = _scattered(indices)
        if base is None or updates is None or mask is None or base.shape is None:
            continue
        if reduction is not None and reduction.as_string() != "none":
            continue
        tape = Tape()
        new = _without_sizes(updates)
        mask = _root(mask)
        if mask.shape is None:
            continue
        if new.shape is None or any(d != 1 for d in new.shape):
            dense = _Dense(mask, len(mask.shape), tape).value(new)
            if dense is None or dense.shape is None:
                continue
            new = dense
        if new.shape is None or len(new.shape) > len(base.shape):
            continue
        missing = list(range(len(mask.shape), len(base.shape)))
        if missing:
            axes = constant(model, "axes_" + "_".join(map(str, missing)), np.array(missing, np.int64))
            mask = tape.op("Unsqueeze", [mask, axes])
            mask.type = ir.TensorType(ir.DataType.BOOL)
        replace(model, node, tape, tape.op("Where", [mask, new, base]))
        changed = True
    if changed:
        common.RemoveUnusedNodesPass()(model)


def _scattered(indices: ir.Value | None) -> ir.Value | None:
    """The mask of `indices` [count, rank] = Transpose(NonZero(mask)); None if they are computed otherwise."""
    transpose = producer(indices, "Transpose")
    found = producer(transpose.inputs[0], "NonZero") if transpose is not None else None
    return None if found is None else found.inputs[0]


def _selects(indices: ir.Value | None) -> ir.Value | None:
    """The mask of a GatherND's indices; those of a one-dimensional mask may pass through views."""
    mask = _scattered(indices)
    if mask is not None:
        return mask
    node = None if indices is None else indices.producer()
    while node is not None and (node.op_type in _VIEWS or (node.op_type == "Max" and len(node.inputs) == 1)):
        node = None if node.inputs[0] is None else node.inputs[0].producer()
    if node is None or node.op_type != "NonZero" or node.inputs[0] is None or node.inputs[0].shape is None:
        return None
    return node.inputs[0] if len(node.inputs[0].shape) == 1 else None


def _root(mask: ir.Value) -> ir.Value:
    """The mask before it was expanded over more trailing axes."""
    expand = producer(mask, "Expand")
    value = mask if expand is None or expand.inputs[0] is None else expand.inputs[0]
    while (node := producer(value, "Unsqueeze")) is not None and node.inputs[0] is not None:
        axes, inner = array(node.inputs[1]), node.inputs[0]
        rank = None if inner.shape is None else len(inner.shape)
        if (
            axes is None
            or rank is None
            or sorted(a % (rank + axes.size) for a in axes) != list(range(rank, rank + axes.size))
        ):
            break
        value = inner
    if expand is None or value.shape is None:
        return value
    like = producer(expand.inputs[1], "Shape")  # the exporter expands to the shape of the tensor that is assigned to
    target = mask.shape if like is None or like.inputs[0] is None else like.inputs[0].shape
    return value if target is not None and list(value.shape) == list(target)[: len(value.shape)] else mask


def _without_sizes(value: ir.Value) -> ir.Value:
    """`value` before any Expand and Reshape to the number of selected elements."""
    while (node := producer(value, "Reshape", "Expand")) is not None and node.inputs[0] is not None:
        value = node.inputs[0]
    return value


def _fixed_rank(value: ir.Value | None) -> int | None:
    """The rank of a constant, transposed or not; None for a computed value."""
    transpose = producer(value, "Transpose")
    content = array(value if transpose is None else transpose.inputs[0])
    return None if content is None else content.ndim
