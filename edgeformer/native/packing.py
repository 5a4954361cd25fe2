"""What the C++ engine is given: the program as plain data, and the weights, without ever holding them twice."""

from __future__ import annotations

import mmap
from typing import Any

import numpy as np

from edgeformer.errors import EngineUnavailable
from edgeformer.native.graph import Graph
from edgeformer.native.passes.linear import Weight, load_rows
from edgeformer.native.program import LANES, PackedWeight, Program, postfix

WEIGHT_TYPES = ("q4a", "q4", "q8", "q8x16", "f32")  # csrc/kernels/kernels.h: enum class WeightType
SLOT_TYPES = ("f32", "i64", "bool", "quant")  # csrc/program.h: enum class DType
PACK_ROWS = 8192  # rows packed from one read of the mapped file, so that peak memory stays near the packed size


def spec(p: Program) -> dict[str, Any]:
    """The program as plain data; csrc/bindings_program.cpp reads it."""
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


def pack(native: Any, number: int, weight: PackedWeight, g: Graph) -> bool:
    """Read the weight from the mapped file and pack it, some thousand rows at a time.

    True where a scale or a minimum had no exact float16 value and was rounded: to nearest even, so it is off by at most
    2**-12 of itself, or 2**-25 where it is below 2**-14.
    """
    rounded = False
    for part, role in weight.parts:
        packed_row = 0
        for start, stop in part.ranges():
            for at in range(start, stop, PACK_ROWS):
                end = min(stop, at + PACK_ROWS)
                rows = np.arange(packed_row, packed_row + end - at, dtype=np.int64)
                if role != "all":  # panels of gate and up in turn
                    rows = rows // LANES * (2 * LANES) + rows % LANES + (LANES if role == "up" else 0)
                q, scale, minimum = load_rows(g, part, at, end)
                try:
                    rounded |= native.pack(number, q, scale, minimum, end - at, part.block, rows)
                except EngineUnavailable as e:
                    raise EngineUnavailable(f"weight {part.q}: {e}") from e
                packed_row += end - at
        _release(g, part)
    return rounded


def _release(g: Graph, weight: Weight) -> None:
    """Give the mapped pages of a packed weight back; they are clean, so a later reader gets them from the file."""
    for name in (weight.q, weight.scale, weight.min):
        data = g.constants[name].data if name else None
        base: Any = data
        while base is not None and not isinstance(base, mmap.mmap):
            base = getattr(base, "base", None)
        if data is None or base is None or not data.nbytes:
            continue
        first = np.frombuffer(base, np.uint8, 1).ctypes.data
        start = (data.ctypes.data - first + mmap.PAGESIZE - 1) // mmap.PAGESIZE * mmap.PAGESIZE
        length = data.ctypes.data - first + data.nbytes - start
        if length >= mmap.PAGESIZE:
            base.madvise(mmap.MADV_DONTNEED, start, length // mmap.PAGESIZE * mmap.PAGESIZE)
