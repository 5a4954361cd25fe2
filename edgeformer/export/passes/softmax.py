"""`MatMul(Softmax(scale * MatMul(q, Transpose(k)) + mask), v)` -> `Attention(q, k, v, mask)`.

Between the first MatMul and the Softmax the pass accepts Mul and Div by a constant, Add of masks or biases,
`Where(seen, scores, -inf)`, and views that split or join batch and heads.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common
from onnx_ir.tape import Tape

from edgeformer.export.passes.edit import array, constant, integers, nodes, producer, replace
from edgeformer.export.passes.reshape import same_dims

_HIDDEN = -1e4  # at or below this a mask hides the key; models write -1e4, the smallest float or -inf


@dataclass
class _Scores:
    """scale * product + sum of `added`; a key is seen where all of `seen` are true and none of `hidden`."""

    product: ir.Node  # MatMul(q, Transpose(k))
    scale: float = 1.0
    added: list[ir.Value] = field(default_factory=list)
    seen: list[ir.Value] = field(default_factory=list)
    hidden: list[ir.Value] = field(default_factory=list)


def fuse_softmax(model: ir.Model) -> int:
    """Fuses every decomposed attention; returns how many."""
    count = 0
    for node in nodes(model, "Softmax"):
        rank = None if node.outputs[0].shape is None else len(node.outputs[0].shape)
        if rank is None or integers(node, "axis", -1) not in (-1, rank - 1):
            continue
        product = _value_product(node.outputs[0])
        scores = None if product is None else _scores(node.inputs[0])
        if product is not None and scores is not None:
            count += _fuse(model, scores, product)
    if count:
        common.RemoveUnusedNodesPass()(model)
    return count


def _value_product(weights: ir.Value) -> ir.Node | None:
    """The MatMul of the softmax's output and v; None if the softmax has another use."""
    uses = tuple(weights.uses())
    if len(uses) != 1 or weights.is_graph_output():
        return None
    node, index = uses[0].node, uses[0].idx
    if node.op_type == "MatMul" and index == 0:
        return node
    view = node.op_type == "Reshape" and index == 0 and _same_matrix(weights, node.outputs[0])
    if view or node.op_type in ("Cast", "Identity", "Dropout"):
        return _value_product(node.outputs[0])
    return None


def _scores(value: ir.Value | None, factor: float = 1.0) -> _Scores | None:
    """The scores that `value` is, searched back to the MatMul; `factor` is the product of the scales passed so far."""
    node = None if value is None else value.producer()
    if node is None or value is None or len(value.uses()) != 1:
        return None
    first, second = node.inputs[0], node.inputs[1] if len(node.inputs) > 1 else None
    if node.op_type == "MatMul" and node.domain == "":
        return _Scores(node, factor)
    if node.op_type in ("Cast", "Identity"):
        return _scores(first, factor)
    if node.op_type in ("Reshape", "Unsqueeze", "Squeeze") and first is not None and _same_matrix(first, value):
        return _scores(first, factor)
    if node.op_type in ("Mul", "Div"):
        for number, rest in ((second, first), (first, second)):
            content = array(number)
            if content is not None and content.size == 1 and not (node.op_type == "Div" and number is first):
                c = float(content.reshape(()))
                return _scores(rest, factor * c if node.op_type == "Mul" else factor / c)
        return None
    if node.op_type == "Add" and factor == 1.0:
        for rest, bias in ((first, second), (second, first)):
            found = _scores(rest)
            if found is not None and bias is not None:
                found.added.append(bias)
                return found
        return None
    if node.op_type == "Where" and first is not None:
        for rest, number, conditions in ((second, node.inputs[2], "seen"), (node.inputs[2], second, "hidden")):
            content = array(number)
            if content is not None and content.size == 1 and float(content.reshape(())) <= _HIDDEN:
                found = _scores(rest, factor)
                if found is not None:
                    getattr(found, conditions).append(first)
                return found
    return None


def _fuse(model: ir.Model, scores: _Scores, product: ir.Node) -> bool:
    """Replaces `product`, the MatMul with v, by an Attention; False where the head counts are not known."""
    tape = Tape()
    q = _split_heads(model, tape, scores.product.inputs[0])
    transposed = _split_heads(model, tape, scores.product.inputs[1])
    v = _split_heads(model, tape, product.inputs[1])
    if q is None or transposed is None or v is None:
        return False
    k = _transpose(tape, transposed)
    heads = [value.shape[1] if value.shape is not None else None for value in (q, k, v)]
    if heads[1] != heads[2] or not isinstance(heads[0], int) or not isinstance(heads[1], int) or heads[0] % heads[1]:
        return False
    joined = len(scores.product.outputs[0].shape or ()) == 3 and scores.product.inputs[0] is not q
    mask = _mask(model, tape, scores, q, k, heads[0] if joined else None)
    y = tape.op("Attention", [q, k, v] if mask is None else [q, k, v, mask], {"is_causal": 0, "scale": scores.scale})
    y.type = product.outputs[0].type
    assert q.shape is not None and v.shape is not None
    y.shape = ir.Shape([*q.shape[:3], v.shape[3]])
    if len(product.outputs[0].shape or ()) == 3:  # [batch * heads, sequence, size] before
        tail = tape.op("Shape", [y], {"start": 2})
        size = tape.op("Concat", [constant(model, "any", np.array([-1], np.int64)), tail], {"axis": 0})
        y = tape.op("Reshape", [y, size])
    replace(model, product, tape, y)
    return True


