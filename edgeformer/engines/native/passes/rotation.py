"""Rotary position embeddings (RoPE), decomposed or as RotaryEmbedding, of all or the first columns -> Rope."""

from __future__ import annotations

from edgeformer.engines.native.ir.dims import INT64_MAX, Shape
from edgeformer.engines.native.ir.graph import Graph, Info, Node


def decomposed_rotations(g: Graph) -> None:
    """Add(Mul(x, C), Mul(R, S)) on heads [batch, heads, sequence, size] -> RotaryEmbedding(x, cos, sin).

    half: R = Concat(-x[size/2:], x[:size/2]), and C, S hold each number twice, size/2 apart;
    interleaved: R alternates -x[1::2] and x[0::2], and C, S hold each number twice, side by side.
    """
    for node in list(g.nodes):
        if node.op != "Add" or len(g.shape(node.outputs[0])) != 4:
            continue
        products = [g.producer(i, "Mul") for i in node.inputs]
        if products[0] is None or products[1] is None:
            continue
        for by_cos, by_sin in ((products[0], products[1]), (products[1], products[0])):
            if _to_operator(g, node, by_cos, by_sin):
                break
    g.finish()


def _to_operator(g: Graph, node: Node, by_cos: Node, by_sin: Node) -> bool:
    for x, c in (by_cos.inputs, by_cos.inputs[::-1]):
        for r, s in (by_sin.inputs, by_sin.inputs[::-1]):
            interleaved = _quarter_rotation(g, r, x)
            if interleaved is None:
                continue
            cos, sin = (_half_table(g, t, interleaved, g.shape(x)) for t in (c, s))
            if cos and sin:
                node.op, node.inputs, node.attrs = "RotaryEmbedding", [x, cos, sin], {"interleaved": int(interleaved)}
                return True
    return False


def _quarter_rotation(g: Graph, name: str, x: str) -> bool | None:
    """Whether `name`, which is x rotated by 90 degrees in each plane, is so interleaved (True) or by halves (False).

    None if it is not such a rotation.
    """
    node, shape = g.producers.get(name), g.shape(x)
    if node is None or not shape or not isinstance(size := shape[-1], int) or size % 2:
        return None
    interleaved = node.op == "View"
    concat = g.producer(node.inputs[0], "Concat") if interleaved else node
    if concat is None or concat.op != "Concat" or len(concat.inputs) != 2:
        return None
    rank = len(g.shape(concat.outputs[0]))
    if concat.attrs["axis"] % rank != rank - 1 or rank != len(g.shape(x)) + int(interleaved):
        return None
    parts = [_behind_view(g, i) if interleaved else i for i in concat.inputs]
    negative = g.producer(parts[0], "Unary")
    if negative is None or negative.attrs["fn"] != "neg":
        return None
    found = [_cut(g, i, x) for i in (negative.inputs[0], parts[1])]
    half = size // 2
    expected = [(1, size, 2), (0, size, 2)] if interleaved else [(half, size, 1), (0, half, 1)]
    return interleaved if found == expected else None


def _behind_view(g: Graph, name: str) -> str:
    view = g.producer(name, "View")
    return view.inputs[0] if view is not None and g.shape(name)[:-1] == g.shape(view.inputs[0]) else ""


def _cut(g: Graph, name: str, x: str) -> tuple[int, int, int] | None:
    """(start, stop, step) when `name` is a slice of x's last axis."""
    cut = g.producer(name, "Slice")
    size = g.shape(x)[-1]
    if cut is None or cut.inputs[0] != x or cut.attrs["axes"] != (len(g.shape(x)) - 1,) or not isinstance(size, int):
        return None
    start, stop, step = cut.attrs["starts"][0], cut.attrs["ends"][0], cut.attrs["steps"][0]
    if not isinstance(start, int) or not isinstance(stop, int):
        return None
    return slice(start, stop, step).indices(size)


