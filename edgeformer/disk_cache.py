"""The disk cache: results about a model that are computed once, such as packed weights.

Every entry can be deleted at any time; the next load then computes it again. The folder is the user's cache folder, or
EDGEFORMER_CACHE; an empty EDGEFORMER_CACHE disables the cache. A small entry is the SHA-256 of its data, then the data;
a damaged one counts as missing. A large entry is memory-mapped, and written by a background thread. Its layout:

    data | note | length of data (8 bytes, little-endian) | SHA-256 of note, length and a sample of the data
"""

from __future__ import annotations

import atexit
import hashlib
import os
import secrets
import shutil
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from threading import Event
from time import monotonic
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from platformdirs import user_cache_dir

from edgeformer.machine import move
from edgeformer.threads import Beside

MAX_ENTRIES = 256  # the least recently used are deleted first
DISK_DIVISOR = 5  # all entries use at most 1/5 of the space that would be free without them
SMALL = 1 << 20  # bytes; entries up to this size are not deleted to free space
EXIT_TIMEOUT = 2.0  # seconds that the end of the process waits for writers
_DIGEST = 32
_STEP = 8 << 20  # bytes per write; a writer checks after each whether the process ends
_SAMPLES, _SAMPLE = 256, 4096  # number of samples, and bytes of each

Bytes = NDArray[np.uint8]
if TYPE_CHECKING:
    Mapped = np.memmap[Any, np.dtype[np.uint8]]


def folder() -> Path | None:
    """The folder of the entries; None if the cache is disabled."""
    named = os.environ.get("EDGEFORMER_CACHE")
    if named is not None:
        return Path(named).expanduser() if named else None
    return Path(user_cache_dir("edgeformer", appauthor=False))


def size() -> tuple[int, int]:
    """(number of entries, their bytes) in the folder."""
    place = folder()
    entries = _entries(place) if place is not None else []
    return len(entries), sum(length for _, length, _ in entries)


