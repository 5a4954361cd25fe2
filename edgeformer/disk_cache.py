"""Files that only save time: what was worked out about a model once, in the user's cache folder.

Whoever deletes them loses a moment at the next load. EDGEFORMER_CACHE names another folder; set to nothing, none is
kept. Small entries begin with the SHA-256 of what follows, so a damaged one is no entry. Large ones are mapped, and
written behind the caller's back: they end with the SHA-256 of what they say about themselves and of a sample.
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
from threading import Event, Thread
from time import monotonic

import numpy as np
from numpy.typing import NDArray
from platformdirs import user_cache_dir

MOST = 256  # entries; the longest unused go first
SHARE = 5  # and all together at most a fifth of what would be free on the disk without them
SMALL = 1 << 20  # bytes of an entry that makes no room worth having
PATIENCE = 2.0
_DIGEST = 32
_STEP = 8 << 20  # bytes written at once, between two looks at whether the process ends
_SAMPLES, _SAMPLE = 256, 4096

Bytes = NDArray[np.uint8]


def folder() -> Path | None:
    """Where entries lie; None where none are kept."""
    named = os.environ.get("EDGEFORMER_CACHE")
    if named is not None:
        return Path(named).expanduser() if named else None
    return Path(user_cache_dir("edgeformer", appauthor=False))


def size() -> tuple[int, int]:
    """(entries, bytes) in the folder."""
    place = folder()
    entries = _entries(place) if place is not None else []
    return len(entries), sum(length for _, length, _ in entries)


def key(*parts: bytes) -> str:
    """64 hex digits that differ when any part does."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()


def read(name: str) -> bytes | None:
    """What was written under `name`; None where that is nothing, or damaged."""
    place = folder()
    if place is None:
        return None
    try:
        entry = (place / name).read_bytes()
    except OSError:
        return None
    if hashlib.sha256(memoryview(entry)[_DIGEST:]).digest() != entry[:_DIGEST]:
        return None
    _used(place / name)
    return entry[_DIGEST:]


def write(name: str, data: bytes) -> None:
    """Keep `data` under `name`. A folder that cannot be written to keeps nothing, which is no error."""
    place = folder()
    if place is not None:
        _replace(place / name, [hashlib.sha256(data).digest(), data])


# ------------------------------------------------------------------------------------------- large entries, mapped


def read_mapped(name: str) -> tuple[Bytes, bytes] | None:
    """(data, note) as `write_behind` was given them, the data mapped and read-only; None where that is nothing.

    A sample of the data is checked, not all of it: that would take as long as working it out. It is read, so that no
    page of the map is touched before its use.
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
    _used(place / name)
    return data, note


def write_behind(name: str, data: Bytes, note: bytes) -> None:
    """Keep `data` (not empty) under `name`, with a `note`, while the caller goes on; `data` must not change any more.

    What is too large for the disk is not kept; nor is what is not written PATIENCE seconds after the process's end.
    """
    place = folder()
    if place is None:
        return
    parts: list[bytes | memoryview] = [data[at : at + _STEP].data for at in range(0, len(data), _STEP)]
    digest = _digest(lambda at, count: data[at : at + count].data, len(data), note)
    parts.append(note + len(data).to_bytes(8, "little") + digest)
    writer = Thread(target=_replace, args=(place / name, parts), name="edgeformer cache", daemon=True)
    _writers[:] = [*(other for other in _writers if other.is_alive()), writer]
    writer.start()


def finish() -> None:
    """Wait until all that was to be kept is."""
    while _writers:
        _writers.pop().join()


_writers: list[Thread] = []
_ending = Event()


@atexit.register
def _give_up() -> None:
    until = monotonic() + PATIENCE
    for writer in _writers:
        writer.join(max(0.0, until - monotonic()))
    _ending.set()
    finish()


def _digest(read_at: Callable[[int, int], bytes | memoryview], length: int, note: bytes) -> bytes:
    """Of the note, the length and evenly spread pieces of the data, of small data all."""
    digest = hashlib.sha256(note + length.to_bytes(8, "little"))
    each = min(_SAMPLE, length)
    for i in range(_SAMPLES if length > each else 1):
        digest.update(read_at((length - each) * i // (_SAMPLES - 1), each))
    return digest.digest()


# ---------------------------------------------------------------------------------------------------------- the folder


def _replace(path: Path, parts: Iterable[bytes | memoryview]) -> None:
    """Write the parts to `path`: readers see the old entry or the new one."""
    partial = path.with_name(f"{path.name}.{os.getpid()}-{secrets.token_hex(4)}.partial")
    parts = list(parts)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if sum(map(len, parts)) > _room(path.parent, _entries(path.parent)):
            return
        with partial.open("wb") as file:
            for part in parts:
                if _ending.is_set():
                    raise OSError("the process ends")
                file.write(part)
        os.replace(partial, path)
        _trim(path.parent)
    except OSError:
        with suppress(OSError):
            partial.unlink()


def _used(path: Path) -> None:
    with suppress(OSError):
        os.utime(path)


def _entries(place: Path) -> list[tuple[float, int, str]]:
    """(time of use, bytes, name), the longest unused first."""
    found = []
    with suppress(OSError):
        for entry in os.scandir(place):
            with suppress(OSError):
                stat = entry.stat()
                found.append((stat.st_mtime, stat.st_size, entry.path))
    return sorted(found)


def _room(place: Path, entries: list[tuple[float, int, str]]) -> int:
    """Bytes that the folder, which holds these, may hold."""
    held = sum(length for _, length, _ in entries)
    return (shutil.disk_usage(place).free + held) // SHARE


def _trim(place: Path) -> None:
    entries = _entries(place)
    room = _room(place, entries)
    held, count = sum(length for _, length, _ in entries), len(entries)
    for _, length, path in entries[:-1]:
        if count > MOST or (held > room and length > SMALL):
            with suppress(OSError):
                os.unlink(path)
                held, count = held - length, count - 1
