"""Attention on rows: [batch, sequence, heads * head_dim], with rotation, head norms and cache append folded in."""

from __future__ import annotations

import numpy as np

from edgeformer.engines.native.ir.cache import Cache
from edgeformer.engines.native.ir.dims import Shape, Size
from edgeformer.engines.native.ir.graph import Graph, Info, Node


def rotations(g: Graph) -> None:
    """RotaryEmbedding becomes Rope on [batch, sequence, heads, head_dim]: attrs rotary, interleaved."""
    for node in list(g.nodes):
        if node.op == "RotaryEmbedding":
            _rotation(g, node)
    g.finish()


def _rotation(g: Graph, node: Node) -> None:
    x = node.inputs[0]
    shape = g.shape(x)
    if len(shape) == 4:
        b, h, s, d = shape
        rows = g.emit("Transpose", [x], Info("float32", (b, s, h, d)), x, perm=[0, 2, 1, 3])
    else:
        b, s, width = shape
        h = node.attrs.get("num_heads", 0)
        if not isinstance(width, int) or not h or width % h:
            return
        d = width // h
        rows = g.emit("View", [x], Info("float32", (b, s, h, d)), x)
    if not isinstance(d, int):
        return
    rotary = node.attrs.get("rotary_embedding_dim", 0) or d
    tables = [_table(g, i, node.input(3), (b, s, rotary // 2)) for i in node.inputs[1:3]]
    interleaved = bool(node.attrs.get("interleaved", 0))
    out = g.emit("Rope", [rows, *tables], Info("float32", (b, s, h, d)), x, rotary=rotary, interleaved=interleaved)
    back = ("Transpose", {"perm": [0, 2, 1, 3]}) if len(shape) == 4 else ("View", {})
    node.op, node.inputs, node.attrs = back[0], [out], dict(back[1])


def _table(g: Graph, name: str, positions: str, shape: Shape) -> str:
    """Cosines or sines of each row, [batch, sequence, rotary / 2]."""
    if positions:
        name = g.emit("Gather", [name, positions], Info("float32", shape), name, axis=0)
    if g.shape(name) != shape:
        source = g.shape(name)
        wide = (1,) * (3 - len(source)) + source
        if wide != source:
            name = g.emit("View", [name], Info("float32", wide), name)
        name = g.emit("Expand", [name], Info("float32", shape), name)
    return name


def partial_rotations(g: Graph) -> None:
    """Concat(Rope(x[..., :r]), x[..., r:]) is a Rope of x that turns the first r columns of each head."""
    for node in list(g.nodes):
        if node.op != "Concat" or len(node.inputs) != 2:
            continue
        rope, rest = g.producer(node.inputs[0], "Rope"), g.producer(node.inputs[1], "Slice")
        rank = len(g.shape(node.outputs[0]))
        if rope is None or rest is None or node.attrs["axis"] % rank != rank - 1:
            continue
        head = g.producer(rope.inputs[0], "Slice")
        if head is None or head.inputs != rest.inputs or g.only_user(node.inputs[0]) is not node:
            continue
        turned = _last_columns(g, head)
        kept = _last_columns(g, rest)
        width = g.shape(head.inputs[0])[-1]
        if turned is None or kept is None or turned[0] != 0 or turned[1] != kept[0] or kept[1] != width:
            continue
        if rope.attrs["rotary"] != turned[1]:
            continue
        node.op, node.attrs = "Rope", {"rotary": turned[1], "interleaved": rope.attrs["interleaved"]}
        node.inputs = [head.inputs[0], *rope.inputs[1:]]
    g.finish()


def _last_columns(g: Graph, cut: Node) -> tuple[int, int] | None:
    shape = g.shape(cut.inputs[0])
    bounds = (cut.attrs["starts"][0], cut.attrs["ends"][0], shape[-1])
    if cut.attrs["axes"] != (len(shape) - 1,) or cut.attrs["steps"] != (1,):
        return None
    if not all(isinstance(v, int) for v in bounds):
        return None
    start, stop, _ = slice(bounds[0], bounds[1]).indices(bounds[2])  # type: ignore[arg-type]
    return start, stop


def attention_rows(g: Graph) -> list[Cache]:
    """Attention becomes Attend on rows. Returns the caches, in the order of their `layer` attribute (-1: no cache).

    Attend inputs: q, k, v, mask, cos_q, sin_q, cos_k, sin_k, q_norm, q_norm_bias, k_norm, k_norm_bias ("" for none).
    """
    caches: list[Cache] = []
    for node in list(g.nodes):
        if node.op == "Attention" and node.input(4) and any(g.users.get(o) for o in node.outputs[1:3]):
            _join(g, node)
    for node in list(g.nodes):
        if node.op == "Attention":
            _attend(g, node, caches)
        elif node.op == "Concat":
            _history(g, node, caches)
    gone = {name for c in caches for name in (c.present_key, c.present_value)}
    g.outputs = [o for o in g.outputs if o not in gone]
    for c in caches:
        for name in (c.past_key, c.past_value):
            g.inputs.pop(name, None)
    g.finish()
    return caches


def _join(g: Graph, node: Node) -> None:
    """An Attention whose joined keys or values others read too: the joining becomes nodes of its own."""
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
    node.attrs["at_end"] = 1  # the last query is as old as the last key
    del node.outputs[1:]
    g.index()


def _history(g: Graph, node: Node, caches: list[Cache]) -> None:
    """Concat(past, new) on the sequence axis becomes History(new): appends to a cache and reads all of it."""
    past, new = node.inputs[0], node.inputs[-1]
    if past not in g.inputs or node.outputs[0] not in g.outputs or len(node.inputs) != 2 or node.attrs["axis"] != 2:
        return
    _, h, _, d = g.shape(new)
    if not isinstance(h, int) or not isinstance(d, int) or len(g.users.get(past, [])) != 1:
        return
    node.op, node.inputs, node.attrs = "History", [new], {"layer": len(caches)}
    caches.append(Cache("", past, "", node.outputs[0], h, 1, d, plain=True))


def joined_caches(g: Graph) -> None:
    """Attention on Concat(past, new) keys and values that nobody else reads takes the pasts as inputs."""
    for node in list(g.nodes):
        if node.op != "Attention" or node.input(4):
            continue
        if node.attrs.get("is_causal", 0) != node.attrs.get("at_end", 0):
            continue  # its causality counts from the first key, a cache's from the last
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


def spelled_attention(g: Graph) -> None:
    """MatMul(Softmax(MatMul(q, k^T) * scale + mask), v) on [batch, heads, sequence, size] becomes Attention."""
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
    turned = g.producer(node.inputs[1], "Transpose")
    if turned is None or turned.attrs.get("perm") != [0, 1, 3, 2]:
        return None
    return node.inputs[0], turned.inputs[0], scale


def _attend(g: Graph, node: Node, caches: list[Cache]) -> None:
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
        layer = len(caches)
        caches.append(Cache(pasts[0], pasts[1], presents[0], presents[1], kv_heads, dim, v_dim))
    elif node.attrs.get("is_causal", 0) and shapes[0][-2] != shapes[1][-2] and not node.attrs.get("at_end", 0):
        return  # causal attention of unequal lengths without a cache: engines disagree on its meaning
    rows = [_to_rows(g, i, four) for i in node.inputs[:3]]
    mask = _mask(g, node.input(3), (shapes[0][0], shapes[0][-2]))
    b, s = g.shape(rows[0])[:2]
    info = Info("float32", (b, s, heads * v_dim))
    attrs = {
        "heads": heads, "kv_heads": kv_heads, "head_dim": dim, "value_dim": v_dim, "layer": layer,
        "scale": float(node.attrs.get("scale", 0.0) or dim**-0.5),
        "softcap": float(node.attrs.get("softcap", 0.0)), "causal": bool(node.attrs.get("is_causal", 0)),
        "at_end": bool(node.attrs.get("at_end", 0)),
        "window": int(node.attrs.get("window", 0)), "rotary": 0, "interleaved": False,
        "rotary_k": 0, "interleaved_k": False, "q_norm": "", "q_eps": 0.0, "k_norm": "", "k_eps": 0.0,
    }  # fmt: skip
    out = g.emit("Attend", [*rows, mask] + [""] * 8, info, node.outputs[0], **attrs)
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


def fold_into_attention(g: Graph) -> None:
    """Rotation of q and k, and a norm over each of their heads before it, are done by the Attend that reads them."""
    for node in g.nodes:
        if node.op == "Attend":
            _fold(g, node, 0, "rotary", "interleaved", 4, "q_norm", "q_eps", 8)
            _fold(g, node, 1, "rotary_k", "interleaved_k", 6, "k_norm", "k_eps", 10)
    g.finish()


def _fold(
    g: Graph, node: Node, i: int, rotary: str, interleaved: str, table: int, norm: str, eps: str, vector: int
) -> None:
    """Input i of `node`: look through its Views for Rope, then for Norm, each read by nobody else."""
    name, dim = node.inputs[i], node.attrs["head_dim"]
    x = _through_views(g, name, node)
    rope = g.producer(x, "Rope") if x else None
    if rope is not None and g.shape(x)[-1] == dim:
        node.attrs[rotary], node.attrs[interleaved] = rope.attrs["rotary"], rope.attrs["interleaved"]
        node.inputs[table : table + 2] = rope.inputs[1:3]
        name = rope.inputs[0]
        x = _through_views(g, name, rope)
    n = g.producer(x, "Norm") if x else None
    if n is not None and g.shape(x)[-1] == dim:
        node.attrs[norm], node.attrs[eps] = n.attrs["kind"], n.attrs["eps"]
        node.inputs[vector : vector + 2] = n.inputs[1:3]
        name = n.inputs[0]
    if name != node.inputs[i]:
        rows = g.shape(node.inputs[i])
        node.inputs[i] = name if g.shape(name) == rows else g.emit("View", [name], Info("float32", rows), name)
        g.users.setdefault(node.inputs[i], []).append(node)


def _through_views(g: Graph, name: str, user: Node) -> str:
    """The value behind Views of `name`, "" if anybody but `user` reads one of them."""
    while g.only_user(name) is user:
        view = g.producer(name, "View")
        if view is None:
            return name
        name, user = view.inputs[0], view
    return ""
