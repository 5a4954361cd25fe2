"""A virtual environment for each peer, `.venv-peer-NAME`, from pinned packages."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from bench.report import ROOT

NICE = ("nice", "-n", "19")


class SetupFailed(Exception):
    """A peer cannot be installed or converted here; the message is shown in place of its numbers."""


@dataclass(frozen=True)
class Environment:
    """A virtual environment: `pip install packages`, with `variables` set (build options)."""

    name: str
    packages: tuple[str, ...] = ()
    pip_options: tuple[str, ...] = ()
    variables: dict[str, str] = field(default_factory=dict)
    unwanted: tuple[str, ...] = ()  # dependencies to take out again

    @property
    def folder(self) -> Path:
        return ROOT / f".venv-peer-{self.name}"

    @property
    def python(self) -> Path:
        """The interpreter; for an environment without packages, the running one."""
        return self.folder / "bin" / "python" if self.packages else Path(sys.executable)

    @property
    def site_packages(self) -> Path:
        return next(self.folder.glob("lib/python3*/site-packages"))

    def make(self, log: Path) -> None:
        """Installs what is missing; a second call with the same packages does nothing.

        Raises:
            SetupFailed: pip failed; the message holds its last line about an error.
        """
        wanted = "\n".join((*self.packages, *self.pip_options, *(f"{k}={v}" for k, v in self.variables.items())))
        stamp = self.folder / ".peer"
        if not self.packages or (stamp.exists() and stamp.read_text() == wanted):
            return
        print(f"install {', '.join(self.packages)} (log: {log})", file=sys.stderr)
        pip = [str(self.folder / "bin" / "python"), "-m", "pip", "--disable-pip-version-check"]
        commands = [
            [sys.executable, "-m", "venv", str(self.folder)],
            [*pip, "install", *self.pip_options, *self.packages],
        ]
        commands += [[*pip, "uninstall", "-y", *self.unwanted]] if self.unwanted else []
        for command in commands:
            run(command, log, self.variables, f"pip install {' '.join(self.packages)}")
        stamp.write_text(wanted)


def run(command: list[str], log: Path, variables: dict[str, str], what: str) -> None:
    """Runs a command at low priority; its output goes to `log`.

    Raises:
        SetupFailed: it ended with another code than 0.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w", encoding="utf-8") as file:
        done = subprocess.run([*NICE, *command], env=os.environ | variables, stdout=file, stderr=file)
    if done.returncode:
        lines = [
            line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()
        ]
        errors = [line for line in lines if "error" in line.lower()]
        raise SetupFailed(f"{what} failed: {(errors or lines or ['no output'])[-1][:200]}")
