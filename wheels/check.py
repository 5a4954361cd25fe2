"""Checks of a wheel that need no machine of its kind: what the extension asks of the system, and what it offers."""

from __future__ import annotations

import re
import tempfile
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from wheels.targets import Target

# What an extension may load. zig links libc++ into it, so that no wheel depends on a C++ library of the system.
LIBRARIES = {
    "linux": r"lib(c|m|pthread|dl|rt)\.so\.\d+|ld-linux-(x86-64|aarch64)\.so\.\d+",
    "macos": r"/usr/lib/libSystem\.B\.dylib",
    "windows": r"python3\d+\.dll|KERNEL32\.dll|api-ms-win-crt-[a-z0-9-]+\.dll|ADVAPI32\.dll",
}
EXPORT = "PyInit__native"
# new and delete of libc++: weak, and malloc and free like all others. Python loads extensions with RTLD_LOCAL.
ALLOCATION = r"_Zn[aw]m\w*|_Zd[al]Pv\w*"


def problems(wheel: Path, target: Target, python: str) -> list[str]:
    """What is wrong with a wheel; empty if nothing is."""
    found = []
    if not wheel.name.endswith(f"-{target.tag(python)}.whl"):
        found.append(f"{wheel.name} has another tag than {target.tag(python)}")
    with zipfile.ZipFile(wheel) as archive, tempfile.TemporaryDirectory() as folder:
        extensions = [name for name in archive.namelist() if name.endswith((".so", ".pyd"))]
        if extensions != [f"edgeformer/{target.extension(python)}"]:
            return [*found, f"{wheel.name} has the extensions {extensions}, expected {target.extension(python)}"]
        path = Path(archive.extract(extensions[0], folder))
        found += extension_problems(path, target, python)
    if target.system == "linux":
        found += manylinux_problems(wheel, target)
    return found


def extension_problems(path: Path, target: Target, python: str) -> list[str]:
    """What is wrong with an extension: libraries, exported names, minimum version of the system."""
    import lief

    # It prints "Can't read value at offset" of an empty table of function starts, which zig's linker writes for macOS.
    lief.logging.disable()
    binary: Any = lief.parse(str(path))
    if binary is None:
        return [f"{path.name} is no ELF, Mach-O or PE file"]
    if target.system == "linux":
        return elf_problems(binary, target)
    if target.system == "macos":
        return macho_problems(binary, target)
    return pe_problems(binary, python)


def foreign(libraries: Iterable[str], system: str) -> list[str]:
    """A problem for each library that a plain system may lack."""
    return [f"needs {name}" for name in libraries if not re.fullmatch(LIBRARIES[system], name)]


def elf_problems(binary: Any, target: Target) -> list[str]:
    """Libraries, exports, and versions of glibc's symbols above the one of the tag."""
    found = foreign(binary.libraries, "linux")
    limit = version(target.zig.partition("-gnu.")[2])
    names = {str(need.name) for part in binary.symbols_version_requirement for need in part.get_auxiliary_symbols()}
    for name in sorted(names):
        kind, _, number = name.partition("_")
        if kind != "GLIBC" or version(number) > limit:
            found.append(f"needs {name}, the tag {target.platform} promises GLIBC_{target.zig.partition('-gnu.')[2]}")
    names_out = (str(symbol.name) for symbol in binary.exported_symbols)
    return found + export_problems(name for name in names_out if not re.fullmatch(ALLOCATION, name))


def macho_problems(binary: Any, target: Target) -> list[str]:
    """Libraries, imports, exports, the processor, and the minimum version of macOS in the load commands."""
    found = []
    loaded = []
    for library in binary.libraries:
        if not str(library.command).endswith("ID_DYLIB"):
            loaded.append(library.name)
        elif "/" in library.name:
            found.append(f"holds the path {library.name} of the machine that built it")
    found += foreign(loaded, "macos")
    build = binary.build_version
    wanted = version(target.zig.rpartition("-macos.")[2])
    if build is None:
        found.append("has no LC_BUILD_VERSION")
    elif tuple(build.minos)[: len(wanted)] != wanted:
        found.append(f"needs macOS {'.'.join(map(str, build.minos))}, the tag says {target.platform}")
    cpu = "ARM64" if "arm64" in target.platform else "X86_64"
    if not str(binary.header.cpu_type).endswith(cpu):
        found.append(f"is for {binary.header.cpu_type}, expected {cpu}")
    # Apple's processors run no code without a signature; an ad-hoc one is enough.
    if cpu == "ARM64" and not binary.has_code_signature:
        found.append("has no code signature")
    # The linker leaves what it does not find to the process that loads the extension: only CPython is there.
    own = {symbol.name for symbol in binary.imported_symbols if symbol.library_ordinal != 1}  # 1: the first, libSystem
    found += [f"needs {name}, which libSystem has not" for name in sorted(own) if not re.match("_+Py", name)]
    linker = rf"_{{1,2}}(dso_handle|mh_dylib_header)|{ALLOCATION}"  # the linker's own symbols
    names = [str(symbol.name).removeprefix("_") for symbol in binary.exported_symbols]
    return found + export_problems(name for name in names if not re.fullmatch(linker, name))


def pe_problems(binary: Any, python: str) -> list[str]:
    """Libraries (of Python only the one of this version) and exports."""
    names = [str(part.name) for part in binary.imports]
    found = foreign(names, "windows")
    wanted = f"python{python.replace('.', '')}.dll"
    if wanted not in names:
        found.append(f"does not load {wanted}")
    found += [f"needs {name}" for name in names if name.startswith("python") and name != wanted]
    return found + export_problems(entry.name for entry in binary.get_export().entries)


def export_problems(names: Iterable[str]) -> list[str]:
    """An extension offers its start, and pybind11's exception classes, which it marks as shared; nothing else.

    Names of C++'s library in two extensions would be mixed up. The type information of a plain function type, such as
    _ZTIFdimE of `double(int, unsigned long)`, is the same wherever it comes from.
    """
    shared = r"_ZN?K?[TVISN]*8pybind11|_ZT[IS]P?F[a-z]+E$"
    found = sorted({name for name in names if not re.match(shared, name)})
    return [] if found == [EXPORT] else [f"exports {', '.join(found[:5]) or 'nothing'}, expected {EXPORT}"]


def manylinux_problems(wheel: Path, target: Target) -> list[str]:
    """What auditwheel says against the tag."""
    import subprocess
    import sys

    done = subprocess.run([sys.executable, "-m", "auditwheel", "show", str(wheel)], capture_output=True, text=True)
    text = " ".join(done.stdout.split())
    return (
        []
        if is_consistent(text, target.platform)
        else [f"auditwheel does not find it consistent with {target.platform}: {text or done.stderr}"]
    )


def is_consistent(text: str, platform: str) -> bool:
    """Whether auditwheel's text names the tag, or one of an older glibc, which promises more."""
    found = re.search(r'platform tag: "manylinux_(\d+)_(\d+)_(\w+)"', text)
    wanted = re.fullmatch(r"manylinux_(\d+)_(\d+)_(\w+)", platform)
    if found is None or wanted is None:
        return False
    return found[3] == wanted[3] and (int(found[1]), int(found[2])) <= (int(wanted[1]), int(wanted[2]))


def version(text: str) -> tuple[int, ...]:
    """(2, 28) of "2.28"."""
    return tuple(int(part) for part in text.split(".") if part.isdigit())
