"""Whether a graph is row local (each token's row alone) or batch local (each item of a batch alone).

Rows of several states then run as one sequence; a large batch runs in pieces.
"""

from __future__ import annotations

from edgeformer.engines.native.ir.dims import Dim, Shape, Size, mentions, symbol
from edgeformer.engines.native.ir.graph import Graph, Node


def row_symbols(g: Graph) -> tuple[str, str]:
    """Names of the axes [batch, sequence] that token ids, else any input, begin with; ("", "") without one."""
    for info in sorted(g.inputs.values(), key=lambda i: (i.dtype != "int64", len(i.shape))):
        lead, rest = info.shape[:2], info.shape[2:]
        if len(lead) == 2 and all(isinstance(d, Dim) for d in lead) and all(isinstance(d, int) for d in rest):
            return str(lead[0]), str(lead[1])
    return "", ""


def is_row_local(g: Graph, batch: str, sequence: str) -> bool:
    """Whether every node computes each row from the same row of its inputs, attention excepted.

    A value then has rows [batch, sequence or kept, ...] (or batch * sequence first), or no symbolic sizes.
    """
    rows = _Rows(symbol(batch), symbol(sequence))
    if not all(rows.lead(i.shape) or i.value is not None for i in g.inputs.values()):
        return False
    return all(rows.local(g, n) for n in g.nodes)


def is_batch_local(g: Graph, batch: str) -> bool:
    """Whether every node computes each item of the batch from the same item of its inputs.

    A value then has the batch as its first axis and nowhere else, or not at all; every output has it.
    """
    items = _Items(symbol(batch), symbol(batch))
    values = [i.shape for i in g.inputs.values()]
    return (
        all(items.lead(shape) >= 0 for shape in values)
        and all(items.lead(g.shape(name)) == 1 for name in g.outputs)
        and all(items.local(g, n) for n in g.nodes)
    )


class _Rows:
    def __init__(self, batch: Size, sequence: Size) -> None:
        self.batch = batch
        self.lengths = (sequence, symbol("kept"))
        self.flat = tuple(batch * s for s in self.lengths)

    def lead(self, shape: Shape) -> int:
        """How many leading axes count the rows; 0 for a shape without symbols; -1 for any other shape.

        [batch, length, ...]: 2; [batch, 1, length, ...]: 3; [batch * length, ...]: 1.
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
            return self.attends(g, node)
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

    def attends(self, g: Graph, node: Node) -> bool:
        """Attention gets the sequences of rows from the engine; a mask tensor may depend on other rows."""
        q, k, v = (g.shape(i) for i in node.inputs[:3])
        return not node.input(3) and q[:2] == k[:2] == v[:2]

    def _aligned(self, shape: Shape, shape_lead: int, out: Shape, lead: int) -> bool:
        """The operand has the output's rows, or is the same for every row."""
        if shape_lead == 0:
            return len(shape) <= len(out) - lead or all(d == 1 for d in shape[: lead - len(out) + len(shape)])
        return shape_lead == lead and len(shape) == len(out) and shape[:lead] == out[:lead]


class _Items(_Rows):
    """The same for items of a batch: `lead` is 1 for [batch, ...], 0 for a shape without the batch, else -1."""

    def lead(self, shape: Shape) -> int:
        name = str(self.batch)
        if not any(mentions(d, name) for d in shape):
            return 0
        return 1 if shape[0] == self.batch and not any(mentions(d, name) for d in shape[1:]) else -1

    def attends(self, g: Graph, node: Node) -> bool:
        mask = node.input(3)
        free = not mask or self.lead(g.shape(mask)) == 1 or g.shape(mask)[0] == 1
        return free and all(self.lead(g.shape(i)) == 1 for i in node.inputs[:3])


BROADCAST = (
    "Add", "Sub", "Mul", "Div", "Pow", "Min", "Max", "Mod", "Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual",
    "And", "Or", "Xor", "Where", "Expand",
)  # fmt: skip
