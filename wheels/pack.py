"""From a pure wheel and an extension to a wheel of one system."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from wheels.build import ROOT
from wheels.targets import Target


def pure_wheel(folder: Path) -> Path:
    """The package without its extension, as a wheel in `folder`.

    Raises:
        SystemExit: pip cannot build it.
    """
    shutil.rmtree(folder, ignore_errors=True)
    run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(folder), str(ROOT)],
        EDGEFORMER_NATIVE="0",
    )
    return next(folder.glob("*.whl"))


def source_archive(folder: Path) -> Path:
    """The sdist in `folder`; it builds without git.

    Raises:
        SystemExit: it cannot be made.
    """
    code = f"from setuptools import build_meta; build_meta.build_sdist({str(folder.absolute())!r})"
    folder.mkdir(parents=True, exist_ok=True)
    run([sys.executable, "-c", code])
    return max(folder.glob("*.tar.gz"), key=lambda path: path.stat().st_mtime)


def platform_wheel(pure: Path, extension: Path, target: Target, python: str, folder: Path) -> Path:
    """The pure wheel with the extension, tagged for a system and a Python, in `folder`."""
    work = folder.absolute() / ".unpacked"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    run([sys.executable, "-m", "wheel", "unpack", "--dest", str(work), str(pure)])
    (root,) = work.iterdir()
    shutil.copy2(extension, root / "edgeformer" / target.extension(python))
    (facts,) = root.glob("*.dist-info/WHEEL")
    lines = [line for line in facts.read_text().splitlines() if not line.startswith(("Tag:", "Root-Is-Purelib:"))]
    facts.write_text("\n".join([*filter(None, lines), "Root-Is-Purelib: false", f"Tag: {target.tag(python)}", ""]))
    run([sys.executable, "-m", "wheel", "pack", "--dest-dir", str(folder), str(root)])
    shutil.rmtree(work)
    return next(folder.glob(f"*-{target.tag(python)}.whl"))


def run(command: list[str], **environment: str) -> None:
    """Runs a command in the repository.

    Raises:
        SystemExit: it failed; the message holds what it printed.
    """
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, **environment})
    if done.returncode:
        raise SystemExit(f"failed: {' '.join(command)}\n{done.stdout}{done.stderr}")
