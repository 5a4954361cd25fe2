"""Files that are replaced whole: a kill or a power failure leaves the old one or the new one."""

from __future__ import annotations

import os
import secrets
import stat
from contextlib import suppress
from pathlib import Path

from edgeformer.machine import WINDOWS, FolderLock, fsync, lock_folder, move


def replace_file(path: Path, data: bytes) -> None:
    """Write `data` to `path`: after a kill or a power failure the file is the old one or the new one, whole.

    A link stays a link, and the file keeps its permissions. The next write to the same path removes what killed
    writers left; one that runs holds a lock on its file.

    Raises:
        OSError: it cannot be written; an old file is as before.
    """
    final = Path(os.path.realpath(path))
    prefix = f".{final.name}.partial-"
    for left in [entry for entry in os.scandir(final.parent) if entry.name.startswith(prefix)]:
        with suppress(OSError):  # gone meanwhile; on Windows an open file is not deleted
            _delete_unlocked(Path(left.path))
    partial, lock = _locked_file(final.parent, prefix)
    try:
        with open(partial, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        with suppress(FileNotFoundError):
            os.chmod(partial, stat.S_IMODE(os.stat(final).st_mode))
        move(partial, final, replace=True)
        fsync(final.parent)
    except BaseException:
        with suppress(OSError):
            partial.unlink()
        raise
    finally:
        if lock is not None:
            lock.close()


def _locked_file(folder: Path, prefix: str) -> tuple[Path, FolderLock | None]:
    """A new empty file; locked, except on Windows."""
    while True:
        path = folder / f"{prefix}{os.getpid()}-{secrets.token_hex(4)}"
        path.touch(exist_ok=False)
        if WINDOWS:
            return path, None
        with suppress(FileNotFoundError):  # another writer took it for a leftover before it was locked
            lock = lock_folder(path)
            if lock is not None:
                if path.exists():
                    return path, lock
                lock.close()


def _delete_unlocked(path: Path) -> None:
    lock = None if WINDOWS else lock_folder(path)
    if WINDOWS or lock is not None:
        path.unlink()
    if lock is not None:
        lock.close()
