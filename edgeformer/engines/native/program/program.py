"""The lowered graph as a program: a list of operations on numbered slots, printable, and all that C++ needs to run it.

A slot is a tensor whose sizes are expressions of a few symbols (`batch`, `sequence`, `kept`, ...); a view uses another
slot's memory. Weights are matrices to be packed; operations refer to them by number. Types and functions are names:
C++ looks them up when the engine is made (csrc/program/names.h), so a program needs no extension to be made or printed.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from edgeformer.bundle.signature import Array
from edgeformer.engines.native.ir.dims import Atom, Shape, Size
from edgeformer.engines.native.ir.weight import Weight

if TYPE_CHECKING:
    from edgeformer.engines.native.ir.cache import Cache

LANES = 16  # rows of a weight panel, as csrc/kernels/kernels.h packs them
KEEP_INPUT = "logits_to_keep"


@dataclass(slots=True)
class Slot:
    """A tensor of the program.

    dtype: "f32", "i64", "bool", or "quant", "quant64", "quant128": int8 rows with one scale for 32, 64 or 128 columns.
    """

    name: str
    dtype: str
    shape: Shape
    view_of: int = -1
    constant: Array | None = None


@dataclass(slots=True)
class Op:
    """One operation: slot numbers (-1: not given), weight numbers, and its own numbers and names by keyword."""

    kind: str
    inputs: list[int]
    outputs: list[int]
    ints: dict[str, list[int]] = field(default_factory=dict)
    floats: dict[str, list[float]] = field(default_factory=dict)
    names: dict[str, list[str]] = field(default_factory=dict)
    sizes: dict[str, list[Size]] = field(default_factory=dict)
    weights: list[int] = field(default_factory=list)
    note: str = ""


@dataclass(slots=True)
class PackedWeight:
    """A matrix to be packed, [n, k], of one of WEIGHT_TYPES.

    parts: matrices of the graph, each with its role: "all" (its rows in order), or "gate" and "up", whose panels of
    LANES rows alternate.
    """

    type: str
    n: int
    k: int
    parts: list[tuple[Weight, str]]


@dataclass
class Program:
    """What `NativeEngine` runs. `caches` in layer order; `inputs` and `outputs` map names to slots."""

    symbols: list[str]
    slots: list[Slot] = field(default_factory=list)
    weights: list[PackedWeight] = field(default_factory=list)
    ops: list[Op] = field(default_factory=list)
    caches: list[Cache] = field(default_factory=list)
    inputs: dict[str, int] = field(default_factory=dict)
    outputs: dict[str, int] = field(default_factory=dict)
    row_local: bool = False
    batch_local: bool = False  # no caches, and no operation mixes the items of a batch
    row_symbols: tuple[str, str] = ("", "")
    past_symbol: str = ""  # the caches' length


def spec(p: Program) -> dict[str, Any]:
    """The program as plain data with named fields; csrc/bindings/program.cpp reads it."""
    sizes: dict[Any, int] = {}

    def numbers(shape: Iterable[Any]) -> list[int]:
        return [sizes.setdefault(s, len(sizes)) for s in shape]

    batch, sequence = p.row_symbols
    inputs = list(p.inputs)
    sized = any(n == KEEP_INPUT and not p.slots[i].shape for n, i in p.inputs.items())
    return {
        "symbols": p.symbols,
        "slots": [
            {"name": s.name, "dtype": s.dtype, "shape": numbers(s.shape), "view_of": s.view_of, "constant": s.constant}
            for s in p.slots
        ],
        "ops": [
            {
                "kind": o.kind,
                "inputs": o.inputs,
                "outputs": o.outputs,
                "weights": o.weights,
                "ints": o.ints,
                "floats": o.floats,
                "names": o.names,
                "sizes": {k: numbers(v) for k, v in o.sizes.items()},
            }
            for o in p.ops
        ],
        "weights": [{"type": w.type, "n": w.n, "k": w.k} for w in p.weights],
        "caches": [
            {"kv_heads": c.kv_heads, "head_dim": c.head_dim, "value_dim": c.value_dim, "plain": c.plain}
            for c in p.caches
        ],
        "inputs": list(p.inputs.values()),
        "outputs": list(p.outputs.values()),
        "logits_to_keep": inputs.index(KEEP_INPUT) if sized else -1,
        "row_local": p.row_local,
        "batch": p.symbols.index(batch) if batch else -1,
        "sequence": p.symbols.index(sequence) if sequence else -1,
        "kept": p.symbols.index("kept"),
        "past": p.symbols.index(p.past_symbol) if p.past_symbol else -1,
        "sizes": [postfix(s, p.symbols) for s in sizes],
    }


def postfix(size: Size, symbols: list[str]) -> list[int]:
    """A size as a program for C++: pairs (code, number); codes 0 number, 1 symbol, then + * div min max clip."""
    codes = {"div": 4, "min": 5, "max": 6, "clip": 7}
    if isinstance(size, int):
        return [0, size]

    def atom(a: Atom) -> list[int]:
        if a.op == "sym":
            return [1, symbols.index(a.key)]
        return [x for arg in a.args for x in postfix(arg, symbols)] + [codes[a.op], 0]  # type: ignore[arg-type]

    out: list[int] = []
    for i, (monomial, c) in enumerate(size.terms):
        factors = [atom(a) for a in monomial]
        if c != 1 or not factors:
            factors.insert(0, [0, c])
        for j, f in enumerate(factors):
            out += [*f, 3, 0] if j else f
        out += [2, 0] if i else []
    return out


def describe(program: Program) -> str:
    """The program as text: one line an operation, with its shapes; then weights, caches and inputs."""
    slots = program.slots

    def show(i: int) -> str:
        return f"{slots[i].name}:{slots[i].dtype}[{', '.join(map(str, slots[i].shape))}]" if i >= 0 else ""

    lines = [
        f"program: {len(program.ops)} operations, {len(program.weights)} weights, {len(program.caches)} caches, "
        + ("states run together" if program.row_local else "states run one by one")
    ]
    lines += [f"input  {show(i)}" for i in program.inputs.values()]
    for number, op in enumerate(program.ops):
        outs = " ".join(show(i) for i in op.outputs if i >= 0)
        ins = " ".join(slots[i].name for i in op.inputs if i >= 0)
        cache = op.ints["layer"][0] if op.kind == "attend" else -1
        detail = op.note + (f" cache {cache}" if cache >= 0 else "")
        note = f"  ({detail})" if detail else ""
        lines.append(f"{number:4d}  {op.kind:<9} {ins} -> {outs}{note}")
    lines += [f"output {show(i)}" for i in program.outputs.values()]
    return "\n".join(lines)
