"""Passes that make a graph small and uniform, so that patterns have few forms.

`normalize` replaces families of operators by one: View (Reshape, Squeeze, Unsqueeze, Flatten, Identity: the same
numbers in the same order under another shape), Slice with its bounds as attributes (Split too), Sizes (integers
computed from sizes), Fill, Range, Unary, Pointwise, and Reduce with axes as attributes.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from edgeformer.engines.native.ir.dims import INT64_MAX, Size
from edgeformer.engines.native.ir.functions import POINTWISE_OPS, UNARY_OPS
from edgeformer.engines.native.ir.graph import COMPUTE_DTYPES, Constant, Graph, Info, Node
from edgeformer.engines.native.ir.infer import infer, reduce_axes
from edgeformer.engines.native.ir.shape_rules import broadcast, pad_amounts, slice_bounds, split_sizes
from edgeformer.engines.native.passes import einsum

REDUCE = ("Mean", "Sum", "Max", "Min", "Prod", "L1", "L2", "SumSquare")
FOLD_LIMIT = 1 << 22  # elements: larger constants are weights, which are packed later


def normalize(g: Graph) -> list[Node]:
    """Reshape, Split, ReduceMean, Sqrt, ... -> View, Slice, Reduce, Unary, ...; returns the unsupported nodes."""
    unsupported = infer(g)
    if unsupported:
        return unsupported
    for node in list(g.nodes):
        _normalize_node(g, node)
    g.finish()
    return []


def _normalize_node(g: Graph, node: Node) -> None:
    out = g.info[node.outputs[0]]
    if out.value is not None and node.op != "Sizes" and len(node.outputs) == 1:
        _become(node, "Sizes", [], sizes=out.value)
    elif node.op in ("Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity", "Dropout"):
        _become(node, "View", node.inputs[:1])
        del node.outputs[1:]
    elif node.op in ("Cast", "CastLike") and g.info[node.inputs[0]].dtype == out.dtype:
        _become(node, "View", node.inputs[:1])
    elif node.op in ("Cast", "CastLike"):
        _become(node, "Cast", node.inputs[:1], to=out.dtype)
    elif node.op == "Expand":
        _become(node, "View" if g.shape(node.inputs[0]) == out.shape else "Expand", node.inputs[:1])
    elif node.op == "Slice":
        starts, ends, axes, steps = slice_bounds(g, node)
        _become(node, "Slice", node.inputs[:1], starts=starts, ends=ends, axes=axes, steps=steps)
    elif node.op == "Split":
        _split(g, node)
    elif node.op == "Gather" and _is_pick(g, node):
        _pick(g, node, int(g.info[node.inputs[1]].value[0]), node.attrs.get("axis", 0))  # type: ignore[index, arg-type]
    elif node.op == "GatherND" and (index := g.scalar(node.inputs[1])) is not None and not node.attrs.get("batch_dims"):
        _pick(g, node, int(index), 0)
    elif node.op == "ConstantOfShape":
        fill = node.attrs.get("value")
        _become(node, "Fill", [], value=float(fill.array().reshape(-1)[0]) if fill is not None else 0.0)
    elif node.op == "Range":
        _range(g, node)
    elif node.op == "Resize" and g.shape(node.inputs[0]) == out.shape:
        if node.attrs.get("coordinate_transformation_mode") != "tf_crop_and_resize":
            _become(node, "View", node.inputs[:1])  # to the size it already has
    elif node.op == "Tile":
        _become(node, "Tile", node.inputs[:1])
    elif node.op == "Pad":
        amounts, axes = pad_amounts(g, node)
        fill = g.scalar(node.input(2)) if node.input(2) else 0.0
        mode = node.attrs.get("mode", "constant")
        _become(node, "Pad", node.inputs[:1], pads=amounts, axes=axes, value=fill, mode=mode)
    elif node.op.removeprefix("Reduce") in REDUCE and node.op.startswith("Reduce"):
        _become(node, "Reduce", node.inputs[:1], fn=node.op[6:].lower(), axes=reduce_axes(g, node))
    elif node.op in UNARY_OPS:
        _become(node, "Unary", node.inputs[:1], fn=UNARY_OPS[node.op])
    elif node.op == "Gelu":
        tanh = node.attrs.get("approximate", "none") == "tanh"
        _become(node, "Unary", node.inputs[:1], fn="gelu_tanh" if tanh else "gelu")
    elif node.op == "Swish" and node.attrs.get("alpha", 1.0) == 1.0:
        _become(node, "Unary", node.inputs[:1], fn="silu")
    elif node.op in POINTWISE_OPS:
        fn, numbers = POINTWISE_OPS[node.op]
        pair = [float(node.attrs.get(key, default)) for key, default in numbers]
        _become(node, "Pointwise", node.inputs[:1], fn=fn, numbers=(*pair, 0.0, 0.0)[:2])
    elif node.op == "PRelu":
        _prelu(g, node)
    elif node.op == "Einsum":
        einsum.products(g, node)
    elif node.op == "MatMul" and any(len(g.shape(i)) == 1 for i in node.inputs):
        _matrix_of_vector(g, node)


def _become(node: Node, op: str, inputs: list[str], **attrs: Any) -> None:
    node.op, node.inputs, node.attrs = op, list(inputs), attrs


def _prelu(g: Graph, node: Node) -> None:
    """PRelu(x, slope) -> max(x, 0) + slope * min(x, 0)"""
    x, slope = node.inputs
    info, zero = g.info[node.outputs[0]], g.add_constant("zero", np.zeros((), np.float32))
    falling = g.emit("Mul", [slope, g.emit("Min", [x, zero], g.info[x], x)], info, x)
    _become(node, "Add", [g.emit("Max", [x, zero], g.info[x], x), falling])


def _matrix_of_vector(g: Graph, node: Node) -> None:
    """MatMul with a vector -> MatMul with a matrix of one row (on the left) or one column (on the right)."""
    a, b = node.inputs
    if len(g.shape(a)) == 1:
        a = g.emit("View", [a], Info("float32", (1, *g.shape(a))), a)
    if len(g.shape(b)) == 1:
        b = g.emit("View", [b], Info("float32", (*g.shape(b), 1)), b)
    shape = (*broadcast(g.shape(a)[:-2], g.shape(b)[:-2]), g.shape(a)[-2], g.shape(b)[-1])
    _become(node, "View", [g.emit("MatMul", [a, b], Info("float32", shape), node.outputs[0])])


def _split(g: Graph, node: Node) -> None:
    x = node.inputs[0]
    axis = node.attrs.get("axis", 0) % len(g.shape(x))
    start = 0
    for name, size in zip(node.outputs, split_sizes(g, node), strict=True):
        attrs: dict[str, Any] = {"starts": (start,), "ends": (start + size,), "axes": (axis,), "steps": (1,)}
        g.nodes.append(Node("Slice", [x], [name], attrs))
        start += size
    g.nodes.remove(node)


def _is_pick(g: Graph, node: Node) -> bool:
    index = g.info[node.inputs[1]]
    return index.shape == () and index.value is not None and isinstance(index.value[0], int)


def _pick(g: Graph, node: Node, index: int, axis: int) -> None:
    """Gather of one constant index -> a Slice of length 1 and a View without its axis."""
    x = node.inputs[0]
    shape = g.shape(x)
    axis %= len(shape)
    end = INT64_MAX if index == -1 else index + 1
    info = Info(g.info[x].dtype, (*shape[:axis], 1, *shape[axis + 1 :]))
    attrs: dict[str, Any] = {"starts": (index,), "ends": (end,), "axes": (axis,), "steps": (1,)}
    cut = g.emit("Slice", [x], info, node.outputs[0], **attrs)
    _become(node, "View", [cut])


def _range(g: Graph, node: Node) -> None:
    if g.info[node.outputs[0]].dtype == "int64":
        (start,), (step,) = (g.info[i].value or (0,) for i in (node.inputs[0], node.inputs[2]))
        _become(node, "Range", [], start=start, step=step)


def common_subexpressions(g: Graph) -> None:
    """Nodes with the same operator, inputs and attributes -> one node; equal small constants -> one constant."""
    _share_constants(g)
    seen: dict[tuple[Any, ...], Node] = {}
    for node in list(g.nodes):
        if len(node.outputs) != 1 or node.outputs[0] in g.outputs:
            continue
        shape = g.shape(node.outputs[0])
        attrs = tuple(sorted((k, _hashable(v)) for k, v in node.attrs.items()))
        key = (node.op, tuple(node.inputs), attrs, shape, g.info[node.outputs[0]].dtype)
        first = seen.setdefault(key, node)
        if first is not node:
            g.rewire(node.outputs[0], first.outputs[0])
    g.finish()


def _share_constants(g: Graph) -> None:
    first: dict[tuple[Any, ...], str] = {}
    names: dict[str, str] = {}
    for name, c in g.constants.items():
        if c.data.nbytes <= 4096:
            key = (c.dtype, c.shape, c.data.tobytes())
            names[name] = first.setdefault(key, name)
    for node in g.nodes:
        node.inputs = [names.get(i, i) for i in node.inputs]
    g.index()


def _hashable(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(value)
    return id(value) if isinstance(value, Constant) else value


def views(g: Graph) -> None:
    """View(View(x)) -> View(x); View(x) of the same shape -> x."""
    for node in list(g.nodes):
        if node.op != "View":
            continue
        while (inner := g.producer(node.inputs[0], "View")) is not None:
            g.users[node.inputs[0]].remove(node)
            node.inputs = inner.inputs[:]
            g.users.setdefault(node.inputs[0], []).append(node)
        name = node.outputs[0]
        if g.shape(node.inputs[0]) == g.shape(name) and name not in g.outputs:
            g.rewire(name, node.inputs[0])
    g.finish()


def transposes(g: Graph) -> None:
    """f(Transpose(x)) -> Transpose(f(x)) where f works on the last axis only; Transpose(Transpose(x)) -> Transpose(x).

    So they cancel where two meet. A Transpose that only moves axes of size 1 becomes a View.
    """
    changed = True
    while changed:
        changed = False
        for node in list(g.nodes):
            changed = _sink(g, node) or changed
        if changed:
            g.finish()
            views(g)


def _sink(g: Graph, node: Node) -> bool:
    if node.op == "Transpose":
        perm = _perm(g, node)
        source = g.shape(node.inputs[0])
        moved = [p for p in perm if source[p] != 1]
        if moved == sorted(moved):
            node.op, node.attrs = "View", {}
            return True
        inner = g.producer(node.inputs[0], "Transpose")
        if inner is not None:
            node.inputs, node.attrs = inner.inputs[:], {"perm": [_perm(g, inner)[p] for p in perm]}
            return True
        return False
    if node.op == "View":
        return _swap_view(g, node)
    movable = node.op in ("Unary", "Norm", "Slice", "Concat") or (node.op in ("Mul", "Add", "Div", "Sub"))
    if not movable or len(node.outputs) != 1:
        return False
    tensors = [i for i in node.inputs if i and not _is_along_last_axis(g, i)]
    inners = [g.producer(i, "Transpose") for i in tensors]
    first = inners[0] if inners else None
    if first is None or any(n is None or _perm(g, n) != _perm(g, first) for n in inners):
        return False
    perm = _perm(g, first)
    rank = len(perm)
    if len(g.shape(node.outputs[0])) != rank or (perm[-1] != rank - 1 and node.op != "Slice"):
        return False
    if node.op == "Concat" and node.attrs["axis"] % rank != rank - 1:
        return False
    name = node.outputs[0]
    shape: list[Size] = [1] * rank
    for i, p in enumerate(perm):
        shape[p] = g.shape(name)[i]
    sources = {i: n.inputs[0] for i, n in zip(tensors, inners, strict=True) if n is not None}
    moved_name = g.emit(node.op, [sources.get(i, i) for i in node.inputs], Info("float32", tuple(shape)), name)
    moved_node = g.producers[moved_name]
    moved_node.attrs = dict(node.attrs)
    if node.op == "Slice":
        moved_node.attrs["axes"] = tuple(perm[a] for a in node.attrs["axes"])
    node.op, node.inputs, node.attrs = "Transpose", [moved_name], {"perm": perm}
    g.users[moved_name] = [node]
    return True


def _swap_view(g: Graph, node: Node) -> bool:
    """View(Transpose(x)) that only adds or drops axes of size 1 becomes Transpose(View(x))."""
    inner = g.producer(node.inputs[0], "Transpose")
    target = g.shape(node.outputs[0])
    if inner is None or [d for d in target if d != 1] != [d for d in g.shape(node.inputs[0]) if d != 1]:
        return False
    source, perm = g.shape(inner.inputs[0]), _perm(g, inner)
    kept = [i for i, d in enumerate(source) if d != 1]  # axes of x that matter, in x's order
    order = [p for p in perm if source[p] != 1]  # the same, as the result has them
    small = tuple(source[i] for i in kept)
    view = g.emit("View", inner.inputs[:], Info(g.info[node.inputs[0]].dtype, small), node.outputs[0])
    if target == tuple(source[i] for i in order):
        node.op, node.inputs, node.attrs = "Transpose", [view], {"perm": [kept.index(i) for i in order]}
        return True
    # Ones stay in the result: give x's view the same ones, at the end, and let the Transpose place them.
    ones = len(target) - len(kept)
    g.info[view].shape = small + (1,) * ones
    places, spare, rest = [], iter(range(len(kept), len(target))), iter(order)
    for d in target:
        places.append(next(spare) if d == 1 else kept.index(next(rest)))
    node.op, node.inputs, node.attrs = "Transpose", [view], {"perm": places}
    return True


def _is_along_last_axis(g: Graph, name: str) -> bool:
    """Whether `name` is a constant along the last axis only, which a Transpose of the other axes does not change."""
    c = g.constants.get(name)
    return c is not None and (c.size == 1 or all(d == 1 for d in c.shape[:-1]))


def _perm(g: Graph, node: Node) -> list[int]:
    return list(node.attrs.get("perm") or range(len(g.shape(node.inputs[0])))[::-1])


def fold_constants(g: Graph) -> None:
    """Nodes that depend on constants only -> constants, computed by numpy; of at most FOLD_LIMIT elements."""
    for node in g.nodes:
        if len(node.outputs) != 1 or node.outputs[0] in g.outputs:
            continue
        info = g.info[node.outputs[0]]
        if node.op == "Sizes":
            if all(isinstance(s, int) for s in node.attrs["sizes"]):
                _store(g, node, np.array(node.attrs["sizes"], np.int64).reshape(info.shape))
            continue
        if any(i and i not in g.constants for i in node.inputs) or not all(isinstance(d, int) for d in info.shape):
            continue
        if int(np.prod(info.shape, dtype=np.int64)) > FOLD_LIMIT:  # type: ignore[arg-type]
            continue
        result = _numpy(g, node)
        if result is not None:
            _store(g, node, result)
    g.nodes = [n for n in g.nodes if n.outputs[0] not in g.constants]
    g.finish()


def _store(g: Graph, node: Node, array: np.ndarray[Any, Any]) -> None:
    info = g.info[node.outputs[0]]
    data = np.ascontiguousarray(array.astype(info.dtype)).reshape(info.shape)  # type: ignore[arg-type]
    g.constants[node.outputs[0]] = Constant(info.dtype, data.shape, data)


def _numpy(g: Graph, node: Node) -> np.ndarray[Any, Any] | None:
    """The node's result by numpy; None for an operator that is not folded."""
    info, a = g.info[node.outputs[0]], node.attrs
    x = [_plain(g.constants[i]) for i in node.inputs if i]
    shape = info.shape
    with np.errstate(all="ignore"):
        if node.op == "View":
            return x[0].reshape(shape)
        if node.op == "Expand":
            return np.broadcast_to(x[0], shape)  # type: ignore[arg-type]
        if node.op == "Transpose":
            return x[0].transpose(_perm(g, node))
        if node.op == "Cast":
            return x[0].astype(a["to"])
        if node.op == "Fill":
            return np.full(shape, a["value"])
        if node.op == "Range" and not node.inputs:
            return a["start"] + a["step"] * np.arange(shape[0])  # type: ignore[no-any-return, arg-type]
        if node.op == "Range":
            return np.arange(*(v.item() for v in x), dtype=info.dtype)
        if node.op == "Slice" and all(isinstance(v, int) for v in (*a["starts"], *a["ends"])):
            cut = [slice(None)] * x[0].ndim
            for s, e, axis, step in zip(a["starts"], a["ends"], a["axes"], a["steps"], strict=True):
                cut[axis] = slice(s, None if step < 0 and e < -(INT64_MAX // 2) else e, step)
            return x[0][tuple(cut)]
        if node.op == "Concat":
            return np.concatenate(x, a["axis"])
        if node.op == "Gather":
            return np.take(x[0], x[1], a.get("axis", 0))
        if node.op == "Where":
            return np.where(*x)
        if node.op == "Unary":
            f = {"sqrt": np.sqrt, "exp": np.exp, "log": np.log, "sin": np.sin, "cos": np.cos, "neg": np.negative,
                 "tanh": np.tanh, "abs": np.abs, "reciprocal": np.reciprocal}.get(a["fn"])  # fmt: skip
            return f(x[0]) if f is not None else None
        if node.op == "Pointwise":
            whole = {"floor": np.floor, "ceil": np.ceil, "round": np.rint, "sign": np.sign}.get(a["fn"])
            return whole(x[0]) if whole is not None else None
        if node.op == "Div" and info.dtype == "int64":
            return x[0] // x[1]  # type: ignore[no-any-return]
        f2 = {"Add": np.add, "Sub": np.subtract, "Mul": np.multiply, "Div": np.divide, "Pow": np.power,
              "Equal": np.equal, "Less": np.less, "Greater": np.greater, "And": np.logical_and, "Or": np.logical_or,
              "LessOrEqual": np.less_equal, "GreaterOrEqual": np.greater_equal, "Min": np.minimum,
              "Max": np.maximum}.get(node.op)  # fmt: skip
        if f2 is not None and len(x) == 2:
            return f2(x[0], x[1])  # type: ignore[no-any-return]
        return ~x[0] if node.op == "Not" else None


def _plain(c: Constant) -> np.ndarray[Any, Any]:
    dtype = COMPUTE_DTYPES.get(c.dtype)
    return c.array().astype(dtype) if dtype else c.array()
