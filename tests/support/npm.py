"""Packages of npm for tests, installed once into a folder of `build/`, and programs of Node.js."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def npm_folder(name: str, packages: Sequence[str]) -> Path:
    """`build/NAME` with these packages (`package@version`) in its node_modules.

    Without node and npm the test is skipped; in CI it fails.
    """
    if shutil.which("npm") is None or shutil.which("node") is None:
        told = "node and npm are not installed: apt-get install nodejs npm"
        pytest.fail(told) if os.environ.get("CI") else pytest.skip(told)
    place = ROOT / "build" / name
    stamp = place / ".packages"
    if not stamp.exists() or stamp.read_text() != repr(tuple(packages)):
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        (place / "package.json").write_text(f'{{"name": "{name}", "private": true, "type": "module"}}')
        # No scripts of theirs: some fetch browsers or GPU libraries from other hosts.
        run("npm", "install", "--ignore-scripts", "--no-audit", "--no-fund", *packages, cwd=place)
        stamp.write_text(repr(tuple(packages)))
    return place


def run(*command: object, cwd: Path | None = None) -> str:
    """The program's output.

    Raises:
        AssertionError: it failed.
    """
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=560, cwd=cwd)
    assert done.returncode == 0, f"{' '.join(map(str, command))[:500]}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout
