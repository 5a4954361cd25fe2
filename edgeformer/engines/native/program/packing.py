"""Gives the C++ engine its packed weights, with no weight in memory twice.

Packing is the slowest step of a load whose program is cached, and takes new memory for what the bundle's file has in
another order. So the packed bytes go to the disk cache beside their program, and the next load maps them: pages are
read when they are first used, and processes that run the same model share one copy.

Each step reads all weights, and each page of the map costs a look-up. Where the system keeps the file in small pages,
decoding from the map is slower: 3 to 7 % on a machine, 20 % in a virtual one. So the bytes are then copied into huge
pages, if there is memory for it.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeformer import disk_cache
from edgeformer.bundle.signature import Array
from edgeformer.engines.in_flight import in_flight
from edgeformer.engines.native.ir.graph import Constant
from edgeformer.engines.native.ir.weight import Weight
from edgeformer.engines.native.program.executable import Executable
from edgeformer.machine import available_memory, has_huge_pages, mapped_in_huge_pages
from edgeformer.threads import Beside

if TYPE_CHECKING:
    from edgeformer import _native

COPY_ROOM = 4  # a copy of the weights is made where so many would fit into the free memory
MOSTLY = 0.9  # of a map in huge pages: with 0.52 a step of SmolLM2 took 11 % longer than with 0.98
PACK_ROWS = 8192  # rows packed from one read of the mapped file, so that peak memory stays near the packed size


@dataclass(frozen=True, slots=True)
class WeightRows:
    """Some rows of one weight, for `_native.Engine.pack`, which reads these fields by name.

    Attributes:
        weight: its number in the program.
        name: for messages.
        q: int4 nibbles as uint8 [rows * k / 2], int8 or float32 [rows, k].
        scale, min: float32 [rows, ceil(k / block)]; None if the type has none. `min` is that of weights less 8.
        block: columns that share a scale.
        first_row: packed row of row 0, among those of `role`.
        role: "all", "gate" or "up", see `PackedWeight`.
        mapped: arrays whose pages of a mapped file are released after packing.
    """

    weight: int
    name: str
    q: Array
    scale: Array | None
    min: Array | None
    rows: int
    block: int
    first_row: int
    role: str
    mapped: list[Array]


def give_weights(
    native: _native.Engine, e: Executable, while_packing: Callable[[], object] = lambda: None, *, may_copy: bool = True
) -> int:
    """Give the engine its weights, from the disk cache or packed now. Calls `while_packing` once.

    `may_copy`: whether weights of the disk cache may take memory of their own.

    Returns how many have a rounded scale or minimum, see `pack`.

    Raises:
        EngineUnavailable: see `pack`.
    """
    name = f"{e.cache_key}.packed" if e.cache_key else ""
    cached = disk_cache.read_mapped(name) if name else None
    if cached is not None:
        data, note = cached[0], json.loads(cached[1])
        if note["files"] == e.file_states and len(data) == native.packed_size:
            if may_copy and _is_better_copied(data):
                _beside(lambda: native.copy_packed(data, mapped=True), while_packing)
            else:
                while_packing()
                native.use_packed(data)
            return int(note["rounded"])
    rounded = pack(native, e, while_packing)
    if name and native.packed_size:
        text = json.dumps({"files": e.file_states, "rounded": rounded})
        disk_cache.write_behind(name, native.packed(), text.encode())
    return rounded


def pack(native: _native.Engine, e: Executable, while_packing: Callable[[], object] = lambda: None) -> int:
    """Pack all weights into the engine, with all its threads. Calls `while_packing` once meanwhile; the GIL is free.

    Weights that the file has in the form that the engine takes are read from its mapped pages, which are then released.
    Returns how many have a scale or a minimum without an exact float16 value. Such a value is rounded to nearest even:
    the error is at most 2**-12 of it, or 2**-25 if it is below 2**-14.

    Raises:
        EngineUnavailable: a weight or a scale that the packed types cannot hold.
    """
    as_stored = [n for n, w in enumerate(e.weights) if all(_is_as_stored(part, e) for part, _ in w.parts)]
    others = sorted(set(range(len(e.weights))) - set(as_stored))
    rounded: set[int] = set()

    def work() -> None:
        pack_all([part for number in as_stored for part in weight_rows(number, e)])
        for number in others:  # one at a time: each is a copy
            for part in weight_rows(number, e):
                pack_all([part])

    def pack_all(parts: list[WeightRows]) -> None:
        rounded.update(part.weight for part, inexact in zip(parts, native.pack(parts), strict=True) if inexact)

    _beside(work, while_packing)
    return len(rounded)


def _beside(work: Callable[[], None], other: Callable[[], object]) -> None:
    """Calls `work` in a thread of its own, and `other` here meanwhile; one after the other where no thread begins."""

    def run() -> None:
        with in_flight:
            work()

    worker = Beside(run)
    worker.start()
    try:
        other()
    except Exception:
        worker.settle()
        raise
    except BaseException:  # Ctrl-C waits for nothing: the thread ends on its own, and does not begin now
        worker.claim()
        raise
    worker.result()


def _is_better_copied(data: np.memmap[Any, Any]) -> bool:
    """Whether much of the map is in small pages, memory has huge ones, and there is enough of it."""
    if not has_huge_pages() or (available_memory() or 0) < COPY_ROOM * data.nbytes:
        return False
    in_huge = mapped_in_huge_pages(data)
    return in_huge is not None and in_huge < MOSTLY * data.nbytes


def weight_rows(number: int, e: Executable) -> Iterator[WeightRows]:
    """Weight `number`, PACK_ROWS rows at a time."""
    for part, role in e.weights[number].parts:
        first_row = 0
        for start, stop in part.ranges():
            for at in range(start, stop, PACK_ROWS):
                end = min(stop, at + PACK_ROWS)
                q, scale, minimum = _rows(e.constants, part, at, end)
                read: list[Array | None] = [q, scale, minimum]
                if not _is_as_stored(part, e):  # copies: the stored arrays are released after their last rows
                    read = [e.constants[name].data for name in (part.q, part.scale, part.min) if name and end == stop]
                yield WeightRows(
                    weight=number,
                    name=part.q,
                    q=q,
                    scale=scale,
                    min=minimum,
                    rows=end - at,
                    block=part.block,
                    first_row=first_row,
                    role=role,
                    mapped=[a for a in read if a is not None and _is_mapped(a)],
                )
                first_row += end - at


def _is_as_stored(w: Weight, e: Executable) -> bool:
    """Whether `_rows` gives views of the constants rather than copies."""
    q = e.constants[w.q]
    return not w.transposed and q.data.dtype != np.float16 and not (q.dtype == "int4" and w.k % 2)


def _rows(
    constants: Mapping[str, Constant], w: Weight, start: int, stop: int
) -> tuple[Array, Array | None, Array | None]:
    """Stored rows [start, stop) of a weight as C-contiguous arrays: (q, scale, minimum).

    Their shapes and types are those of `WeightRows`.
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
