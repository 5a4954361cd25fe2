"""Whether a program treats each token's row alone, so that rows of several states may run as one sequence."""

from __future__ import annotations

from edgeformer.native.dims import Dim, Shape, Size, symbol
from edgeformer.native.graph import Graph, Node


def is_row_local(g: Graph, batch: str, sequence: str) -> bool:
    """True when every value is free of sizes, or has rows [batch, sequence or kept, ...] (or batch * sequence first),
    and every node computes a row from the same row. Attention is the exception: it knows the sequences.
    """
    rows = _Rows(symbol(batch), symbol(sequence))
    if not all(rows.kind(i.shape) == "rows" or i.value is not None for i in g.inputs.values()):
        return False
    return all(rows.local(g, n) for n in g.nodes)


class _Rows:
    def __init__(self, batch: Size, sequence: Size) -> None:
        self.batch = batch
        self.lengths = (sequence, symbol("kept"))
        self.flat = tuple(batch * s for s in self.lengths)

    def kind(self, shape: Shape) -> str:
        """ "rows" [batch, length, ...], "flat" [batch * length, ...], "free" of symbols, or "" for anything else."""
        if not any(isinstance(d, Dim) for d in shape):
            return "free"
        if len(shape) >= 2 and shape[0] == self.batch and shape[1] in self.lengths:
            rest = shape[2:]
        elif shape[0] in self.flat:
            rest = shape[1:]
        else:
            return ""
        if any(isinstance(d, Dim) for d in rest):
            return ""
        return "rows" if len(rest) == len(shape) - 2 else "flat"

    def local(self, g: Graph, node: Node) -> bool:
        out = g.shape(node.outputs[0])
        kind = self.kind(out)
        if kind == "free":
            return node.op not in ("Sizes", "Keep") and all(self.kind(g.shape(i)) == "free" for i in node.inputs if i)
        if kind == "" or any(self.kind(g.shape(o)) != kind for o in node.outputs):
            return False
        lead = 2 if kind == "rows" else 1
        inputs = [i for i in node.inputs if i]
        shapes = [g.shape(i) for i in inputs]
        if node.op in ("View", "Embed", "Unary", "Cast", "Norm", "Rope", "Linears", "Clip", "Not"):
            return all(self.kind(s) in ("rows", "flat", "free") for s in shapes)
        if node.op == "Keep":
            return shapes[0][1] == self.lengths[0]
        if node.op == "Attend":
            return not node.input(3) and shapes[0][:2] == shapes[1][:2] == shapes[2][:2]
        if node.op == "Transpose":
            return list(node.attrs.get("perm", []))[:lead] == list(range(lead))
        if node.op in ("Slice", "Reduce"):
            return all(a >= lead for a in node.attrs["axes"])
        if node.op in ("Concat", "Softmax", "LogSoftmax"):
            rank = len(out)
            return node.attrs.get("axis", -1) % rank >= lead and all(self.kind(s) == kind for s in shapes)
        if node.op == "Gather":
            return node.attrs.get("axis", 0) == 0 and self.kind(shapes[0]) == "free"
        if node.op in BROADCAST:
            return all(self._aligned(s, out, lead) for s in shapes)
        return False

    def _aligned(self, shape: Shape, out: Shape, lead: int) -> bool:
        """The operand has the output's rows, or is the same for every row."""
        if self.kind(shape) == "free":
            return len(shape) <= len(out) - lead or all(d == 1 for d in shape[: lead - len(out) + len(shape)])
        return len(shape) == len(out) and shape[:lead] == out[:lead]


BROADCAST = (
    "Add",
    "Sub",
    "Mul",
    "Div",
    "Pow",
    "Min",
    "Max",
    "Mod",
    "Equal",
    "Less",
    "LessOrEqual",
    "Greater",
    "GreaterOrEqual",
    "And",
    "Or",
    "Xor",
    "Where",
    "Expand",
)
