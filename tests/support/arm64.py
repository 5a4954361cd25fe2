"""An arm64 Linux under qemu-user: CPython of Debian's arm64 packages, and wheels for aarch64."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

from support.wheel_builds import built_wheel, missing, wanted

from wheels.build import ROOT
from wheels.debian import unpacked
from wheels.targets import TARGETS

SUITE, PYTHON = "trixie", "3.13"
DEBIAN = (
    "libc6 libgcc-s1 libstdc++6 zlib1g libexpat1 libssl3t64 libffi8 libbz2-1.0 liblzma5 libzstd1 libsqlite3-0 "
    f"libuuid1 python{PYTHON}-minimal libpython{PYTHON}-minimal libpython{PYTHON}-stdlib"
).split()
# What edgeformer imports, without what these packages depend on for other uses; onnxruntime for the engine `cpu`.
PACKAGES = (  # noqa: SIM905
    "numpy onnx ml_dtypes protobuf typing_extensions tokenizers jinja2 markupsafe platformdirs typer click shellingham "
    "annotated-doc pydantic pydantic_core annotated-types typing-inspection rich markdown-it-py mdurl pygments tqdm "
    "llguidance onnxruntime flatbuffers packaging"
).split()


# One processor as Linux describes a Cortex-A76. qemu-user passes on the host's /proc/cpuinfo; onnxruntime finds no ARM
# processor in it, and crashes at import. A file of this path under `-L` comes before the host's.
CPUINFO = """\
processor\t: {number}
BogoMIPS\t: 48.00
Features\t: fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp
CPU implementer\t: 0x41
CPU architecture: 8
CPU variant\t: 0x4
CPU part\t: 0xd0b
CPU revision\t: 1

"""


class Arm64:
    """CPython with edgeformer in a folder of arm64 files; made once and kept in build/."""

    def __init__(self) -> None:
        wanted()
        if shutil.which("qemu-aarch64") is None:
            missing("needs qemu-aarch64: apt-get install qemu-user")
        self.place = ROOT / "build" / "arm64"
        self.root = self.place / "root"
        recipe = hashlib.sha256(repr((SUITE, DEBIAN, PACKAGES)).encode()).hexdigest()
        stamp = self.place / ".ready"
        if not stamp.exists() or stamp.read_text() != recipe:
            shutil.rmtree(self.place, ignore_errors=True)
            if unpacked(self.root, [SUITE], DEBIAN, "arm64") is None:
                missing(f"Debian's arm64 packages of {SUITE} are not to be had here")
            (self.root / "lib").symlink_to("usr/lib")  # of the package base-files
            self._install(*PACKAGES)
            stamp.write_text(recipe)
        (self.root / "proc").mkdir(exist_ok=True)
        processors = (CPUINFO.format(number=number) for number in range(os.cpu_count() or 1))
        (self.root / "proc/cpuinfo").write_text("".join(processors))
        wheel = built_wheel(TARGETS["linux_aarch64"], PYTHON, self.place / "wheel")
        self._install(str(wheel), "--force-reinstall", "--upgrade")

    def _install(self, *packages: str) -> None:
        where = ["--target", str(self.place / "site"), "--python-version", PYTHON, "--only-binary=:all:"]
        for platform in ("manylinux_2_28_aarch64", "manylinux_2_27_aarch64", "manylinux2014_aarch64"):
            where += ["--platform", platform]
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", *where, *packages]
        subprocess.run(command, check=True)

    def run(self, cpu: str, *arguments: str | Path, given: str = "", **environment: str) -> str:
        """What CPython prints with these arguments on an emulated processor of qemu (`-cpu`)."""
        command = ["qemu-aarch64", "-cpu", cpu, "-L", self.root, self.root / f"usr/bin/python{PYTHON}", *arguments]
        kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
        kept |= {"PYTHONHOME": str(self.root / "usr"), "PYTHONPATH": str(self.place / "site"), "EDGEFORMER_CACHE": ""}
        kept["PYTHONSAFEPATH"] = "1"  # else `-m edgeformer` runs the sources in the current folder, not the wheel
        done = subprocess.run(
            [str(part) for part in command],
            input=given,
            capture_output=True,
            text=True,
            env={**kept, **environment},
            timeout=900,
        )
        assert done.returncode == 0, f"{done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout
