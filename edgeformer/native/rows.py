"""Whether a program treats each token's row alone, so that rows of several states may run as one sequence."""

from __future__ import annotations

from edgeformer.native.dims import Dim, Shape, Size, symbol
from edgeformer.native.graph import Graph, Node


def is_row_local(g: Graph, batch: str, sequence: str) -> bool:
    """True when every value is free of sizes, or has rows [batch, sequence or kept, ...] (or batch * sequence first),
    and every node computes a row from the same row. Attention is the exception: it knows the sequences.
    """
    rows = _Rows(symbol(batch), symbol(sequence))
    if not all(rows.lead(i.shape) or i.value is not None for i in g.inputs.values()):
        return False
    return all(rows.local(g, n) for n in g.nodes)


class _Rows:
    def __init__(self, batch: Size, sequence: Size) -> None:
        self.batch = batch
        self.lengths = (sequence, symbol("kept"))
        self.flat = tuple(batch * s for s in self.lengths)

    def lead(self, shape: Shape) -> int:
        """How many leading axes count the rows: [batch, length, ...] 2, [batch, 1, length, ...] 3, [batch * length,
        ...] 1; 0 where the shape is free of symbols; -1 for anything else.
        """
        if not any(isinstance(d, Dim) for d in shape):
            return 0
        lead = -1
        if len(shape) >= 2 and shape[0] == self.batch and shape[1] in self.lengths:
            lead = 2
        elif len(shape) >= 3 and shape[0] == self.batch and shape[1] == 1 and shape[2] in self.lengths:
            lead = 3
        elif shape[0] in self.flat:
            lead = 1
        return -1 if any(isinstance(d, Dim) for d in shape[max(lead, 0) :]) else lead

    def local(self, g: Graph, node: Node) -> bool:
        out = g.shape(node.outputs[0])
        lead = self.lead(out)
        inputs = [i for i in node.inputs if i]
        shapes = [g.shape(i) for i in inputs]
        leads = [self.lead(s) for s in shapes]
        if lead == 0:
            return node.op not in ("Sizes", "Keep") and not any(leads)
        if lead < 0 or any(self.lead(g.shape(o)) != lead for o in node.outputs if o):
            return False
        if node.op in ("View", "Embed", "Unary", "Pointwise", "Cast", "Norm", "Rope", "Linears", "Clip", "Not"):
            return all(n >= 0 for n in leads)
        if node.op == "Keep":
            return leads[0] == 2 and shapes[0][1] == self.lengths[0]
        if node.op == "Attend":
            return not node.input(3) and shapes[0][:2] == shapes[1][:2] == shapes[2][:2]
        if node.op == "Transpose":
            return leads[0] == lead and list(node.attrs.get("perm", []))[:lead] == list(range(lead))
        if node.op in ("Slice", "Reduce"):
            return leads[0] == lead and all(a >= lead for a in node.attrs["axes"])
        if node.op in ("Concat", "Softmax", "LogSoftmax"):
            return node.attrs.get("axis", -1) % len(out) >= lead and all(n == lead for n in leads)
        if node.op == "Gather":
            return node.attrs.get("axis", 0) == 0 and leads[0] == 0
        if node.op in BROADCAST:
            return all(self._aligned(s, n, out, lead) for s, n in zip(shapes, leads, strict=True))
        return False

    def _aligned(self, shape: Shape, shape_lead: int, out: Shape, lead: int) -> bool:
        """The operand has the output's rows, or is the same for every row."""
        if shape_lead == 0:
            return len(shape) <= len(out) - lead or all(d == 1 for d in shape[: lead - len(out) + len(shape)])
        return shape_lead == lead and len(shape) == len(out) and shape[:lead] == out[:lead]


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
