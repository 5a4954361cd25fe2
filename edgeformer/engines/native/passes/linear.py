"""Linear layers: a product with a constant matrix becomes one Linear node, a look-up in a table one Embed node.

The patterns are those of the bundle (see docs/native.md): a MatMul with DequantizeLinear of a transposed INT4 or INT8
weight, with the float minimum of q4a as a second small product on block sums; and plain float weights.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from edgeformer.bundle.signature import Array
from edgeformer.engines.native.ir.graph import Graph, Info, Node
from edgeformer.engines.native.ir.ops import LinearSpec
from edgeformer.engines.native.ir.weight import Weight


def linears(g: Graph) -> None:
    """MatMul(x, W^T) and Gemm(x, W, bias) with a constant W -> Linear(x) with a LinearSpec as attrs["linear"]."""
    for node in list(g.nodes):
        if node.op == "MatMul":
            _matmul(g, node)
        elif node.op == "Gemm":
            _gemm(g, node)
    g.finish()
    for node in list(g.nodes):
        if node.op == "Add":
            _affine(g, node)
    g.finish()


def _set_linear(node: Node, x: str, weight: Weight, bias: str = "") -> None:
    node.op, node.inputs, node.attrs = "Linear", [x], {"linear": LinearSpec(weight, bias)}


def _matmul(g: Graph, node: Node) -> None:
    x, w = node.inputs
    if x in g.constants and w not in g.constants:
        return
    weight = quantized_weight(g, w) or float_weight(g, w)
    if weight is not None and len(g.shape(x)) >= 2:
        _set_linear(node, x, weight)


def quantized_weight(g: Graph, name: str) -> Weight | None:
    """The weight behind DequantizeLinear(Transpose(Q), Transpose(S), axis=0), or None."""
    dq = g.producer(name, "DequantizeLinear")
    if dq is None or dq.input(2) or dq.attrs.get("axis", 1) != 0 or not dq.attrs.get("block_size"):
        return None
    q, s = _transposed_constant(g, dq.inputs[0]), _transposed_constant(g, dq.inputs[1])
    block = int(dq.attrs["block_size"])
    if q is None or s is None or g.constants[q].dtype not in ("int4", "int8"):
        return None
    n, k = g.constants[q].shape
    if g.constants[s].shape != (n, -(-k // block)):
        return None
    kind = "q4" if g.constants[q].dtype == "int4" else "q8x16" if block == 16 else "q8"
    if block % 32 and kind != "q8x16":
        return None
    return Weight(kind, q, n, k, block, s)


def _transposed_constant(g: Graph, name: str) -> str | None:
    t = g.producer(name, "Transpose")
    if t is None or list(t.attrs.get("perm") or [1, 0]) != [1, 0] or t.inputs[0] not in g.constants:
        return None
    return t.inputs[0] if len(g.constants[t.inputs[0]].shape) == 2 else None


def float_weight(g: Graph, name: str) -> Weight | None:
    """The weight in a constant [k, n], in a Transpose of one [n, k], or in a DequantizeLinear that is computed now."""
    source = _transposed_constant(g, name)
    if source is not None and g.constants[source].dtype in ("float32", "float16"):
        n, k = g.constants[source].shape
        return Weight("f32", source, n, k)
    dq = g.producer(name, "DequantizeLinear")
    if dq is not None:
        return _dequantized(g, dq)
    c = g.constants.get(name)
    if c is None or len(c.shape) != 2 or c.dtype not in ("float32", "float16"):
        return None
    return Weight("f32", name, c.shape[1], c.shape[0], transposed=True)


def _dequantized(g: Graph, dq: Node) -> Weight | None:
    """Any constant DequantizeLinear, computed now and kept as floats: correct, four to eight times as large."""
    arrays: list[Array | None] = []
    for name in dq.inputs:
        source = _transposed_constant(g, name)
        if name and source is None and name not in g.constants:
            return None
        arrays.append(g.constants[source].array().T if source else g.constants[name].array() if name else None)
    q, scale = arrays[0], arrays[1]
    if q is None or scale is None or q.ndim != 2:
        return None
    axis, block = dq.attrs.get("axis", 1) % 2, dq.attrs.get("block_size", 0)
    if block < 0:
        return None
    block = min(block, q.shape[axis])

    def spread(a: Array) -> Array:
        if block:
            return np.repeat(a, block, axis).take(range(q.shape[axis]), axis)
        return a.reshape([-1, 1] if axis == 0 and a.ndim else [1, -1] if a.ndim else [])

    zero = arrays[2] if len(arrays) > 2 else None
    values = q.astype(np.float32) - (spread(zero).astype(np.float32) if zero is not None else 0)
    name = g.add_constant(dq.outputs[0], values * spread(scale).astype(np.float32))
    return Weight("f32", name, q.shape[1], q.shape[0], transposed=True)


def _gemm(g: Graph, node: Node) -> None:
    x, w = node.inputs[:2]
    if node.attrs.get("transA") or node.attrs.get("alpha", 1.0) != 1.0 or node.attrs.get("beta", 1.0) != 1.0:
        return
    c = g.constants.get(w)
    weight: Weight | None
    if c is not None and node.attrs.get("transB") and c.dtype in ("float32", "float16"):
        weight = Weight("f32", w, c.shape[0], c.shape[1])
    else:
        weight = None if node.attrs.get("transB") else quantized_weight(g, w) or float_weight(g, w)
    bias = node.input(2)
    if weight is None or (bias and (bias not in g.constants or g.constants[bias].size != weight.n)):
        return
    _set_linear(node, x, weight, bias)


def _affine(g: Graph, node: Node) -> None:
    """q4a: Linear(x; Q, S) + Linear(block sums of x; M) is one product with w = s q + (M - 8 s), q in 0..15."""
    parts = [g.producer(i, "Linear") for i in node.inputs]
    for main, other, name in ((parts[0], parts[1], node.inputs[0]), (parts[1], parts[0], node.inputs[1])):
        if main is None or other is None or g.only_user(name) is not node:
            continue
        spec, minima = main.attrs["linear"], other.attrs["linear"]
        w, m = spec.weight, minima.weight
        if w.type != "q4" or m.type != "f32" or m.transposed or m.k != -(-w.k // w.block) or m.n != w.n:
            continue
        if minima.bias or _block_sums_of(g, other.inputs[0], w.block) != main.inputs[0]:
            continue
        weight = Weight("q4a", w.q, w.n, w.k, w.block, w.scale, m.q, selected=w.selected)
        _set_linear(node, main.inputs[0], weight, spec.bias)
        return


def _block_sums_of(g: Graph, name: str, block: int) -> str | None:
    """The value over blocks of whose last axis (padded with zeros where needed) `name` is the sums; else None."""
    total = g.producer(name, "Reduce")
    if total is None or total.attrs["fn"] != "sum":
        view = g.producer(name, "View")  # keepdims=1 and a Reshape
        total = g.producer(view.inputs[0], "Reduce") if view is not None else None
        if total is None or total.attrs["fn"] != "sum":
            return None
    blocks = g.producer(total.inputs[0], "View")
    shape = g.shape(total.inputs[0])
    if blocks is None or shape[-1] != block or total.attrs["axes"] != (len(shape) - 1,):
        return None
    x = blocks.inputs[0]
    pad = g.producer(x, "Pad")
    if pad is not None and pad.attrs["value"] == 0.0 and not any(pad.attrs["pads"][: len(pad.attrs["axes"])]):
        x = pad.inputs[0]
    elif pad is None and (cat := g.producer(x, "Concat")) is not None and len(cat.inputs) == 2:
        x = cat.inputs[0]  # zeros appended
    return x


def biases(g: Graph) -> None:
    """Add(Linear(x), b) with a constant vector b -> Linear(x) with a bias."""
    for node in list(g.nodes):
        if node.op != "Add":
            continue
        for x, b in (node.inputs, node.inputs[::-1]):
            linear, c = g.producer(x, "Linear"), g.constants.get(b)
            if linear is None or c is None or g.only_user(x) is not node or linear.attrs["linear"].bias:
                continue
            spec = linear.attrs["linear"]
            if c.size == spec.weight.n and c.shape[-1:] == (c.size,):
                linear.attrs["linear"] = replace(spec, bias=b)
                g.rewire(node.outputs[0], x)
                break
    g.finish()


def embeddings(g: Graph) -> None:
    """Gather(table, ids), perhaps dequantized and times a number -> Embed(ids); attrs: weight (a Weight), scale.

    A head that is tied to the table uses the same packed matrix.
    """
    for node in list(g.nodes):
        if node.op == "DequantizeLinear":
            _quantized_table(g, node)
    g.finish()
    for node in list(g.nodes):
        if node.op == "Gather" and node.attrs.get("axis", 0) == 0:
            name, ids = node.inputs
            table = g.constants.get(name)
            if table is None or len(table.shape) != 2 or ids in g.constants:
                continue
            if table.dtype not in ("float32", "float16"):
                continue
            weight = Weight("f32", name, table.shape[0], table.shape[1])
            node.op, node.inputs, node.attrs = "Embed", [ids], {"weight": weight, "scale": 1.0}
    g.finish()
    for node in list(g.nodes):
        if node.op != "Mul":
            continue
        for x, c in (node.inputs, node.inputs[::-1]):
            embed, factor = g.producer(x, "Embed"), g.scalar(c)
            if embed is not None and factor is not None and g.only_user(x) is node:
                embed.attrs["scale"] *= factor
                g.rewire(node.outputs[0], x)
                break
    g.finish()


def _quantized_table(g: Graph, node: Node) -> None:
    """DequantizeLinear(Gather(T, ids), Gather(S, ids)) over blocks of the last axis is an Embed."""
    rows, scales = (g.producer(i, "Gather") for i in node.inputs[:2])
    if rows is None or scales is None or node.input(2) or rows.inputs[1] != scales.inputs[1]:
        return
    q, s = rows.inputs[0], scales.inputs[0]
    if q not in g.constants or s not in g.constants or rows.attrs.get("axis", 0) or scales.attrs.get("axis", 0):
        return
    (n, k), block = g.constants[q].shape, int(node.attrs.get("block_size", 0))
    rank = len(g.shape(node.outputs[0]))
    fits = block == 16 or (block and block % 32 == 0)
    if node.attrs.get("axis", 1) % rank != rank - 1 or g.constants[q].dtype != "int8" or not fits:
        return
    weight = Weight("q8x16" if block == 16 else "q8", q, n, k, block, s)
    node.op, node.inputs, node.attrs = "Embed", [rows.inputs[1]], {"weight": weight, "scale": 1.0}


def splits(g: Graph) -> None:
    """Slice(Linear(x)), of the last axis -> Linear(x) of those rows of the weight: fused QKV, fused gate and up.

    Only where Slices alone read the Linear, directly or through a View.
    """
    for node in list(g.nodes):
        if node.op != "Linear" or node.outputs[0] in g.outputs:
            continue
        users: list[Node] = []
        for u in g.users.get(node.outputs[0], []):
            inner = g.users.get(u.outputs[0], []) if u.op == "View" and u.outputs[0] not in g.outputs else []
            users += inner if inner and all(i.op == "Slice" for i in inner) else [u]
        spec: LinearSpec = node.attrs["linear"]
        cuts = [_columns(g, u, spec.weight.n) for u in users]
        if not users or any(c is None for c in cuts):
            continue
        for user, runs in zip(users, cuts, strict=True):
            assert runs is not None
            weight, bias = spec.weight.part(runs), spec.bias
            if bias:
                vector = g.constants[bias].data.reshape(-1)
                bias = g.add_constant(bias, np.concatenate([vector[a:b] for a, b in runs]).astype(np.float32))
            info = Info("float32", (*g.shape(node.outputs[0])[:-1], weight.n))
            new = g.emit("Linear", node.inputs[:], info, user.outputs[0], linear=LinearSpec(weight, bias))
            _as_view(g, user, new)
    g.finish()


def _as_view(g: Graph, node: Node, source: str) -> None:
    for i in set(node.inputs):
        g.users[i] = [u for u in g.users.get(i, []) if u is not node]
    node.op, node.inputs, node.attrs = "View", [source], {}
    g.users.setdefault(source, []).append(node)


def _columns(g: Graph, user: Node, n: int) -> list[tuple[int, int]] | None:
    """The (start, stop) runs of a Linear's n columns that a Slice of it, or of a View of it, takes; None if unknown."""
    if user.op != "Slice" or len(user.attrs["axes"]) != 1 or user.attrs["steps"] != (1,):
        return None
    shape = g.shape(user.inputs[0])
    axis = user.attrs["axes"][0]
    tail = shape[axis:]
    bounds = (user.attrs["starts"][0], user.attrs["ends"][0])
    if not all(isinstance(d, int) for d in (*tail, *bounds)):
        return None
    size: int = tail[0]  # type: ignore[assignment]
    start, stop, _ = slice(*bounds).indices(size)
    inner = int(np.prod(tail[1:], dtype=np.int64))  # type: ignore[arg-type]
    if n % (size * inner) or _known_tail(shape[:axis]) < n // (size * inner):
        return None
    outer = n // (size * inner)
    return [((o * size + start) * inner, (o * size + stop) * inner) for o in range(outer)]


def _known_tail(shape: tuple[Any, ...]) -> int:
    """Product of the known sizes at the end of a shape."""
    known = 1
    for d in reversed(shape):
        if not isinstance(d, int):
            break
        known *= d
    return known
