"""`Einsum` -> `MatMul`, which engines quantize and fuse."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.tape import Tape

from edgeformer.export.passes.edit import nodes, replace


def plain_products(model: ir.Model) -> None:
    """`Einsum(a, b)` -> `Transpose(MatMul(Transpose(a), Transpose(b)))`, with only the Transposes that are needed.

    Rewritten are equations with one free index in each operand and one summed index: "bhqd,bhkd->bhqk" becomes
    MatMul(a, Transpose(b)). Other equations stay Einsum.
    """
    for node in nodes(model, "Einsum"):
        equation = node.attributes["equation"].value
        equation = (equation.decode() if isinstance(equation, bytes) else str(equation)).replace(" ", "")
        left, _, out = equation.partition("->")
        operands = left.split(",")
        plain = all(term.isalpha() and len(set(term)) == len(term) for term in (*operands, out))
        if len(operands) != 2 or not out or not plain:
            continue
        a, b = operands
        batch = "".join(letter for letter in out if letter in a and letter in b)
        free = ["".join(x for x in term if x in out and x not in batch) for term in operands]
        summed = "".join(letter for letter in a if letter in b and letter not in out)
        lost = [x for term in operands for x in term if x not in out and x not in summed]
        if len(summed) != 1 or [len(x) for x in free] != [1, 1] or lost:
            continue
        sizes: dict[str, int | ir.SymbolicDim] = {}
        for value, term in zip(node.inputs, operands, strict=True):
            if value is not None and value.shape is not None:
                sizes |= dict(zip(term, value.shape, strict=True))
        tape = Tape()
        first = _order(tape, node.inputs[0], a, batch + free[0] + summed, sizes)
        second = _order(tape, node.inputs[1], b, batch + summed + free[1], sizes)
        made = _typed(tape.op("MatMul", [first, second]), first, batch + free[0] + free[1], sizes)
        replace(model, node, tape, _order(tape, made, batch + free[0] + free[1], out, sizes))


def _order(
    tape: Tape, value: ir.Value | None, now: str, wanted: str, sizes: dict[str, int | ir.SymbolicDim]
) -> ir.Value:
    """`value` with the axes `now` transposed to the order `wanted`; axes are letters of the equation."""
    assert value is not None
    if now == wanted:
        return value
    transposed = tape.op("Transpose", [value], {"perm": [now.index(letter) for letter in wanted]})
    return _typed(transposed, value, wanted, sizes)


def _typed(value: ir.Value, like: ir.Value, letters: str, sizes: dict[str, int | ir.SymbolicDim]) -> ir.Value:
    value.type = like.type
    if all(letter in sizes for letter in letters):
        value.shape = ir.Shape([sizes[letter] for letter in letters])
    return value