def key(*parts: bytes) -> str:
    """A hash of the parts as 64 hex digits; it depends on where each part ends."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()


def read(name: str) -> bytes | None:
    """The data written under `name`; None if it is missing or damaged."""
    place = folder()
    if place is None:
        return None
    try:
        entry = (place / name).read_bytes()
    except OSError:
        return None
    if hashlib.sha256(memoryview(entry)[_DIGEST:]).digest() != entry[:_DIGEST]:
        return None
    _mark_used(place / name)
    return entry[_DIGEST:]


def write(name: str, data: bytes) -> None:
    """Store `data` under `name`. Does nothing if the folder cannot be written to."""
    place = folder()
    if place is not None:
        _replace(place / name, [hashlib.sha256(data).digest(), data])


# ------------------------------------------------------------------------------------------- large entries, mapped


def read_mapped(name: str) -> tuple[Mapped, bytes] | None:
    """(data, note) as given to `write_behind`; None if the entry is missing or damaged. The data is mapped, read-only.

    Only a sample of the data is checked, because a check of all of it would take as long as computing it again. The
    sample is read from the file, not from the map, so that no page is mapped before its first use.
    """
    place = folder()
    if place is None:
        return None
    try:
        with (place / name).open("rb") as file:

            def read_at(at: int, count: int) -> bytes:
                file.seek(at)
                return file.read(count)

            end = file.seek(0, os.SEEK_END) - 8 - _DIGEST
            length = int.from_bytes(read_at(end, 8), "little") if end >= 0 else 0
            if not 0 < length <= end:
                return None
            note = read_at(length, end - length)
            if _digest(read_at, length, note) != read_at(end + 8, _DIGEST):
                return None
            data = np.memmap(file, np.uint8, "r", shape=(length,))
    except OSError:
        return None
    _mark_used(place / name)
    return data, note


def write_behind(name: str, data: Bytes, note: bytes) -> None:
    """Store `data` (not empty) and `note` under `name` in a background thread. `data` must not change afterwards.

    Nothing is stored if it would exceed the limit of disk space, or if writing takes longer than EXIT_TIMEOUT seconds
    after the end of the main thread.
    """
    place = folder()
    if place is None:
        return
    parts: list[bytes | memoryview] = [data[at : at + _STEP].data for at in range(0, len(data), _STEP)]
    digest = _digest(lambda at, count: data[at : at + count].data, len(data), note)
    parts.append(note + len(data).to_bytes(8, "little") + digest)
    path = place / name
    in_background(lambda: _replace(path, parts))


def in_background(work: Callable[[], None]) -> None:
    """Call `work`, which writes by `write_atomically`, in a thread that ends at most EXIT_TIMEOUT s after the main one.

    `work` must expect an OSError of `write_atomically` then. Where no thread begins, `finish` calls it.
    """
    writer = Beside(work)
    _writers[:] = [*(other for other in _writers if not other.wait(0)), writer]
    writer.start()


def finish() -> None:
    """Wait until all background writes have ended."""
    while _writers:
        _writers.pop().result()


_writers: list[Beside[None]] = []
_ending = Event()
if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_writers.clear)  # the threads are the parent's


@atexit.register
def _stop_writers() -> None:
    until = monotonic() + EXIT_TIMEOUT
    for writer in _writers:
        writer.wait(max(0.0, until - monotonic()))
    _ending.set()
    finish()


def _digest(read_at: Callable[[int, int], bytes | memoryview], length: int, note: bytes) -> bytes:
    """The SHA-256 of the note, the length and evenly spaced samples of the data (all of it if it is one sample)."""
    digest = hashlib.sha256(note + length.to_bytes(8, "little"))
    each = min(_SAMPLE, length)
    for i in range(_SAMPLES if length > each else 1):
        digest.update(read_at((length - each) * i // (_SAMPLES - 1), each))
    return digest.digest()


# ---------------------------------------------------------------------------------------------------------- the folder


def _replace(path: Path, parts: Iterable[bytes | memoryview]) -> None:
    """Write the parts to `path` atomically, and delete old entries above the limits. Errors are ignored."""
    parts = list(parts)
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        if sum(map(len, parts)) <= _room(path.parent, _entries(path.parent)):
            write_atomically(path, parts)
            _trim(path.parent)


def write_atomically(path: Path, parts: Iterable[bytes | memoryview]) -> None:
    """Write the parts to `path`: another process sees all of them or none.

    Raises:
        OSError: the file cannot be written, or the process ends.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}-{secrets.token_hex(4)}.partial")
    try:
        with partial.open("wb") as file:
            for part in parts:
                if _ending.is_set():
                    raise OSError("the process ends")
                file.write(part)
        move(partial, path, replace=True)
    except OSError:
        with suppress(OSError):
            partial.unlink()
        raise


def _mark_used(path: Path) -> None:
    with suppress(OSError):
        os.utime(path)


def _entries(place: Path) -> list[tuple[float, int, str]]:
    """(time of last use, bytes, path) of each entry, the least recently used first."""
    found = []
    with suppress(OSError):
        for entry in os.scandir(place):
            with suppress(OSError):
                stat = entry.stat()
                found.append((stat.st_mtime, stat.st_size, entry.path))
    return sorted(found)


def _room(place: Path, entries: list[tuple[float, int, str]]) -> int:
    """The bytes that all entries together may use, given the present ones."""
    used = sum(length for _, length, _ in entries)
    return (shutil.disk_usage(place).free + used) // DISK_DIVISOR


def _trim(place: Path) -> None:
    entries = _entries(place)
    room = _room(place, entries)
    used, count = sum(length for _, length, _ in entries), len(entries)
    for _, length, path in entries[:-1]:
        if count > MAX_ENTRIES or (used > room and length > SMALL):
            with suppress(OSError):
                os.unlink(path)
                used, count = used - length, count - 1
