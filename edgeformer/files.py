"""Files that are replaced whole: a kill or a power failure leaves the old one or the new one. Temporary folders."""

from __future__ import annotations

import _thread
import os
import secrets
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from edgeformer.machine import WINDOWS, FolderLock, fsync, lock_folder, move

_LARGE = 32 << 20  # bytes: the system takes 0.02 s and more to free the blocks of such a file


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

    Large files lose their names here, and their blocks (0.2 s for the float weights of 135M parameters) while the
    caller goes on: a thread closes them. `shutil.rmtree` raises an OSError of its own where Ctrl-C comes: it closes a
    file twice.
    """
    opened: list[int] = []
    try:
        _remove_folder(path, opened)
    finally:
        if opened:
            try:
                _thread.start_new_thread(_close, (opened,))
            except (RuntimeError, MemoryError):  # the system gives no thread
                _close(opened)


def _remove_folder(path: str | os.PathLike[str], opened: list[int]) -> None:
    entries: list[os.DirEntry[str]] = []
    with suppress(OSError):
        entries = list(os.scandir(path))
    for entry in entries:
        if entry.is_dir(follow_symlinks=False):
            _remove_folder(entry.path, opened)
            continue
        with suppress(OSError):
            if not WINDOWS and entry.is_file(follow_symlinks=False) and entry.stat().st_size >= _LARGE:
                opened.append(os.open(entry.path, os.O_RDONLY))
        with suppress(OSError):
            os.unlink(entry.path)
    try:
        os.rmdir(path)
    except OSError:
        if opened:  # NFS gives a file that is open another name, and deletes it when it is closed
            _close(opened)
            with suppress(OSError):
                os.rmdir(path)


def _close(files: list[int]) -> None:
    while files:
        os.close(files.pop())


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
