"""Checks at a load that the files of a bundle are those that were exported, by the SHA-256 of each.

A hash of all files takes about a second a gigabyte, on a CPU without SHA instructions four. So `load` computes it once,
of a large bundle in a thread while the engine packs weights, and the disk cache remembers the files by size, time and
inode. What changes a file without changing these (a failing disk, somebody who sets the clock back) is found by
`check="hashes"` alone.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Event
from typing import Literal

from edgeformer import disk_cache
from edgeformer.bundle.bundle import Bundle
from edgeformer.bundle.hashes import bundle_error, hash_problems
from edgeformer.errors import InputError
from edgeformer.threads import Beside

Check = Literal["once", "sizes", "hashes"]

SMALL = 16 << 20  # bytes of a bundle that is hashed before the load: a thread would save at most 16 ms


def opened(bundle: str | os.PathLike[str] | Bundle, check: Check) -> Bundle:
    """The bundle at a path, or an opened one, which is opened again for `check="hashes"`.

    Raises:
        BundleError: as `Bundle.open`.
        InputError: there is no such check.
    """
    if check not in ("once", "sizes", "hashes"):
        raise InputError(f"check is {check!r}, expected 'once', 'sizes' or 'hashes'.")
    if isinstance(bundle, Bundle) and check != "hashes":
        return bundle
    path = bundle.path if isinstance(bundle, Bundle) else bundle
    return Bundle.open(path, "hashes" if check == "hashes" else "sizes")


@contextmanager
def verified(bundle: Bundle, check: Check) -> Iterator[None]:
    """With `check="once"` checks the hashes of all files while the block runs.

    A bundle that passed before on this machine, and whose files did not change since, is not read.

    A wrong hash is the error that is raised, also where the block failed: a damaged file is the likely cause.

    Raises:
        BundleError: a file has other content than when it was exported, or changes now.
    """
    if check != "once":
        yield
        return
    states = _states(bundle)
    entry = disk_cache.key(b"hashed", bundle.fingerprint.encode(), json.dumps(states).encode()) + ".hashed"
    if disk_cache.read(entry) is not None:
        yield
        return
    problems: list[str] = []
    if sum(size for _, size, *_ in states) <= SMALL:
        problems += hash_problems(bundle.path, bundle.manifest["files"])
        if problems:
            raise bundle_error(bundle.path, problems)
        yield
    else:
        with _hashed_beside(bundle, problems):
            yield
    if not problems and _states(bundle) != states:
        problems.append("its files changed while they were read")
    if problems:
        raise bundle_error(bundle.path, problems)
    disk_cache.write(entry, b"")


@contextmanager
def _hashed_beside(bundle: Bundle, problems: list[str]) -> Iterator[None]:
    """Adds the problems while the block runs; after it, where no thread could be started."""
    stop = Event()
    worker = Beside(lambda: hash_problems(bundle.path, bundle.manifest["files"], stop))
    worker.start()
    try:
        yield
    except Exception as error:
        problems += worker.result()
        if problems:
            raise bundle_error(bundle.path, problems) from error
        raise
    except BaseException:  # Ctrl-C
        stop.set()
        worker.settle()
        raise
    try:
        problems += worker.result()
    finally:
        stop.set()  # after Ctrl-C nobody wants the rest


def _states(bundle: Bundle) -> list[tuple[str, int, int, int, int]]:
    """What changes when a file is written or replaced: (name, size, time of content, time of inode, inode)."""
    found = []
    for name in sorted(bundle.manifest["files"]):
        try:
            info = os.stat(bundle.path / name)
        except OSError:
            found.append((name, -1, 0, 0, 0))
            continue
        found.append((name, info.st_size, info.st_mtime_ns, info.st_ctime_ns, info.st_ino))
    return found
