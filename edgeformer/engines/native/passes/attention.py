"""Attention on rows: [batch, sequence, heads * head_dim], with rotation, head norms and cache append folded in."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from edgeformer.engines.native.ir.cache import Cache
from edgeformer.engines.native.ir.dims import Size
from edgeformer.engines.native.ir.graph import Graph, Info, Node
from edgeformer.engines.native.ir.ops import ATTEND_INPUTS, AttendSpec, HeadSteps


def decomposed_attention(g: Graph) -> None:
    """MatMul(Softmax(MatMul(q, k^T) * scale + mask), v) on [batch, heads, sequence, size] -> Attention."""
    for node in list(g.nodes):
        if node.op != "MatMul" or len(g.shape(node.outputs[0])) != 4:
            continue
        softmax = g.producer(node.inputs[0], "Softmax")
        if softmax is None or softmax.attrs.get("axis", -1) not in (-1, 3) or g.only_user(node.inputs[0]) is not node:
            continue
        scores, mask, scale = softmax.inputs[0], "", 1.0
        add = g.producer(scores, "Add")
        if add is not None:
            scaled = [i for i in add.inputs if g.producer(i, ("MatMul", "Mul", "Div")) is not None]
            products = [i for i in scaled if _scores(g, i) is not None]
            if len(products) != 1:
                continue
            scores, mask = products[0], next(i for i in add.inputs if i != products[0])
        found = _scores(g, scores)
        if found is None:
            continue
        q, k, scale = found
        v = node.inputs[1]
        (b, h, s, _), (kb, kh, t, _) = g.shape(q), g.shape(k)
        if g.shape(v)[:3] != (kb, kh, t) or kb != b or kh not in (h, 1) or g.shape(softmax.inputs[0]) != (b, h, s, t):
            continue
        node.op, node.inputs, node.attrs = "Attention", [q, k, v, mask], {"scale": scale}
    g.finish()


def _scores(g: Graph, name: str) -> tuple[str, str, float] | None:
    """(q, k, scale) when `name` is MatMul(q, k^T) times a constant."""
    node, scale = g.producers.get(name), 1.0
    if node is not None and node.op in ("Mul", "Div"):
        factor = g.scalar(node.inputs[1])
        if factor is None or not factor:
            return None
        scale = factor if node.op == "Mul" else 1.0 / factor
        node = g.producers.get(node.inputs[0])
    if node is None or node.op != "MatMul":
        return None
    transposed = g.producer(node.inputs[1], "Transpose")
    if transposed is None or transposed.attrs.get("perm") != [0, 1, 3, 2]:
        return None
    return node.inputs[0], transposed.inputs[0], scale


def joined_caches(g: Graph) -> None:
    """Attention(q, Concat(past_key, k), Concat(past_value, v)) -> Attention(q, k, v, "", past_key, past_value).

    Only where no other node reads the joined keys and values.
    """
    for node in list(g.nodes):
        if node.op != "Attention" or node.input(4):
            continue
        if node.attrs.get("is_causal", 0) != node.attrs.get("at_end", 0):
            continue  # its causal alignment is top-left, that of a cache bottom-right
        joins = [g.producer(i, "Concat") for i in node.inputs[1:3]]
        if any(j is None or len(j.inputs) != 2 or j.attrs["axis"] != 2 or j.inputs[0] not in g.inputs for j in joins):
            continue
        if any(g.users.get(j.outputs[0], []) != [node] or j.outputs[0] not in g.outputs for j in joins if j):
            continue
        node.inputs += [""] * (6 - len(node.inputs))
        for i, j in enumerate(joins, start=1):
            assert j is not None
            node.inputs[i], node.inputs[3 + i] = j.inputs[1], j.inputs[0]
            node.outputs.append(j.outputs[0])
            g.nodes.remove(j)
        g.index()


def attention_rows(g: Graph) -> None:
    """Attention -> Attend on rows between Transposes; Concat(past, new) with other readers -> History(new).

    Attend has the inputs ATTEND_INPUTS and an AttendSpec. Fills `g.caches`; their inputs and outputs leave the graph.
    """
    for node in list(g.nodes):
        if node.op == "Attention" and node.input(4) and any(g.users.get(o) for o in node.outputs[1:3]):
            _separate_join(g, node)
    for node in list(g.nodes):
        if node.op == "Attention":
            _attend(g, node)
        elif node.op == "Concat":
            _history(g, node)
    presents = {name for c in g.caches for name in (c.present_key, c.present_value)}
    g.outputs = [o for o in g.outputs if o not in presents]
    for c in g.caches:
        for name in (c.past_key, c.past_value):
            g.inputs.pop(name, None)
    g.finish()


def _separate_join(g: Graph, node: Node) -> None:
    """Give an Attention whose joined keys or values other nodes read too a Concat node for each."""
    past = g.shape(node.inputs[4])[2]
    for i in (1, 2):
        joined = Node("Concat", [node.inputs[3 + i], node.inputs[i]], [node.outputs[i]], {"axis": 2})
        b, h, s, d = g.shape(node.inputs[i])
        g.info[node.outputs[i]] = Info("float32", (b, h, s + past, d))
        g.nodes.append(joined)
        g.producers[node.outputs[i]] = joined
        g.users.setdefault(node.inputs[i], []).append(joined)
        node.inputs[i] = node.outputs[i]
    node.inputs[4:6] = ["", ""]
    node.attrs["at_end"] = 1  # bottom-right causal alignment, as with a cache
    del node.outputs[1:]
    g.index()


def _history(g: Graph, node: Node) -> None:
    """Concat(past, new) on the sequence axis becomes History(new): appends to a cache and reads all of it."""
    past, new = node.inputs[0], node.inputs[-1]
    if past not in g.inputs or node.outputs[0] not in g.outputs or len(node.inputs) != 2 or node.attrs["axis"] != 2:
        return
    _, h, _, d = g.shape(new)
    if not isinstance(h, int) or not isinstance(d, int) or len(g.users.get(past, [])) != 1:
        return
    node.op, node.inputs, node.attrs = "History", [new], {"layer": len(g.caches)}
    g.caches.append(Cache("", past, "", node.outputs[0], h, 1, d, plain=True))


def _attend(g: Graph, node: Node) -> None:
    if node.attrs.get("qk_matmul_output_mode", 0) or node.input(6) or any(node.outputs[3:]):
        return
    shapes = [g.shape(i) for i in node.inputs[:3]]
    four = len(shapes[0]) == 4
    if four:
        heads, kv_heads, dim, v_dim = shapes[0][1], shapes[1][1], shapes[0][3], shapes[2][3]
    else:
        heads, kv_heads = node.attrs["q_num_heads"], node.attrs["kv_num_heads"]
        widths = (shapes[0][2], shapes[2][2])
        if not all(isinstance(w, int) for w in widths):
            return
        dim, v_dim = widths[0] // heads, widths[1] // kv_heads
    sizes = (heads, kv_heads, dim, v_dim)
    if not all(isinstance(s, int) for s in sizes):
        return
    heads, kv_heads, dim, v_dim = (int(s) for s in sizes)  # type: ignore[arg-type]
    if heads % kv_heads:
        return
    layer = -1
    if node.input(4):
        pasts, presents = node.inputs[4:6], node.outputs[1:3]
        if any(p not in g.inputs for p in pasts) or any(g.users.get(p, []) for p in presents):
            return
        layer = len(g.caches)
        g.caches.append(Cache(pasts[0], pasts[1], presents[0], presents[1], kv_heads, dim, v_dim))
    elif node.attrs.get("is_causal", 0) and shapes[0][-2] != shapes[1][-2] and not node.attrs.get("at_end", 0):
        return  # causal attention of unequal lengths without a cache: engines differ in its alignment
    rows = [_to_rows(g, i, four) for i in node.inputs[:3]]
    mask = _mask(g, node.input(3), (shapes[0][0], shapes[0][-2]))
    b, s = g.shape(rows[0])[:2]
    spec = AttendSpec(
        heads,
        kv_heads,
        dim,
        v_dim,
        layer,
        scale=float(node.attrs.get("scale", 0.0) or dim**-0.5),
        softcap=float(node.attrs.get("softcap", 0.0)),
        causal=bool(node.attrs.get("is_causal", 0)),
        at_end=bool(node.attrs.get("at_end", 0)),
        window=int(node.attrs.get("window", 0)),
    )
    inputs = [*rows, mask] + [""] * (len(ATTEND_INPUTS) - 4)
    out = g.emit("Attend", inputs, Info("float32", (b, s, heads * v_dim)), node.outputs[0], attend=spec)
    if four:
        out = g.emit("View", [out], Info("float32", (b, s, heads, v_dim)), out)
        node.op, node.inputs, node.attrs = "Transpose", [out], {"perm": [0, 2, 1, 3]}
    else:
        node.op, node.inputs, node.attrs = "View", [out], {}
    del node.outputs[1:]


def _to_rows(g: Graph, name: str, four: bool) -> str:
    if not four:
        return name
    b, h, s, d = g.shape(name)
    rows = g.emit("Transpose", [name], Info("float32", (b, s, h, d)), name, perm=[0, 2, 1, 3])
    return g.emit("View", [rows], Info("float32", (b, s, h * d)), rows)


def _mask(g: Graph, name: str, rows: tuple[Size, Size]) -> str:
    """A mask as float32 [batch or 1, heads or 1, queries, keys], 0 where seen: what the kernel adds to the scores."""
    if not name:
        return ""
    shape = g.shape(name)
    if g.info[name].dtype == "bool":
        zero = g.add_constant("seen", np.zeros((), np.float32))
        hidden = g.add_constant("hidden", np.full((), -np.inf, np.float32))
        name = g.emit("Where", [name, zero, hidden], Info("float32", shape), name)
    wide = (1,) * (4 - len(shape)) + shape
    if wide != shape:
        name = g.emit("View", [name], Info("float32", wide), name)
    if wide[2] == 1 and rows[1] != 1:
        name = g.emit("Expand", [name], Info("float32", (*wide[:2], rows[1], wide[3])), name)
    return name


@dataclass(frozen=True, slots=True)
class _Places:
    """Indices of the inputs of q or k: its rows, its tables (cos, then sin), its norm (weight, then bias)."""

    rows: int
    tables: int
    norm: int


_Q = _Places(*(ATTEND_INPUTS.index(name) for name in ("q", "q_cos", "q_norm")))
_K = _Places(*(ATTEND_INPUTS.index(name) for name in ("k", "k_cos", "k_norm")))


def fold_into_attention(g: Graph) -> None:
    """Attend(Rope(Norm(q)), Rope(Norm(k)), v) -> Attend(q, k, v) that does these steps; either may be missing."""
    for node in g.nodes:
        if node.op == "Attend":
            spec = node.attrs["attend"]
            node.attrs["attend"] = replace(spec, q=_fold(g, node, _Q), k=_fold(g, node, _K))
    g.finish()


def _fold(g: Graph, node: Node, at: _Places) -> HeadSteps:
    """The steps before one input of `node`, which becomes what they read: through Views a Rope, then a Norm.

    Only steps whose result no other node reads.
    """
    name, dim, steps = node.inputs[at.rows], node.attrs["attend"].head_dim, HeadSteps()
    x = _through_views(g, name, node)
    rope = g.producer(x, "Rope") if x else None
    if rope is not None and g.shape(x)[-1] == dim:
        steps = replace(steps, rotary=rope.attrs["rotary"], interleaved=rope.attrs["interleaved"])
        node.inputs[at.tables : at.tables + 2] = rope.inputs[1:3]
        name = rope.inputs[0]
        x = _through_views(g, name, rope)
    norm = g.producer(x, "Norm") if x else None
    if norm is not None and g.shape(x)[-1] == dim:
        steps = replace(steps, norm=norm.attrs["kind"], eps=norm.attrs["eps"])
        node.inputs[at.norm : at.norm + 2] = norm.inputs[1:3]
        name = norm.inputs[0]
    if name != node.inputs[at.rows]:
        shape = g.shape(node.inputs[at.rows])
        node.inputs[at.rows] = name if g.shape(name) == shape else g.emit("View", [name], Info("float32", shape), name)
        g.users.setdefault(node.inputs[at.rows], []).append(node)
    return steps


def _through_views(g: Graph, name: str, user: Node) -> str:
    """The value behind Views of `name`; "" if a node other than `user` reads one of them."""
    while g.only_user(name) is user:
        view = g.producer(name, "View")
        if view is None:
            return name
        name, user = view.inputs[0], view
    return ""
