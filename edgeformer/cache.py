"""Small files that only save time: what was worked out about a model once, in the user's cache folder.

Whoever deletes them loses a moment at the next load. EDGEFORMER_CACHE names another folder; set to nothing, none is
kept. Every entry begins with the SHA-256 of what follows, so a damaged one is no entry.
"""

from __future__ import annotations

import hashlib
import os
import secrets
from contextlib import suppress
from pathlib import Path

from platformdirs import user_cache_dir

MOST = 256  # entries; the longest unused go first
_DIGEST = 32


def folder() -> Path | None:
    """Where entries lie; None where none are kept."""
    named = os.environ.get("EDGEFORMER_CACHE")
    if named is not None:
        return Path(named).expanduser() if named else None
    return Path(user_cache_dir("edgeformer", appauthor=False))


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
    with suppress(OSError):
        os.utime(place / name)  # used now
    return entry[_DIGEST:]


def write(name: str, data: bytes) -> None:
    """Keep `data` under `name`. A folder that cannot be written to keeps nothing, which is no error."""
    place = folder()
    if place is None:
        return
    partial = place / f"{name}.{os.getpid()}-{secrets.token_hex(4)}.partial"
    try:
        place.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(hashlib.sha256(data).digest() + data)
        os.replace(partial, place / name)  # readers see the old entry or the new one
        used = sorted((entry.stat().st_mtime, entry.name) for entry in os.scandir(place))
        for _, oldest in used[:-MOST]:
            os.unlink(place / oldest)
    except OSError:
        with suppress(OSError):
            partial.unlink()
