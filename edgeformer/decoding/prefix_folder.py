"""The prefix cache on disk: one file a chunk, for other processes and later ones.

A file's name is the hash of the model, the type of its KV cache, the format, and all token ids up to the end of the
chunk. All ISAs write the same bits, so a folder may be shared by machines of one byte order. Layout:

    MAGIC (8 bytes) | CRC-32 of what follows (4 bytes) | the name's hash (32 bytes) | what `KvChunk.save` wrote

CRC-32 and not SHA-256: of 1,024 tokens' keys and values (12.5 MB of int8) it takes 3 ms instead of 19.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import zlib
from array import array
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from threading import Lock
from time import time
from typing import TYPE_CHECKING, cast

from edgeformer import disk_cache
from edgeformer.engines.base import KvChunk
from edgeformer.errors import InputError, StateError

if TYPE_CHECKING:
    from edgeformer import _native
    from edgeformer.engines.native.engine import NativeEngine

MAGIC = b"efprefx1"
SUFFIX = ".kv"
DEFAULT_LIMIT = 2 << 30  # bytes of all files
_DIGEST = 32
_HEAD = len(MAGIC) + 4
_STALE = 3600  # seconds after which a file that another process did not finish is removed


class PrefixFolder:
    """The chunks of one native engine in a folder. Files of other models may be in it too.

    `path` is created if it is missing; the default is `prefixes` in the disk cache's folder. The least recently used
    files are deleted above `limit_bytes`, which counts the files of all models, and above 1/5 of the free disk space.
    A damaged file is removed when it is read. Files whose names do not end with `.kv` are not touched.

    Raises:
        InputError: the engine is not native, or the disk cache is disabled and no path is given.
    """

    def __init__(self, engine: NativeEngine, path: Path | None = None, limit_bytes: int = DEFAULT_LIMIT) -> None:
        if engine.name != "native":
            raise InputError(
                f"A prefix cache in a folder needs engine='native', this one is {engine.name!r}: its keys and values "
                "depend on the machine and on the version of ONNX Runtime. Use a prefix cache in memory."
            )
        if path is None:
            place = disk_cache.folder()
            if place is None:
                raise InputError("The disk cache is disabled (EDGEFORMER_CACHE is empty); give the folder's path.")
            path = place / "prefixes"
        self.path = path
        self.limit_bytes = limit_bytes
        self.root = hashlib.sha256(MAGIC + engine.fingerprint.encode()).hexdigest()
        self._engine = engine
        self._trimming = Lock()
        self._spare = 0  # bytes that may be written before the next look at the whole folder

    def key(self, parent: str, ids: Sequence[int]) -> str:
        """The name of a chunk: 64 hex digits. `parent` is the name of the chunk before, or `root`."""
        return hashlib.sha256(bytes.fromhex(parent) + array("q", ids).tobytes()).hexdigest()

    def read(self, key: str) -> KvChunk | None:
        """The chunk of that name; None if there is none. A file that is damaged or of another format is removed."""
        path = self._file(key)
        try:
            data = memoryview(path.read_bytes())
        except OSError:
            return None
        body = data[_HEAD:]
        with suppress(StateError):
            if data[:_HEAD] == _head(body) and body[:_DIGEST].hex() == key:
                chunk = self._engine.chunk_from_bytes(body[_DIGEST:])
                with suppress(OSError):
                    os.utime(path)
                return chunk
        with suppress(OSError):
            path.unlink()
        return None

    def write(self, chunks: Sequence[tuple[str, KvChunk]]) -> None:
        """Store (name, chunk) pairs in a background thread; `edgeformer.disk_cache.finish` waits for it.

        Nothing is stored if the folder cannot be written to.
        """

        def work() -> None:
            with suppress(OSError):
                self.path.mkdir(parents=True, exist_ok=True)
                for key, chunk in chunks:
                    if not self._file(key).exists():
                        body = bytes.fromhex(key) + cast("_native.KvChunk", chunk).save()
                        disk_cache.write_atomically(self._file(key), [_head(body), body])
                        self._spare -= len(body)
                if self._spare <= 0 and self._trimming.acquire(blocking=False):
                    try:
                        self._spare = self._trim() // 8
                    finally:
                        self._trimming.release()

        disk_cache.in_background(work)

    def _file(self, key: str) -> Path:
        return self.path / (key + SUFFIX)

    def _trim(self) -> int:
        """Delete the least recently used files above the limits, and what interrupted writers left; the bytes left.

        Looking at all files takes time and memory for each of them, so it is not done at every write, and they are
        listed only where some must go.
        """
        used = 0
        for entry in os.scandir(self.path):
            with suppress(OSError):
                if entry.name.endswith(SUFFIX):
                    used += entry.stat().st_size
                elif _is_partial(entry.name) and entry.stat().st_mtime < time() - _STALE:
                    os.unlink(entry.path)
        room = min(self.limit_bytes, (shutil.disk_usage(self.path).free + used) // disk_cache.DISK_DIVISOR)
        for size, path in self._oldest() if used > room else ():
            if used <= room:
                break
            with suppress(OSError):
                os.unlink(path)
                used -= size
        return max(0, room - used)

    def _oldest(self) -> list[tuple[int, str]]:
        """(bytes, path) of each file, the least recently used first."""
        files = []
        for entry in os.scandir(self.path):
            with suppress(OSError):
                if entry.name.endswith(SUFFIX):
                    stat = entry.stat()
                    files.append((stat.st_mtime, stat.st_size, entry.path))
        return [(size, path) for _, size, path in sorted(files)]


def _is_partial(name: str) -> bool:
    return SUFFIX in name and name.endswith(".partial")


def _head(body: bytes | memoryview) -> bytes:
    return MAGIC + zlib.crc32(body).to_bytes(4, "little")
