"""The SHA-256 of files, compared with those in a manifest."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from threading import Event
from typing import Any

from edgeformer.bundle.manifest import MANIFEST
from edgeformer.errors import BundleError

_PIECE = 1 << 20  # bytes hashed between two looks at whether the result is still wanted; two are in memory


def hash_problems(folder: Path, files: Mapping[str, Any], stop: Event | None = None) -> list[str]:
    """The files whose SHA-256 is not that of the manifest's table `files`, one sentence each. Ends early at `stop`."""
    problems = []
    for name, entry in files.items():
        try:
            found = sha256(folder / name, stop)
        except OSError as error:
            problems.append(f"{name} cannot be read: {error.strerror or error}")
            continue
        if stop is not None and stop.is_set():
            break
        if found != entry["sha256"]:
            problems.append(
                f"{name} has the right size but other content than when it was exported (its SHA-256 is "
                f"{found[:12]}..., {MANIFEST} says {entry['sha256'][:12]}...)"
            )
    return problems


def sha256(path: Path, stop: Event | None = None) -> str:
    """The SHA-256 of a file as 64 hex digits. The GIL is free while it is computed. Once `stop` is set, of a part."""
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while (piece := file.read(_PIECE)) and not (stop is not None and stop.is_set()):
            digest.update(piece)
    return digest.hexdigest()


def bundle_error(folder: Path, problems: list[str]) -> BundleError:
    """An error that lists all problems of a bundle, at most 50."""
    if len(problems) == 1:
        return BundleError(f"{folder}: {problems[0]}. Export or copy the bundle again.")
    shown = problems[:50]
    lines = "".join(f"\n  - {problem}" for problem in shown)
    more = f"\n  - and {len(problems) - len(shown)} more" if len(problems) > len(shown) else ""
    return BundleError(f"{folder} has {len(problems)} problems:{lines}{more}\nExport or copy the bundle again.")