def _half_table(g: Graph, name: str, interleaved: bool, shape: tuple[object, ...]) -> str:
    """One number of each pair of a table [batch, 1, sequence, size], as [batch, sequence, size / 2]; "" if no pairs."""
    source, rows = _doubled(g, name, interleaved), g.shape(name)
    if source and len(rows) == 4 and rows[1] == 1 and rows[-1] == shape[-1]:
        half = int(shape[-1]) // 2  # type: ignore[call-overload]
        return g.emit("View", [source], Info("float32", (rows[0], rows[2], half)), name)
    view = g.producer(name, "View")
    if view is None:
        return ""
    table = view.inputs[0]
    rows = g.shape(table)
    if len(rows) != 3 or g.shape(name) != (rows[0], 1, *rows[1:]) or rows[-1] != shape[-1]:
        return ""
    doubling: str | None = table
    while doubling and not _doubled(g, doubling, interleaved):
        doubling = _through_function(g, doubling)
    if not doubling:
        return ""
    size = int(shape[-1])  # type: ignore[call-overload]
    stop, step = (INT64_MAX, 2) if interleaved else (size // 2, 1)
    info = Info("float32", (rows[0], rows[1], size // 2))
    return g.emit("Slice", [table], info, table, starts=(0,), ends=(stop,), axes=(2,), steps=(step,))


def _through_function(g: Graph, name: str) -> str | None:
    """The input of the elementwise function that makes `name`: it keeps pairs of equal numbers equal."""
    node = g.producers.get(name)
    if node is None or not (node.op == "Unary" or (node.op in ("Mul", "Div") and g.scalar(node.inputs[1]) is not None)):
        return None
    return node.inputs[0]


def _doubled(g: Graph, name: str, interleaved: bool) -> str | None:
    """The value whose last axis (before an axis of size 1, if any) `name` holds twice; None if it does not."""
    node = g.producers.get(name)
    if node is None:
        return None
    if not interleaved:
        same = node.op == "Concat" and len(node.inputs) == 2 and node.inputs[0] == node.inputs[1]
        rank = len(g.shape(name))
        return node.inputs[0] if same and node.attrs["axis"] % rank == rank - 1 else None
    spread = g.producer(node.inputs[0], "Expand") if node.op == "View" else None
    if spread is None:
        return None
    wide, narrow = g.shape(spread.outputs[0]), g.shape(spread.inputs[0])
    return spread.inputs[0] if wide[-1] == 2 and narrow == (*wide[:-1], 1) else None


def rotations(g: Graph) -> None:
    """RotaryEmbedding(x, cos, sin, position_ids) -> Rope on [batch, sequence, heads, head_dim] between Transposes.

    attrs: rotary (columns that are rotated, from the first on), interleaved.
    """
    for node in list(g.nodes):
        if node.op == "RotaryEmbedding":
            _to_rope(g, node)
    g.finish()


def _to_rope(g: Graph, node: Node) -> None:
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
    """Concat(Rope(x[..., :r]), x[..., r:]) -> Rope(x) that rotates the first r columns of each head."""
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
        rotated = _last_columns(g, head)
        unrotated = _last_columns(g, rest)
        width = g.shape(head.inputs[0])[-1]
        if rotated is None or unrotated is None or rotated[0] != 0:
            continue
        if rotated[1] != unrotated[0] or unrotated[1] != width or rope.attrs["rotary"] != rotated[1]:
            continue
        node.op, node.attrs = "Rope", {"rotary": rotated[1], "interleaved": rope.attrs["interleaved"]}
        node.inputs = [head.inputs[0], *rope.inputs[1:]]
    g.finish()


def _last_columns(g: Graph, cut: Node) -> tuple[int, int] | None:
    """(start, stop) when the Slice `cut` takes neighbouring columns of the last axis."""
    shape = g.shape(cut.inputs[0])
    bounds = (cut.attrs["starts"][0], cut.attrs["ends"][0], shape[-1])
    if cut.attrs["axes"] != (len(shape) - 1,) or cut.attrs["steps"] != (1,):
        return None
    if not all(isinstance(v, int) for v in bounds):
        return None
    start, stop, _ = slice(bounds[0], bounds[1]).indices(bounds[2])  # type: ignore[arg-type]
    return start, stop
