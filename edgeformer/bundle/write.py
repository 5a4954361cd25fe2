"""Writes a bundle atomically: a temporary folder beside the target, fsynced, checked, then renamed."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from edgeformer.bundle.bundle import Bundle, refusal, sha256
from edgeformer.bundle.manifest import FORMAT, FORMAT_VERSION, MANIFEST, Json, manifest_problems, read_json
from edgeformer.errors import BundleError

OLD = "-old"  # the end of the name that a replaced folder has for a moment


@contextmanager
def write_bundle(path: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[Path]:
    """A temporary folder beside `path` that becomes `path` when the block ends without an error.

    The block fills the folder and calls `seal`. Then everything is fsynced, opened once more with `check="hashes"`, and
    renamed. On any exception the temporary folder is removed and `path` is as it was. After a kill or a power cut
    `path` is the old folder or the new one, whole; a leftover `.NAME.partial-*` is removed by the next write to the
    same path. (Replacing a folder is one atomic exchange on Linux; elsewhere two renames, with a moment between them
    in which `path` does not exist; the next write puts the old folder back.)

    Raises:
        BundleError: `path` exists and `overwrite` is false; or it is not a bundle, or holds files that are no part of
            one, which replacing it would lose; or what the block wrote is not a whole bundle.
        OSError: the disk refuses.
    """
    final = Path(os.path.realpath(path))  # a link to a folder stays a link
    final.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(final)
    check_target(final, overwrite)
    temporary = final.parent / f".{final.name}.partial-{os.getpid()}-{secrets.token_hex(4)}"
    os.mkdir(temporary)
    lock = _lock(temporary)
    try:
        yield temporary
        _fsync_tree(temporary)
        Bundle.open(temporary, check="hashes")
        check_target(final, overwrite)
        _put_in_place(temporary, final)
        _fsync(final.parent)
    finally:
        # The temporary name now belongs to the failed attempt or, after an exchange, to the old bundle.
        shutil.rmtree(temporary, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def seal(folder: str | os.PathLike[str], manifest: Mapping[str, Any]) -> Json:
    """Write `edgeformer.json` into `folder` and return its content: `manifest` with `files` filled in.

    `format` and `format_version` are filled in too where they are missing.

    Raises:
        BundleError: the manifest misses fields or has wrong ones (all in one message), or the folder holds something
            else than plain files.
    """
    folder = Path(folder)
    files: Json = {}
    problems = []
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.name == MANIFEST:
            continue
        if not entry.is_file(follow_symlinks=False):
            problems.append(f"{entry.name} is not a plain file: a bundle is one flat folder of files")
            continue
        files[entry.name] = {"size": entry.stat().st_size, "sha256": sha256(folder / entry.name)}
    sealed: Json = {"format": FORMAT, "format_version": FORMAT_VERSION, **manifest, "files": files}
    problems += manifest_problems(sealed)
    try:
        text = json.dumps(sealed, indent=2, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        problems.append(f"{MANIFEST} cannot be written as JSON: {error}")
    if problems:
        raise refusal(folder, problems)
    partial = folder / f".{MANIFEST}.partial"
    partial.write_text(text + "\n", encoding="utf-8")
    _fsync(partial)
    os.replace(partial, folder / MANIFEST)
    sealed_again: Json = json.loads(text)
    return sealed_again


def check_target(path: str | os.PathLike[str], overwrite: bool) -> None:
    """Refuses early what `write_bundle` would refuse at its end.

    Raises:
        BundleError: `path` exists and may not be replaced.
    """
    final = Path(os.path.realpath(path))
    if not os.path.lexists(final):
        return
    if not overwrite:
        raise BundleError(f"{final} already exists; choose another name, remove it, or allow overwriting it.")
    if not final.is_dir():
        raise BundleError(f"{final} is a file, not a bundle folder; choose another name.")
    found = set(os.listdir(final))
    if not found:
        return
    if MANIFEST not in found:
        raise BundleError(f"{final} is a folder but not a bundle (no {MANIFEST}), so it is not replaced.")
    try:
        known = set(read_json(final / MANIFEST)["files"]) | {MANIFEST}
    except (BundleError, KeyError, TypeError) as error:
        raise BundleError(f"{final} has no readable {MANIFEST}, so it is not replaced; remove it yourself.") from error
    strangers = sorted(found - known)
    if strangers:
        raise BundleError(
            f"{final} holds files that are no part of its bundle and would be lost: {', '.join(strangers[:5])}"
            f"{', ...' if len(strangers) > 5 else ''}. Move them away first."
        )


def _put_in_place(temporary: Path, final: Path) -> None:
    if not os.path.lexists(final):
        os.rename(temporary, final)
        return
    if _exchange(temporary, final):
        return
    old = temporary.with_name(temporary.name + OLD)
    lock = _lock(final)
    try:
        os.rename(final, old)
        try:
            os.rename(temporary, final)
        except BaseException:
            os.rename(old, final)
            raise
        shutil.rmtree(old, ignore_errors=True)
    finally:
        if lock is not None:
            os.close(lock)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two folders in one step (renameat2 with RENAME_EXCHANGE); False where the system cannot."""
    import ctypes

    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    here, swap = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    done: int = renameat2(here, os.fsencode(one), here, os.fsencode(other), swap)
    return done == 0


def _remove_leftovers(final: Path) -> None:
    """Clean up after killed writers; a folder whose writer is still alive is locked and stays."""
    prefix = f".{final.name}.partial-"
    for entry in os.scandir(final.parent):
        if not entry.name.startswith(prefix) or not entry.is_dir(follow_symlinks=False):
            continue
        lock = _lock(Path(entry.path))
        if lock is None:
            continue
        if entry.name.endswith(OLD) and not os.path.lexists(final):
            os.rename(entry.path, final)  # killed between two renames: this is the bundle
        else:
            shutil.rmtree(entry.path, ignore_errors=True)
        os.close(lock)


def _lock(folder: Path) -> int | None:
    """A descriptor that holds `folder`'s lock until closed or the process dies; None where another holds it."""
    try:
        import fcntl
    except ImportError:  # Windows: leftovers stay until removed by hand
        return None
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _fsync_tree(folder: Path) -> None:
    for entry in os.scandir(folder):
        if entry.is_file(follow_symlinks=False):
            _fsync(Path(entry.path))
    _fsync(folder)


def _fsync(path: Path) -> None:
    if os.name == "nt" and path.is_dir():
        return  # Windows has no descriptor for a folder
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
