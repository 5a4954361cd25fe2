"""Files that are replaced whole: a kill or a power failure leaves the old one or the new one. Temporary folders."""

from __future__ import annotations

import os
import secrets
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from edgeformer.machine import WINDOWS, FolderLock, fsync, lock_folder, move


@contextmanager
def temporary_folder(parent: Path | None = None, prefix: str = "edgeformer-") -> Iterator[Path]:
    """A new folder in `parent`, by default the system's for temporary files; removed at the end.

    Also where Ctrl-C comes while the system makes it, when `tempfile` does not know its name yet, or removes it.

    Raises:
        OSError: it cannot be made.
    """
    path = (Path(tempfile.gettempdir()) if parent is None else parent) / f"{prefix}{secrets.token_hex(8)}"
    try:
        os.mkdir(path, 0o700)
        yield path
    finally:
        try:
            remove_folder(path)
        except BaseException:  # Ctrl-C
            remove_folder(path)
            raise


def remove_folder(path: str | os.PathLike[str]) -> None:
    """Deletes a folder and all in it, as far as the system allows; links are not followed.

    `shutil.rmtree` raises an OSError of its own where Ctrl-C comes: it closes a file twice.
    """
    entries: list[os.DirEntry[str]] = []
    with suppress(OSError):
        entries = list(os.scandir(path))
    for entry in entries:
        if entry.is_dir(follow_symlinks=False):
            remove_folder(entry.path)
        else:
            with suppress(OSError):
                os.unlink(entry.path)
    with suppress(OSError):
        os.rmdir(path)


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
