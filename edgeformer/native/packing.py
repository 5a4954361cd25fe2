"""Weights from the mapped file into packed memory, without ever holding both whole."""

from __future__ import annotations

import mmap
from typing import Any

import numpy as np

from edgeformer.errors import EngineUnavailable
from edgeformer.native.graph import Graph
from edgeformer.native.passes.linear import Weight, load_rows
from edgeformer.native.program import LANES, PackedWeight

PACK_ROWS = 8192  # rows packed from one read of the mapped file, so that peak memory stays near the packed size


def pack(native: Any, number: int, weight: PackedWeight, g: Graph) -> None:
    """Read the weight from the mapped file and pack it, some thousand rows at a time."""
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
                    native.pack(number, q, scale, minimum, end - at, part.block, rows)
                except EngineUnavailable as e:
                    raise EngineUnavailable(f"weight {part.q}: {e}") from e
                packed_row += end - at
        _release(g, part)


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
