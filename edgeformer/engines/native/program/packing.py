"""The weights that the C++ engine is given, without ever holding them twice.

Packing is most of a later load, and takes new memory for what the bundle's file holds in another order. So the packed
bytes are kept (`cache`) beside the lowered program that they belong to, and mapped by the next load: they are read when
they are first used, and processes that run the same model share one copy.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Callable, Iterator, Mapping
from threading import Thread
from typing import Any

import numpy as np

from edgeformer import disk_cache
from edgeformer.engines.native.ir.graph import Array, Constant
from edgeformer.engines.native.ir.weight import Weight
from edgeformer.engines.native.program.prepared import Prepared

HALVES = ("all", "gate", "up")  # csrc/bindings/bindings_program.cpp: which panels of 16 packed rows a part fills
PACK_ROWS = 8192  # rows packed from one read of the mapped file, so that peak memory stays near the packed size

# What `native.pack` takes: number of the weight, a name for messages, q, scales, minima, rows, columns of a block,
# first packed row, an index of HALVES, and the arrays whose mapped pages are given back.
Piece = tuple[int, str, Array, Array | None, Array | None, int, int, int, int, list[Array]]


def give_weights(native: Any, p: Prepared, meanwhile: Callable[[], object] = lambda: None) -> int:
    """Give the engine its weights, packed before or now; call `meanwhile` once on the way.

    Returns how many have a scale or a minimum that was rounded, see `pack`.

    Raises:
        EngineUnavailable: see `pack`.
    """
    name = f"{p.entry}.packed" if p.entry else ""
    kept = disk_cache.read_mapped(name) if name else None
    if kept is not None:
        data, about = kept[0], json.loads(kept[1])
        if about["files"] == p.file_states and len(data) == native.packed_size:
            meanwhile()
            native.use_packed(data)
            return int(about["rounded"])
    rounded = pack(native, p, meanwhile)
    if name and native.packed_size:
        note = json.dumps({"files": p.file_states, "rounded": rounded})
        disk_cache.write_behind(name, native.packed(), note.encode())
    return rounded


def pack(native: Any, p: Prepared, meanwhile: Callable[[], object] = lambda: None) -> int:
    """Pack all weights into the engine, by all its threads; call `meanwhile` once while they are at work.

    Weights that the file holds as the engine takes them are read from its mapped pages, and these are given back.
    Returns how many have a scale or a minimum without an exact float16 value, which was rounded: to nearest even, so it
    is off by at most 2**-12 of itself, or 2**-25 where it is below 2**-14.

    Raises:
        EngineUnavailable: a weight or a scale that the packed types cannot hold.
    """
    as_stored = [n for n, w in enumerate(p.weights) if all(_is_as_stored(part, p) for part, _ in w.parts)]
    others = sorted(set(range(len(p.weights))) - set(as_stored))
    rounded: set[int] = set()
    failure: list[BaseException] = []

    def work() -> None:
        try:
            pack_all([piece for number in as_stored for piece in pieces(number, p)])
            for number in others:  # one at a time: each is a copy
                for piece in pieces(number, p):
                    pack_all([piece])
        except BaseException as e:
            failure.append(e)

    def pack_all(these: list[Piece]) -> None:
        rounded.update(piece[0] for piece, inexact in zip(these, native.pack(these), strict=True) if inexact)

    worker = Thread(target=work, name="edgeformer pack")
    worker.start()
    try:
        meanwhile()
    finally:
        worker.join()
    if failure:
        raise failure[0]
    return len(rounded)


def pieces(number: int, p: Prepared) -> Iterator[Piece]:
    """Weight `number` some thousand rows at a time."""
    for part, role in p.weights[number].parts:
        packed_row = 0
        for start, stop in part.ranges():
            for at in range(start, stop, PACK_ROWS):
                end = min(stop, at + PACK_ROWS)
                rows = _rows(p.constants, part, at, end)
                read: list[Array | None] = list(rows)
                if not _is_as_stored(part, p):  # copies of what is given back as a whole
                    read = [p.constants[name].data for name in (part.q, part.scale, part.min) if name and end == stop]
                mapped = [a for a in read if a is not None and _is_mapped(a)]
                yield (number, part.q, *rows, end - at, part.block, packed_row, HALVES.index(role), mapped)
                packed_row += end - at


def _is_as_stored(w: Weight, p: Prepared) -> bool:
    """Whether `_rows` gives views of the constants rather than copies."""
    q = p.constants[w.q]
    return not w.transposed and q.data.dtype != np.float16 and not (q.dtype == "int4" and w.k % 2)


def _rows(
    constants: Mapping[str, Constant], w: Weight, start: int, stop: int
) -> tuple[Array, Array | None, Array | None]:
    """Stored rows [start, stop) of a weight as C-contiguous arrays: (q, scale, minimum).

    q: int4 bytes (flat), int8 [rows, k] or float32 [rows, k]; scale and minimum: float32 [rows, ceil(k / block)], the
    minimum as the file has it: of weights less 8.
    """
    q = constants[w.q]
    if w.type == "f32":
        rows = q.data[:, start:stop].T if w.transposed else q.data[start:stop]
        return np.ascontiguousarray(rows, np.float32), None, None
    scale = np.ascontiguousarray(constants[w.scale].data[start:stop], np.float32)
    if q.dtype == "int4":
        if w.k % 2:  # the rows begin in the middle of a byte
            nibbles = q.array()[start:stop].reshape(-1) & 15
            nibbles = np.append(nibbles, np.zeros(nibbles.size % 2, np.int8))
            data = (nibbles[::2] | (nibbles[1::2] << 4)).astype(np.uint8)
        else:
            data = np.ascontiguousarray(q.data[start * w.k // 2 : stop * w.k // 2])
    else:
        data = np.ascontiguousarray(q.data[start:stop])
    minimum = np.ascontiguousarray(constants[w.min].data[start:stop], np.float32) if w.min else None
    return data, scale, minimum


def _is_mapped(array: Array) -> bool:
    base: Any = array
    while base is not None and not isinstance(base, mmap.mmap):
        base = getattr(base, "base", None)
    return base is not None
