"""CPython's headers, which no package carries for other systems, and what stands for their generated parts.

The headers are the same on every system but for `pyconfig.h`. That file describes the compiler and the C library; for
the public headers of CPython 3.11 and later a few macros of it count, and the compiler knows their values. On Windows
an extension links against `python312.dll`; its import library is made from the names that the headers declare.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from wheels.debian import unpacked

PYCONFIG = """\
#pragma once
#define SIZEOF_INT __SIZEOF_INT__
#define SIZEOF_LONG __SIZEOF_LONG__
#define SIZEOF_LONG_LONG __SIZEOF_LONG_LONG__
#define SIZEOF_SIZE_T __SIZEOF_SIZE_T__
#define SIZEOF_VOID_P __SIZEOF_POINTER__
#define SIZEOF_UINTPTR_T __SIZEOF_POINTER__
#define SIZEOF_PTHREAD_T __SIZEOF_POINTER__
#define SIZEOF_WCHAR_T __SIZEOF_WCHAR_T__
#define SIZEOF_PID_T 4
#define SIZEOF_TIME_T 8
#define ALIGNOF_MAX_ALIGN_T __BIGGEST_ALIGNMENT__
#define DOUBLE_IS_LITTLE_ENDIAN_IEEE754 1
#define HAVE_LONG_LONG 1
#define HAVE_STDDEF_H 1
#define HAVE_SYS_STAT_H 1
#define HAVE_SYS_TYPES_H 1
#define HAVE_WCHAR_H 1
#define WITH_DOC_STRINGS 1
#define WITH_PYMALLOC 1
#define WITH_THREAD 1
#if defined(_WIN32)
#define MS_WIN32 1
#define MS_WIN64 1
#define MS_WINDOWS 1
#define NT_THREADS 1
#define HAVE_DECLSPEC_DLL 1
#define Py_ENABLE_SHARED 1
#define PLATFORM "win32"
#else
#define HAVE_CLOCK_GETTIME 1
#define HAVE_FORK 1
#define HAVE_PTHREAD_H 1
#define HAVE_SYS_SELECT_H 1
#define HAVE_SYS_TIME_H 1
#endif
"""
DECLARATION = re.compile(r"PyAPI_(FUNC|DATA)\s*\([^)]*\)\s*\*?\s*(?:const\s+)?(?:volatile\s+)?(\w+)")
PYTHON = "import sysconfig; print(sysconfig.get_path('include'))"


def headers(python: str, folder: Path) -> Path:
    """A folder with CPython's headers of a version ("3.12") and a `pyconfig.h` for every target; made once.

    They come from an interpreter of this machine, or else from Debian's `libpython3.X-dev` (any of its suites).

    Raises:
        SystemExit: neither is there.
    """
    target = folder / python
    if (target / "pyconfig.h").exists():
        return target
    for source in _candidates(python, folder):
        if (source / "Python.h").exists():
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree(source, target)
            (target / "pyconfig.h").write_text(PYCONFIG)
            return target
    raise SystemExit(
        f"no headers of CPython {python}: install that Python with its headers, or run this on a Debian that offers "
        f"libpython{python}-dev"
    )


def _candidates(python: str, folder: Path) -> Iterator[Path]:
    if sys.version_info[:2] == tuple(map(int, python.split("."))):
        yield from _ask(sys.executable)
    yield from _ask(f"python{python}")
    yield from sorted(Path.home().glob(f".pyenv/versions/{python}.*/include/python{python}"))
    debian = unpacked(folder / f"debian-{python}", ("stable", "sid"), [f"libpython{python}-dev"])
    if debian is not None:
        yield debian / "usr/include" / f"python{python}"


def _ask(command: str) -> Iterator[Path]:
    if shutil.which(command):
        done = subprocess.run([command, "-c", PYTHON], capture_output=True, text=True)
        if done.returncode == 0:
            yield Path(done.stdout.strip())


def exported_names(include: Path) -> dict[str, bool]:
    """Name -> whether it is data, of all that CPython's headers declare for extensions."""
    found = {}
    for path in include.rglob("*.h"):
        if "internal" not in path.parts:
            for kind, name in DECLARATION.findall(path.read_text(encoding="utf-8", errors="replace")):
                found[name] = kind == "DATA"
    return found


def import_library(python: str, include: Path, zig: list[str]) -> Path:
    """`python312.lib` for Windows x86-64, in the folder of the headers; made once.

    It may name functions that a DLL lacks (those of other systems); `check` compares what is used with real DLLs.
    """
    name = f"python{python.replace('.', '')}"
    library = include / f"{name}.lib"
    if not library.exists():
        names = sorted(exported_names(include).items())
        lines = [f"LIBRARY {name}.dll", "EXPORTS", *(f"    {n}{' DATA' * is_data}" for n, is_data in names)]
        definition = include / f"{name}.def"
        definition.write_text("\n".join(lines) + "\n")
        command = [*zig, "dlltool", "-m", "i386:x86-64", "-d", str(definition), "-l", str(library)]
        subprocess.run(command, check=True)
    return library
