"""Fresh virtual environments as users have them, kept between runs while pyproject.toml stays the same."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def run(*command: str | Path, **options) -> subprocess.CompletedProcess[str]:
    """The finished command; fails with its output when it ends with another code than 0."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, **options)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done


def build_wheel(folder: Path, **environment: str) -> Path:
    """The wheel that `pip wheel .` makes of a clean copy of this tree: nothing built before can slip into it."""
    copy = folder / "source"
    leave = shutil.ignore_patterns(".*", "build", "out", "runs", "tests", "*.so", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, copy, ignore=leave)
    command = (sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", folder, copy)
    run(*command, env={**os.environ, **environment})
    return next(folder.glob("edgeformer-*.whl"))


class Environment:
    """A virtual environment with some packages, and the wheel under test installed anew."""

    def __init__(self, name: str, wheel: Path, *packages: str) -> None:
        self.path = ROOT / f".venv-{name}"
        self.python = self.path / "bin" / "python"
        wanted = hashlib.sha256((ROOT / "pyproject.toml").read_bytes() + repr(packages).encode()).hexdigest()
        stamp = self.path / ".packages"
        if not stamp.exists() or stamp.read_text() != wanted:
            venv.create(self.path, clear=True, with_pip=True)
            self.pip("install", "--quiet", wheel, *packages)
            stamp.write_text(wanted)
        self.pip("install", "--quiet", "--no-deps", "--force-reinstall", wheel)

    def pip(self, *arguments: str | Path) -> None:
        run(self.python, "-m", "pip", *arguments)

    def script(self, text: str, *arguments: str | Path, **options) -> str:
        """What the Python program `text` prints, run outside of the source tree."""
        return run(self.python, "-c", text, *arguments, cwd=self.path, **options).stdout
