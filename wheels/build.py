"""Compiles the extension for a target with zig."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from wheels.headers import headers, import_library
from wheels.targets import Target

ROOT = Path(__file__).parents[1]
CSRC = ROOT / "csrc"
ZIG = [sys.executable, "-m", "ziglang"]
# setup.py tells why -ffp-contract=off: without it the bits would differ from those of other builds.
FLAGS = ["-std=c++17", "-g0", "-DNDEBUG", "-ffp-contract=off", "-fno-math-errno", "-fno-sanitize=all"]
FLAGS += ["-fvisibility=hidden", "-Wall", "-Wextra", "-Werror", f"-I{CSRC}"]


def build_extensions(
    target: Target, pythons: Iterable[str], folder: Path, jobs: int = 2, optimize: int = 2
) -> dict[str, Path]:
    """Python version -> the extension built for it, in `folder`. What has not changed comes from zig's cache.

    optimize: 0 or 2. zig knows no other level of clang: it takes 1 and 3 as 2. The bits are the same.

    The kernels and the engine know no Python and are compiled once; the bindings once a Python, as one file, because
    reading pybind11's headers takes most of their time.
    """
    import pybind11

    pythons = list(pythons)
    place = folder / f"{target.name}-O{optimize}"
    place.mkdir(parents=True, exist_ok=True)
    sources = [path for path in sorted(CSRC.rglob("*.cpp")) if path.parent.name != "bindings"]
    bindings = folder / "bindings.cpp"
    names = sorted((CSRC / "bindings").glob("*.cpp"))
    text = "".join(f'#include "{path.relative_to(CSRC).as_posix()}"\n' for path in names)
    if not bindings.exists() or bindings.read_text() != text:
        bindings.write_text(text)

    includes = {python: headers(python, folder / "headers") for python in pythons}
    work = [(path, place / f"{path.stem}.o", list[str]()) for path in sources]
    for python, include in includes.items():
        flags = [f"-I{pybind11.get_include()}", f"-isystem{include}"]
        work.append((bindings, place / f"bindings-{python}.o", flags))
    # the largest first: of two processes none then waits long for the other
    work.sort(key=lambda item: -size(item[0]))

    def compiled(item: tuple[Path, Path, list[str]]) -> Path:
        source, made, flags = item
        zig(
            [
                *ZIG,
                "c++",
                "-target",
                target.zig,
                f"-O{optimize}",
                *FLAGS,
                *target.flags,
                *flags,
                "-c",
                str(source),
                "-o",
                str(made),
            ]
        )
        return made

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(compiled, work))
    common = [str(place / f"{path.stem}.o") for path in sources]
    extensions = {}
    for python, include in includes.items():
        made = place / target.extension(python)
        libraries = [str(import_library(python, include, ZIG))] if target.system == "windows" else []
        objects = [*common, str(place / f"bindings-{python}.o"), *libraries]
        # else macOS's linker writes the path of the file into it
        name = [f"-Wl,-install_name,{made.name}"] if target.system == "macos" else []
        # -s: no symbols but those that CPython needs
        zig([*ZIG, "c++", "-target", target.zig, "-shared", "-s", *target.link_flags, *name, *objects, "-o", str(made)])
        extensions[python] = made
    return extensions


def size(path: Path) -> int:
    """How long a source takes to compile, roughly: the SIMD tables include most of their code."""
    return 1_000_000 if path.parent.name in ("x86", "arm") or path.stem == "bindings" else path.stat().st_size


def zig(command: list[str]) -> None:
    """Runs zig with a cache in build/.

    Raises:
        SystemExit: it failed; its messages are on stderr.
    """
    cache = str(ROOT / "build" / "zig")
    done = subprocess.run(command, env={**os.environ, "ZIG_GLOBAL_CACHE_DIR": cache, "ZIG_LOCAL_CACHE_DIR": cache})
    if done.returncode:
        raise SystemExit(f"failed: {' '.join(command)}")
