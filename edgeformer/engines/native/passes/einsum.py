"""Einsum -> matrix products between Transposes and Views (ONNX operator Einsum; numpy's rules)."""

from __future__ import annotations

from string import ascii_letters
from typing import NamedTuple

from edgeformer.engines.native.ir.dims import Shape, Size, product
from edgeformer.engines.native.ir.graph import Graph, Info, Node
from edgeformer.engines.native.ir.shape_rules import shape_rule
from edgeformer.errors import EngineUnavailable


def terms(g: Graph, node: Node) -> tuple[list[str], str]:
    """The letters of the axes of each operand and of the result; axes of an ellipsis get unused letters."""
    left, arrow, out = str(node.attrs["equation"]).replace(" ", "").partition("->")
    operands = left.split(",")
    if not arrow:  # no result given: the letters that occur once, sorted, behind the ellipsis
        once = sorted(x for x in set(left) - {",", "."} if left.count(x) == 1)
        out = "..." * ("..." in left) + "".join(once)
    spare = "".join(x for x in ascii_letters if x not in left)
    widths = [len(g.shape(i)) - len(t.replace("...", "")) for i, t in zip(node.inputs, operands, strict=True)]
    widths = [w for w, t in zip(widths, operands, strict=True) if "..." in t]
    if len(set(widths)) > 1:
        raise EngineUnavailable("Einsum with ellipses of unequal length")
    operands = [t.replace("...", spare[: max(widths, default=0)]) for t in operands]
    out = out.replace("...", spare[: max(widths, default=0)])
    if not all(len(set(term)) == len(term) and (term.isalpha() or not term) for term in (*operands, out)):
        raise EngineUnavailable("Einsum with a diagonal")
    return operands, out


@shape_rule("Einsum")
def _shape(g: Graph, node: Node) -> list[Info]:
    operands, out = terms(g, node)
    sizes: dict[str, Size] = {}
    for name, term in zip(node.inputs, operands, strict=True):
        if g.info[name].dtype != "float32":
            raise EngineUnavailable("Einsum of whole numbers")
        for letter, size in zip(term, g.shape(name), strict=True):
            known = sizes.setdefault(letter, size)
            if isinstance(size, int) and isinstance(known, int) and known != size:
                raise EngineUnavailable("Einsum that spreads an axis")
    return [Info("float32", tuple(sizes[letter] for letter in out))]


class _Operand(NamedTuple):
    """A value and the letters of its axes."""

    name: str
    letters: str


def products(g: Graph, node: Node) -> None:
    """Einsum of n operands -> n - 1 MatMuls, one operand after the other."""
    operands, out = terms(g, node)
    sizes = {
        x: s for name, term in zip(node.inputs, operands, strict=True) for x, s in zip(term, g.shape(name), strict=True)
    }
    pending = [_Operand(*pair) for pair in zip(node.inputs, operands, strict=True)]
    made = pending.pop(0)
    while pending:
        other = pending.pop(0)
        kept = set(out).union(*(operand.letters for operand in pending))
        made = _sum(g, made, kept | set(other.letters))
        other = _sum(g, other, kept | set(made.letters))
        made = _product(g, made, other, kept, sizes)
    made = _sum(g, made, set(out))
    node.op, node.inputs, node.attrs = "View", [_ordered(g, made, out)], {}


def _sum(g: Graph, x: _Operand, kept: set[str]) -> _Operand:
    axes = tuple(i for i, letter in enumerate(x.letters) if letter not in kept)
    if not axes:
        return x
    info = Info("float32", tuple(d for i, d in enumerate(g.shape(x.name)) if i not in axes))
    name = g.emit("Reduce", [x.name], info, x.name, fn="sum", axes=axes)
    return _Operand(name, "".join(letter for letter in x.letters if letter in kept))


def _product(g: Graph, a: _Operand, b: _Operand, kept: set[str], sizes: dict[str, Size]) -> _Operand:
    """The product of `a` and `b`, summed over the letters that both have and that are not in `kept`."""
    batch = "".join(x for x in a.letters if x in b.letters and x in kept)
    summed = "".join(x for x in a.letters if x in b.letters and x not in kept)
    left = "".join(x for x in a.letters if x not in b.letters)
    right = "".join(x for x in b.letters if x not in a.letters)

    def shape(letters: str) -> Shape:
        return tuple(sizes[x] for x in letters)

    k, n = product(shape(summed)), product(shape(right))
    rows = shape(left) or (1,)  # without a batch, the rows keep their axes: then it may be a Linear
    rows = (*shape(batch), product(rows)) if batch else rows
    first = _view(g, _ordered(g, a, batch + left + summed), (*rows, k))
    second = _view(g, _ordered(g, b, batch + summed + right), (*shape(batch), k, n))
    made = g.emit("MatMul", [first, second], Info("float32", (*rows, n)), first)
    return _Operand(_view(g, made, shape(batch + left + right)), batch + left + right)


def _ordered(g: Graph, x: _Operand, letters: str) -> str:
    """The name of `x` with its axes in the order of `letters`."""
    name = x.name
    if x.letters == letters:
        return name
    perm = [x.letters.index(letter) for letter in letters]
    if name in g.constants:
        return g.add_constant(name, g.constants[name].array().transpose(perm))
    return g.emit("Transpose", [name], Info("float32", tuple(g.shape(name)[p] for p in perm)), name, perm=perm)


def _view(g: Graph, name: str, shape: Shape) -> str:
    if g.shape(name) == shape:
        return name
    if name in g.constants:  # reshaped now, so that `linear.linears` sees a constant matrix
        return g.add_constant(name, g.constants[name].array().reshape(shape))
    return g.emit("View", [name], Info("float32", shape), name)
