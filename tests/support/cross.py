"""Building C++ runners for several architectures, and running them under qemu-user."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted(p for p in (ROOT / "csrc").rglob("*.cpp") if p.parent.name != "bindings")  # their stems differ
# -O1: compiling takes longer than running, even under emulation
FLAGS = [f"-I{ROOT / 'csrc'}", "-std=c++17", "-O1", "-ffp-contract=off", "-fno-math-errno", "-pthread"]
# architecture, -cpu of qemu (None: this machine), the tables that must be usable there
CPUS = [
    ("aarch64", "max", ["neon_i8mm", "neon_dotprod", "scalar"]),
    ("aarch64", "cortex-a76", ["neon_dotprod", "scalar"]),
    ("aarch64", "cortex-a57", ["scalar"]),
    ("x86_64", "Haswell", ["avx2", "scalar"]),
    ("x86_64", "Nehalem", ["scalar"]),
]


def tool(name: str) -> str:
    path = shutil.which(name)
    if path:
        return path
    if os.environ.get("EDGEFORMER_REQUIRE_CROSS", "0") not in ("", "0"):
        pytest.fail(f"{name} is not installed, and EDGEFORMER_REQUIRE_CROSS is set")
    pytest.skip(f"needs {name}")


def output(command: list[str | Path]) -> list[str]:
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


def build(folder: Path, architecture: str, name: str, watched: str = "", instead: Path | None = None) -> Path:
    """The executable of tests/csrc/cross/<name>.cpp and the engine's sources; objects in `folder` are built once.

    watched: a kernel table that ThreadSanitizer instruments, with everything that is not a kernel. instead: a source
    that replaces the one of the same name; its folder's name tells such sources apart.
    """
    replacement = f"{instead.parent.name}-{instead.stem}" if instead else ""
    out = folder / "-".join(filter(None, [architecture, name, watched, replacement]))
    if out.exists():
        return out
    native = architecture == platform.machine()
    compiler = tool("g++" if native else f"{architecture}-linux-gnu-g++")

    def compiled(source: Path) -> Path:
        watch = watched and ((ROOT / "csrc" / "kernels") not in source.parents or source.stem == watched)
        replaced = instead is not None and source.name == instead.name
        stem = replacement if replaced else source.stem
        made = folder / f"{architecture}{'-watched' * bool(watch)}-{stem}.o"
        if not made.exists():
            flags = [*FLAGS, *["-g", "-fsanitize=thread"] * bool(watch)]
            subprocess.run([compiler, *flags, "-c", instead if replaced else source, "-o", made], check=True)
        return made

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compiled, [*SOURCES, ROOT / "tests" / "csrc" / "cross" / f"{name}.cpp"]))
    kind = "-fsanitize=thread" if watched else "-static"
    subprocess.run([compiler, "-pthread", kind, *objects, "-o", out], check=True)
    return out
