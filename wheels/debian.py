"""Packages of Debian, unpacked into a folder: nothing is installed, and apt's own settings and lists stay."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path


def unpacked(folder: Path, suites: Sequence[str], packages: Sequence[str], architecture: str = "") -> Path | None:
    """`folder` with the files of these packages, from the mirror that this machine uses.

    None if the machine is no Debian, or its mirror has no such suite or package.
    """
    if not shutil.which("apt-get"):
        return None
    text = "".join(path.read_text() for path in Path("/etc/apt").rglob("*") if path.suffix in (".list", ".sources"))
    mirror = re.search(r"https?://\S+/debian\b/?(?=\s)", text)
    if mirror is None:
        return None
    apt = folder.with_name(folder.name + "-apt").absolute()
    for name in ("lists/partial", "archives/partial", "packages"):
        (apt / name).mkdir(parents=True, exist_ok=True)
    (apt / "sources.list").write_text("".join(f"deb {mirror[0]} {suite} main\n" for suite in suites))
    options = [f"-oDir::Etc::sourcelist={apt}/sources.list", "-oDir::Etc::sourceparts=none"]
    options += [f"-oDir::State::lists={apt}/lists", f"-oDir::Cache={apt}", "-oAPT::Sandbox::User=root", "-qq"]
    if architecture:
        options += [f"-oAPT::Architecture={architecture}", f"-oAPT::Architectures={architecture}"]
    for command in (["update"], ["download", *packages]):
        if subprocess.run(["apt-get", *options, *command], cwd=apt / "packages", capture_output=True).returncode:
            return None
    folder.mkdir(parents=True, exist_ok=True)
    for archive in sorted((apt / "packages").glob("*.deb")):
        subprocess.run(["dpkg", "-x", str(archive), str(folder)], check=True)
    return folder
