"""Writes a bundle atomically: a temporary folder beside the target, fsynced, checked, then renamed."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from edgeformer.bundle.bundle import Bundle
from edgeformer.bundle.ed25519 import SIGNATURE
from edgeformer.bundle.hashes import bundle_error, sha256
from edgeformer.bundle.manifest import FORMAT, FORMAT_VERSION, MANIFEST, Json, manifest_problems, read_json
from edgeformer.bundle.names import windows_name_problem
from edgeformer.errors import BundleError
from edgeformer.files import remove_folder, replace_file
from edgeformer.machine import WINDOWS, fsync, lock_folder, move

OLD = "-old"  # suffix of the temporary name of a replaced folder


@contextmanager
def write_bundle(path: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[Path]:
    """A temporary folder beside `path`; it is renamed to `path` when the block ends without an error.

    The block fills the folder and calls `seal`. Then all files are fsynced, the bundle is opened with
    `check="hashes"`, and the folder is renamed. After an exception the temporary folder is removed and `path` is
    unchanged. After a kill or a power failure `path` is the complete old folder or the complete new one; the next write
    to the same path removes the leftover `.NAME.partial-*`. (On Linux a folder is replaced by one atomic exchange.
    Elsewhere two renames are needed and `path` does not exist between them; after a kill at that moment the next
    write restores the old folder.)

    Raises:
        BundleError: `path` exists and `overwrite` is false; `path` is not a bundle, or has other files that would be
            deleted; or the block did not write a valid bundle.
        OSError: a file cannot be written.
    """
    final = Path(os.path.realpath(path))  # replaces the folder that a link points to, not the link
    final.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(final)
    check_target(final, overwrite)
    temporary = final.parent / f".{final.name}.partial-{os.getpid()}-{secrets.token_hex(4)}"
    lock = None
    try:
        os.mkdir(temporary)
        lock = lock_folder(temporary)
        yield temporary
        _fsync_tree(temporary)
        Bundle.open(temporary, check="hashes")
        check_target(final, overwrite)
        _put_in_place(temporary, final)
        fsync(final.parent)
    finally:
        # The temporary name is now that of the incomplete bundle or, after an exchange, of the old bundle.
        try:
            remove_folder(temporary)
        except BaseException:  # Ctrl-C
            remove_folder(temporary)
            raise
        finally:
            if lock is not None:
                lock.close()


def seal(folder: str | os.PathLike[str], manifest: Mapping[str, Any]) -> Json:
    """Write `edgeformer.json` into `folder` and return its content: `manifest` plus the table `files`.

    `format` and `format_version` are added if missing.

    Raises:
        BundleError: fields of the manifest are missing or wrong, or the folder contains something other than plain
            files; the message lists all problems.
    """
    folder = Path(folder)
    files: Json = {}
    problems = []
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.name in (MANIFEST, SIGNATURE):
            continue
        if not entry.is_file(follow_symlinks=False):
            problems.append(f"{entry.name} is not a plain file: a bundle is one flat folder of files")
            continue
        problem = windows_name_problem(entry.name)
        if problem is not None:
            problems.append(
                f"{entry.name!r} is no name for a file of a bundle, which is copied to any system: {problem}"
            )
            continue
        files[entry.name] = {"size": entry.stat().st_size, "sha256": sha256(folder / entry.name)}
    sealed: Json = {"format": FORMAT, "format_version": FORMAT_VERSION, **manifest, "files": files}
    problems += manifest_problems(sealed)
    try:
        text = json.dumps(sealed, indent=2, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        problems.append(f"{MANIFEST} cannot be written as JSON: {error}")
    if problems:
        raise bundle_error(folder, problems)
    replace_file(folder / MANIFEST, (text + "\n").encode())
    sealed_again: Json = json.loads(text)
    return sealed_again


def check_target(path: str | os.PathLike[str], overwrite: bool) -> None:
    """Check that `write_bundle` may write to `path`, for example before a long export.

    Raises:
        BundleError: `path` exists and may not be replaced.
    """
    final = Path(os.path.realpath(path))
    problem = windows_name_problem(final.name) if WINDOWS else None
    if problem is not None:
        raise BundleError(f"{final.name!r} cannot be the name of a bundle: {problem}; choose another name.")
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
        known = set(read_json(final / MANIFEST)["files"]) | {MANIFEST, SIGNATURE}
    except (BundleError, KeyError, TypeError) as error:
        raise BundleError(f"{final} has no readable {MANIFEST}, so it is not replaced; remove it yourself.") from error
    others = sorted(found - known)
    if others:
        raise BundleError(
            f"{final} has files that are not part of its bundle and would be lost: {', '.join(others[:5])}"
            f"{', ...' if len(others) > 5 else ''}. Move them away first."
        )


def _put_in_place(temporary: Path, final: Path) -> None:
    if not os.path.lexists(final):
        move(temporary, final)
        return
    if _exchange(temporary, final):
        return
    old = temporary.with_name(temporary.name + OLD)
    lock = lock_folder(old if WINDOWS else final)  # on Windows it goes by the name, elsewhere with the folder
    try:
        move(final, old)
        try:
            move(temporary, final)
        except BaseException:
            move(old, final)
            raise
        remove_folder(old)
    finally:
        if lock is not None:
            lock.close()


def _exchange(one: Path, other: Path) -> bool:
    """Swap two folders atomically (renameat2 with RENAME_EXCHANGE); False if the system does not support it."""
    import ctypes

    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    here, swap = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    done: int = renameat2(here, os.fsencode(one), here, os.fsencode(other), swap)
    return done == 0


def _remove_leftovers(final: Path) -> None:
    """Remove the temporary folders of killed writers. A running writer holds a lock on its folder, so it is kept."""
    prefix = f".{final.name}.partial-"
    for entry in os.scandir(final.parent):
        if not entry.name.startswith(prefix) or not entry.is_dir(follow_symlinks=False):
            continue
        lock = lock_folder(Path(entry.path))
        if lock is None:
            continue
        if entry.name.endswith(OLD) and not os.path.lexists(final):
            move(Path(entry.path), final)  # the writer was killed between its two renames: restore the bundle
        else:
            remove_folder(entry.path)
        lock.close()
    for file in final.parent.glob(f"{prefix}*.lock"):  # Windows: of writers killed after they had renamed the folder
        if not file.with_suffix("").exists():
            lock = lock_folder(file.with_suffix(""))
            if lock is not None:
                lock.close()


def _fsync_tree(folder: Path) -> None:
    for entry in os.scandir(folder):
        if entry.is_file(follow_symlinks=False):
            fsync(Path(entry.path))
    fsync(folder)
