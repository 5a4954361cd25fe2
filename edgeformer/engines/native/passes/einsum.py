"""Einsum as matrix products between Transposes and Views (ONNX operator Einsum; numpy's rules)."""

from __future__ import annotations

from string import ascii_letters

from edgeformer.engines.native.ir.dims import Shape, Size, product
from edgeformer.engines.native.ir.graph import Graph, Info, Node
from edgeformer.engines.native.ir.shape_rules import rule
from edgeformer.errors import EngineUnavailable


def terms(g: Graph, node: Node) -> tuple[list[str], str]:
    """The letters of each operand's axes, and of the result's; what an ellipsis stands for gets free ones."""
    left, arrow, out = str(node.attrs["equation"]).replace(" ", "").partition("->")
    operands = left.split(",")
    if not arrow:  # without a result, it has the letters that stand once, sorted, behind the ellipsis
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


@rule("Einsum")
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


def products(g: Graph, node: Node) -> None:
    """Rewrites one Einsum: the operands are joined one after the other, each time by one MatMul."""
    operands, out = terms(g, node)
    sizes = {
        x: s for name, term in zip(node.inputs, operands, strict=True) for x, s in zip(term, g.shape(name), strict=True)
    }
    pending = list(zip(node.inputs, operands, strict=True))
    made, letters = pending.pop(0)
    while pending:
        name, term = pending.pop(0)
        kept = set(out).union(*(t for _, t in pending))
        made, letters = _sum(g, made, letters, kept | set(term))
        name, term = _sum(g, name, term, kept | set(letters))
        made, letters = _product(g, made, letters, name, term, kept, sizes)
    made, letters = _sum(g, made, letters, set(out))
    node.op, node.inputs, node.attrs = "View", [_ordered(g, made, letters, out)], {}


def _sum(g: Graph, name: str, letters: str, kept: set[str]) -> tuple[str, str]:
    axes = tuple(i for i, x in enumerate(letters) if x not in kept)
    if not axes:
        return name, letters
    shape = g.shape(name)
    info = Info("float32", tuple(d for i, d in enumerate(shape) if i not in axes))
    return g.emit("Reduce", [name], info, name, fn="sum", axes=axes), "".join(x for x in letters if x in kept)


def _product(
    g: Graph, a: str, first: str, b: str, second: str, kept: set[str], sizes: dict[str, Size]
) -> tuple[str, str]:
    """A and b multiplied, summed over the letters that both have and nobody keeps."""
    batch = "".join(x for x in first if x in second and x in kept)
    summed = "".join(x for x in first if x in second and x not in kept)
    left = "".join(x for x in first if x not in second)
    right = "".join(x for x in second if x not in first)

    def shape(letters: str) -> Shape:
        return tuple(sizes[x] for x in letters)

    k, n = product(shape(summed)), product(shape(right))
    rows = shape(left) or (1,)  # without a batch, the rows keep their axes: then it may be a Linear
    rows = (*shape(batch), product(rows)) if batch else rows
    a = _view(g, _ordered(g, a, first, batch + left + summed), (*rows, k))
    b = _view(g, _ordered(g, b, second, batch + summed + right), (*shape(batch), k, n))
    made = g.emit("MatMul", [a, b], Info("float32", (*rows, n)), a)
    return _view(g, made, shape(batch + left + right)), batch + left + right


def _ordered(g: Graph, name: str, now: str, wanted: str) -> str:
    if now == wanted:
        return name
    perm = [now.index(x) for x in wanted]
    if name in g.constants:
        return g.add_constant(name, g.constants[name].array().transpose(perm))
    return g.emit("Transpose", [name], Info("float32", tuple(g.shape(name)[p] for p in perm)), name, perm=perm)


def _view(g: Graph, name: str, shape: Shape) -> str:
    if g.shape(name) == shape:
        return name
    if name in g.constants:  # now, so that the pass that looks for Linears sees a matrix
        return g.add_constant(name, g.constants[name].array().reshape(shape))
    return g.emit("View", [name], Info("float32", shape), name)
