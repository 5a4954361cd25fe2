"""The rows that `logits_to_keep` selects: everything after the last attention is computed for them alone."""

from __future__ import annotations

from edgeformer.engines.native.ir.dims import INT64_MAX, symbol
from edgeformer.engines.native.ir.graph import Graph, Info, Node
from edgeformer.engines.native.ir.rows import row_symbols

ROW_BY_ROW = ("View", "Linear", "Norm", "Unary", "Add", "Sub", "Mul", "Div")


def keep_rows(g: Graph) -> None:
    """Slice(x, -logits_to_keep, end, axis=1) -> Keep(x): the engine keeps the last rows of every sequence.

    Only values [batch, sequence, ...] have a row for each token; another axis 1 stays a Slice.
    """
    rows = tuple(symbol(name) for name in row_symbols(g))
    for node in list(g.nodes):
        if node.op != "Slice" or node.attrs["axes"] != (1,) or node.attrs["steps"] != (1,):
            continue
        if g.shape(node.inputs[0])[:2] != rows:
            continue
        (start,), (end,) = node.attrs["starts"], node.attrs["ends"]
        for name in g.inputs:
            if g.inputs[name].value and start == -symbol(name) and end == INT64_MAX:
                node.op, node.attrs = "Keep", {"count": name}
                shape = g.shape(node.outputs[0])
                _set_size(g, shape[1], symbol("kept"))
                dtype = g.info[node.inputs[0]].dtype
                g.info[node.outputs[0]] = Info(dtype, (shape[0], symbol("kept"), *shape[2:]))
                break
    g.finish()


def keep_rows_early(g: Graph) -> None:
    """Keep(f(x)) -> f(Keep(x)), again and again, up to the last attention.

    A prompt whose last logits are wanted then takes the last layer's feed-forward part for one row. The numbers are the
    same: each row is computed from itself.
    """
    moved = True
    while moved:
        moved = any(_move_up(g, keep) for keep in [n for n in g.nodes if n.op == "Keep"])
        g.finish()


def _move_up(g: Graph, keep: Node) -> bool:
    """Keep(f(x, y)) becomes f(Keep(x), Keep(y)) where f works row by row and no other node reads its result."""
    name = keep.inputs[0]
    node = g.producers.get(name)
    if node is None or node.op not in ROW_BY_ROW or len(node.outputs) != 1 or g.only_user(name) is not keep:
        return False
    rows = g.shape(name)[:2]
    if node.op == "Norm" and len(g.shape(name)) < 3:
        return False  # it runs along the rows
    read = [i for i in dict.fromkeys(node.inputs) if i and i not in g.constants]
    ranks = {len(g.shape(i)) for i in read} if node.op != "View" else set()  # an operand of a lower rank has no rows
    if any(g.shape(i)[:2] != rows for i in read) or ranks - {len(g.shape(name))}:
        return False
    kept = {}
    for i in read:
        there = next((n for n in g.users.get(i, []) if n.op == "Keep" and n is not keep), None)
        info = Info(g.info[i].dtype, (rows[0], symbol("kept"), *g.shape(i)[2:]))
        kept[i] = there.outputs[0] if there else g.emit("Keep", [i], info, i, **keep.attrs)
    node.inputs = [kept.get(i, i) for i in node.inputs]
    node.outputs = list(keep.outputs)
    g.nodes.remove(keep)
    g.index()
    return True


def _set_size(g: Graph, old: object, new: object) -> None:
    """Replace one size by a symbol in every shape that has it."""
    for info in g.info.values():
        if old in info.shape:
            info.shape = tuple(new if d == old else d for d in info.shape)  # type: ignore[misc]
