"""The lowered graph as a program: a list of operations on numbered slots, printable, and all that C++ needs to run it.

A slot is a tensor whose sizes are expressions of a few symbols (`batch`, `sequence`, `kept`, ...); a view shares
another slot's memory. Weights are matrices to be packed; operations name them by number.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from edgeformer.engines.native.ir.dims import Atom, Shape, Size
from edgeformer.engines.native.ir.graph import Array
from edgeformer.engines.native.ir.weight import WEIGHT_TYPES, Weight

if TYPE_CHECKING:
    from edgeformer.engines.native.ir.cache import Cache

SLOT_TYPES = ("f32", "i64", "bool", "quant", "quant64", "quant128")  # csrc/program/program.h: enum class DType
LANES = 16  # rows of a weight panel, as csrc/kernels/kernels.h packs them


@dataclass(slots=True)
class Slot:
    """A tensor of the program. dtype: "f32", "i64", "bool", or "quant" (int8 rows with a scale for each 32
    columns; "quant64", "quant128": for each 64 or 128).
    """

    name: str
    dtype: str
    shape: Shape
    view_of: int = -1
    constant: Array | None = None


@dataclass(slots=True)
class Op:
    """One operation: slot numbers (-1: not given), weight numbers, and its own numbers by name."""

    kind: str
    inputs: list[int]
    outputs: list[int]
    ints: dict[str, list[int]] = field(default_factory=dict)
    floats: dict[str, list[float]] = field(default_factory=dict)
    sizes: dict[str, list[Size]] = field(default_factory=dict)
    weights: list[int] = field(default_factory=list)
    note: str = ""


@dataclass(slots=True)
class PackedWeight:
    """A matrix to be packed: its parts, each with the first packed row of every 16 rows or, for None, in order."""

    type: str
    n: int
    k: int
    parts: list[tuple[Weight, str]]  # "all", "gate" or "up": which panels the part fills


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
    batch_local: bool = False  # no caches, and the items of a batch never meet
    row_symbols: tuple[str, str] = ("", "")
    past_symbol: str = ""  # the caches' length


def spec(p: Program) -> dict[str, Any]:
    """The program as plain data; csrc/bindings/bindings_program.cpp reads it."""
    sizes: dict[Any, int] = {}

    def size(s: Any) -> int:
        return sizes.setdefault(s, len(sizes))

    slots = [
        (s.name, SLOT_TYPES.index(s.dtype), [size(d) for d in s.shape], s.view_of, s.constant) for s in p.slots
    ]  # fmt: skip
    ops = [
        (
            o.kind,
            o.inputs,
            o.outputs,
            o.weights,
            o.ints,
            o.floats,
            {k: [size(d) for d in v] for k, v in o.sizes.items()},
        )
        for o in p.ops
    ]
    weights = [(WEIGHT_TYPES.index(w.type), w.n, w.k) for w in p.weights]
    batch, sequence = p.row_symbols
    return {
        "symbols": p.symbols,
        "slots": slots,
        "ops": ops,
        "weights": weights,
        "caches": [(c.kv_heads, c.head_dim, c.value_dim, c.plain) for c in p.caches],
        "inputs": list(p.inputs.values()),
        "outputs": list(p.outputs.values()),
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