def _split_heads(model: ir.Model, tape: Tape, value: ir.Value | None) -> ir.Value | None:
    """`value` as [batch, heads, rows, columns], undoing a view to [batch * heads, rows, columns]; else None."""
    if value is None or value.shape is None:
        return None
    if len(value.shape) == 4:
        return value
    if len(value.shape) != 3:
        return None
    if (view := producer(value, "Reshape")) is not None:
        source = view.inputs[0]
        if source is not None and source.shape is not None and len(source.shape) == 4 and _same_matrix(source, value):
            return source
        return None
    transpose = producer(value, "Transpose")
    if transpose is not None and list(transpose.attributes["perm"].value) == [0, 2, 1]:
        inner = _split_heads(model, tape, transpose.inputs[0])
        return None if inner is None else _transpose(tape, inner)
    scaled = producer(value, "Mul", "Div")
    if scaled is not None and (content := array(scaled.inputs[1])) is not None and content.size == 1:
        inner = _split_heads(model, tape, scaled.inputs[0])
        if inner is None:
            return None
        result = tape.op(scaled.op_type, [inner, scaled.inputs[1]])
        result.shape, result.type = inner.shape, inner.type
        return result
    if isinstance(value.shape[0], int) or str(value.shape[0]) != "batch":
        return None
    single = tape.op("Unsqueeze", [value, constant(model, "axis_1", np.array([1], np.int64))])  # one head
    single.shape, single.type = ir.Shape([value.shape[0], 1, *value.shape[1:]]), value.type
    return single


def _transpose(tape: Tape, value: ir.Value) -> ir.Value:
    """`value` with its last two axes swapped; joined with a Transpose that computes it."""
    made = producer(value, "Transpose")
    perm, source = [0, 1, 3, 2], value
    if made is not None and made.inputs[0] is not None:
        before = list(made.attributes["perm"].value)
        perm, source = [before[i] for i in perm], made.inputs[0]
    if perm == [0, 1, 2, 3]:
        return source
    transposed = tape.op("Transpose", [source], {"perm": perm})
    assert value.shape is not None
    transposed.shape, transposed.type = ir.Shape([*value.shape[:2], value.shape[3], value.shape[2]]), value.type
    return transposed


def _mask(model: ir.Model, tape: Tape, scores: _Scores, q: ir.Value, k: ir.Value, heads: int | None) -> ir.Value | None:
    """One mask [.., sequence, total] of all conditions and biases: bool without biases, else float; None for no mask.

    `heads` is given if the scores join batch and heads: [batch * heads, rows, columns].
    """
    conditions = [*scores.seen, *(_boolean(tape, "Not", value) for value in scores.hidden)]
    seen: ir.Value | None = None
    for condition in conditions:
        wide = _split(model, tape, condition, heads)
        seen = wide if seen is None else _boolean(tape, "And", seen, wide)
    total: ir.Value | None = None
    for bias in scores.added:
        wide = _split(model, tape, bias, heads)
        total = wide if total is None else _broadcast(tape.op("Add", [total, wide]), total.type, total, wide)
    if total is not None and seen is not None:
        low = constant(model, "hidden", np.array(np.finfo(np.float32).min))
        total = _broadcast(tape.op("Where", [seen, total, low]), total.type, seen, total)
    mask = seen if total is None else total
    if mask is None or _has_rows(mask, q):
        return mask
    # onnxruntime (1.25 to 1.32) does not broadcast a mask over the queries.
    lengths = [tape.op("Shape", [value], {"start": 2, "end": 3}) for value in (q, k)]
    size = tape.op("Concat", [constant(model, "ones_2", np.array([1, 1], np.int64)), *lengths], {"axis": 0})
    return tape.op("Expand", [mask, size])


def _has_rows(mask: ir.Value, q: ir.Value) -> bool:
    known = mask.shape is not None and len(mask.shape) >= 2 and q.shape is not None
    return known and str(mask.shape[-2]) == str(q.shape[2])  # type: ignore[index]


def _split(model: ir.Model, tape: Tape, value: ir.Value, heads: int | None) -> ir.Value:
    """A mask [batch * heads, rows, columns] reshaped to [batch, heads, rows, columns]; any other unchanged."""
    if heads is None or value.shape is None or len(value.shape) != 3 or value.shape[0] == 1:
        return value
    lead = constant(model, f"any_{heads}", np.array([-1, heads], np.int64))
    size = tape.op("Concat", [lead, tape.op("Shape", [value], {"start": 1})], {"axis": 0})
    wide = tape.op("Reshape", [value, size])
    wide.shape, wide.type = ir.Shape([None, heads, *value.shape[1:]]), value.type
    return wide


def _boolean(tape: Tape, op: str, *values: ir.Value) -> ir.Value:
    return _broadcast(tape.op(op, list(values)), ir.TensorType(ir.DataType.BOOL), *values)


def _broadcast(result: ir.Value, kind: ir.TypeProtocol | None, *values: ir.Value) -> ir.Value:
    """`result` with this type, and with the shape that `values` broadcast to if their shapes are known."""
    result.type = kind
    shapes: list[list[int | ir.SymbolicDim]] = [list(value.shape) for value in values if value.shape is not None]
    if len(shapes) == len(values):
        rank = max(map(len, shapes))
        wide: list[list[int | ir.SymbolicDim]] = [[*[1] * (rank - len(shape)), *shape] for shape in shapes]
        result.shape = ir.Shape([next((dim for dim in column if dim != 1), 1) for column in zip(*wide, strict=True)])
    return result


def _same_matrix(before: ir.Value, after: ir.Value) -> bool:
    """Whether a view keeps the last two axes."""
    if before.shape is None or after.shape is None or min(len(before.shape), len(after.shape)) < 2:
        return False
    return same_dims(ir.Shape(before.shape[-2:]), ir.Shape(after.shape[-2:]))
