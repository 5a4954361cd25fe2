"""Tensor sizes as integer polynomials over named symbols, so that a chain of shape operators becomes one expression.

A size is an `int` when it is known, else a `Dim`. `batch * sequence`, `past + sequence` and `(h - 16) // 16 + 1`
are all sizes; two sizes are equal exactly when their normal forms are. Symbols stand for the sizes of the graph's
inputs (never negative) and for the values of its scalar integer inputs (which may be negative).
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

INT64_MAX = 2**63 - 1


class Atom:
    """A factor in a polynomial: a symbol (`op == "sym"`) or a function of sizes (`div`, `min`, `max`, `clip`)."""

    __slots__ = ("args", "key", "op")

    def __init__(self, op: str, *args: object) -> None:
        self.op = op
        self.args = args
        self.key = str(args[0]) if op == "sym" else f"{op}({', '.join(map(str, args))})"

    def __hash__(self) -> int:
        return hash(self.key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Atom) and self.key == other.key

    def __lt__(self, other: Atom) -> bool:
        return self.key < other.key

    def __str__(self) -> str:
        return self.key

    def evaluate(self, symbols: Mapping[str, int]) -> int:
        """The value under `symbols`; KeyError names a symbol that is not bound."""
        if self.op == "sym":
            return symbols[self.key]
        a, b = (evaluate(x, symbols) for x in self.args)  # type: ignore[arg-type]
        if self.op == "div":
            return a // b
        if self.op == "min":
            return min(a, b)
        if self.op == "max":
            return max(a, b)
        return min(max(a + b if a < 0 else a, 0), b)  # clip: the start or end `a` of a Slice of an axis of size b


class Dim:
    """A polynomial that is not a constant. Immutable; made by `symbol` and by arithmetic."""

    __slots__ = ("terms",)

    def __init__(self, terms: dict[tuple[Atom, ...], int]) -> None:
        self.terms = tuple(sorted((m, c) for m, c in terms.items() if c))

    def __hash__(self) -> int:
        return hash(self.terms)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Dim) and self.terms == other.terms

    def __str__(self) -> str:
        parts = []
        for monomial, c in self.terms:
            names = "*".join(map(str, monomial))
            parts.append(f"{c:+d}" if not monomial else ("+" if c == 1 else "-" if c == -1 else f"{c:+d}*") + names)
        return "".join(sorted(parts, key=lambda p: p.lstrip("+-").isdigit())).removeprefix("+")

    __repr__ = __str__

    def __add__(self, other: Size) -> Size:
        return _combine(self, other, 1)

    __radd__ = __add__

    def __sub__(self, other: Size) -> Size:
        return _combine(self, other, -1)

    def __rsub__(self, other: int) -> Size:
        return _combine(other, self, -1)

    def __neg__(self) -> Size:
        return _combine(0, self, -1)

    def __mul__(self, other: Size) -> Size:
        out: dict[tuple[Atom, ...], int] = {}
        for m1, c1 in _terms(self).items():
            for m2, c2 in _terms(other).items():
                m = tuple(sorted(m1 + m2))
                out[m] = out.get(m, 0) + c1 * c2
        return _simplest(out)

    __rmul__ = __mul__

    def is_symbol(self) -> bool:
        """Whether it is one symbol, not an expression."""
        return len(self.terms) == 1 and self.terms[0][1] == 1 and [a.op for a in self.terms[0][0]] == ["sym"]


Size = int | Dim
Shape = tuple[Size, ...]


def symbol(name: str) -> Size:
    """The size with the name `name`."""
    return Dim({(Atom("sym", name),): 1})


def mentions(size: Size, name: str) -> bool:
    """Whether the symbol `name` is part of the size."""
    if isinstance(size, int):
        return False
    atoms = [a for monomial, _ in size.terms for a in monomial]
    return any(a.key == name if a.op == "sym" else any(mentions(x, name) for x in a.args) for a in atoms)  # type: ignore[arg-type]


def function(op: str, *args: Size) -> Size:
    """`op` (`div`, `min`, `max`, `clip`) of two sizes; an int where both are ints."""
    atom = Atom(op, *args)
    if all(isinstance(a, int) for a in args):
        return atom.evaluate({})
    return Dim({(atom,): 1})


def _terms(size: Size) -> dict[tuple[Atom, ...], int]:
    return dict(size.terms) if isinstance(size, Dim) else {(): size}


def _simplest(terms: dict[tuple[Atom, ...], int]) -> Size:
    kept = {m: c for m, c in terms.items() if c}
    return kept.get((), 0) if not kept or set(kept) == {()} else Dim(kept)


def _combine(a: Size, b: Size, sign: int) -> Size:
    out = _terms(a)
    for m, c in _terms(b).items():
        out[m] = out.get(m, 0) + sign * c
    return _simplest(out)


def evaluate(size: Size, symbols: Mapping[str, int]) -> int:
    """The size under `symbols`; KeyError names a symbol that is not bound."""
    if isinstance(size, int):
        return size
    return sum(c * prod(a.evaluate(symbols) for a in m) for m, c in size.terms)


def product(shape: Shape) -> Size:
    """Number of elements."""
    total: Size = 1
    for d in shape:
        total = total * d
    return total


def never_negative(size: Size, signed: frozenset[str] = frozenset()) -> bool:
    """True when `size` >= 0 for all sizes of the inputs; `signed` names symbols that may be negative."""
    if isinstance(size, int):
        return size >= 0
    return all(c >= 0 and not any(_may_be_negative(a, signed) for a in m) for m, c in size.terms)


def _may_be_negative(atom: Atom, signed: frozenset[str]) -> bool:
    if atom.op == "sym":
        return atom.key in signed
    return atom.op != "clip" and not all(never_negative(a, signed) for a in atom.args)  # type: ignore[arg-type]


def floor_div(a: Size, b: Size) -> Size:
    """`a // b`, exact where the polynomial allows it (`batch*sequence*64 // sequence` is `batch*64`)."""
    if isinstance(a, int) and isinstance(b, int):
        return a // b
    if a == b:
        return 1
    if b == 1:
        return a
    divisor = _terms(b)
    if len(divisor) == 1:
        ((atoms, factor),) = divisor.items()
        quotient: dict[tuple[Atom, ...], int] = {}
        for monomial, c in _terms(a).items():
            rest = list(monomial)
            for atom in atoms:
                if atom not in rest:
                    return function("div", a, b)
                rest.remove(atom)
            if c % factor:
                return _whole_and_rest(a, b) if isinstance(b, int) and b > 0 else function("div", a, b)
            quotient[tuple(rest)] = c // factor
        return _simplest(quotient)
    # A polynomial divisor: exact only where one monomial shows that `a` is a multiple of it.
    for m1, c1 in _terms(a).items():
        for m2, c2 in divisor.items():
            if c1 % c2 == 0 and all(m1.count(x) >= m2.count(x) for x in m2):
                rest = list(m1)
                for atom in m2:
                    rest.remove(atom)
                guess = _simplest({tuple(rest): c1 // c2})
                if guess * b == a:
                    return guess
    return function("div", a, b)


def _whole_and_rest(a: Size, b: int) -> Size:
    """`a // b` in a normal form: `(n - 1) // 2 + 1` becomes `(n + 1) // 2`, a quotient of a quotient one quotient.

    So two ways to count the frames after convolutions compare as equal.
    """
    whole = _simplest({m: c // b for m, c in _terms(a).items()})
    rest = _simplest({m: c % b for m, c in _terms(a).items()})
    if isinstance(rest, Dim):
        atoms = [(m[0], c) for m, c in rest.terms if len(m) == 1 and m[0].op == "div"]
        constant = _terms(rest).get((), 0)
        if len(atoms) == 1 and atoms[0][1] == 1 and rest - constant == Dim({(atoms[0][0],): 1}):
            inner, divisor = atoms[0][0].args
            if isinstance(divisor, int) and divisor > 0:
                return whole + floor_div(inner + constant * divisor, divisor * b)  # type: ignore[operator]
    return whole + function("div", rest, b)


def clip(value: Size, size: Size, signed: frozenset[str] = frozenset()) -> Size:
    """A Slice's start or end `value` on an axis of `size`: negative counts from the end; then limited to [0, size]."""
    if isinstance(value, int):
        if value >= INT64_MAX // 2:
            return size
        if value == 0 or value <= -(INT64_MAX // 2):
            return 0
        if isinstance(size, int):
            return min(max(value + size if value < 0 else value, 0), size)
        if value < 0 and never_negative(size + value, signed):
            return size + value
    elif never_negative(value, signed):
        if never_negative(value - size, signed):
            return size
        if never_negative(size - value, signed):
            return value
    return function("clip", value, size)
