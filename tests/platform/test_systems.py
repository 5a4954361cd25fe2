"""What differs between systems is in csrc/platform and edgeformer/machine.py; the package imports on all of them."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from edgeformer import machine
from edgeformer.bundle.write import seal
from edgeformer.errors import BundleError

ROOT = Path(__file__).parents[2]

SYSTEM_MACROS = re.compile(
    r"__linux__|__APPLE__|__MACH__|_WIN32|_WIN64|__MINGW|_MSC_VER|__GLIBC__|__unix__|__ANDROID__|MADV_|"
    r"<(sys/\w+|unistd|pthread|sched|windows|malloc|fcntl|io|dlfcn|cpuid)\.h>|\b(mmap|madvise|getpid|posix_memalign)\("
)
SYSTEM_MODULES = {"fcntl", "resource", "msvcrt", "winreg", "pwd", "grp", "termios", "tty", "pty", "_winapi", "syslog"}


def of_systems(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if SYSTEM_MACROS.search(line)]


def test_only_csrc_platform_knows_the_operating_system() -> None:
    found = {}
    for path in sorted((ROOT / "csrc").rglob("*.*")):
        lines = of_systems(path.read_text(encoding="utf-8"))
        if lines and path.parent.name != "platform":
            found[str(path.relative_to(ROOT))] = lines
    assert not found
    assert of_systems((ROOT / "csrc/platform/posix.cpp").read_text())  # or the pattern finds nothing anywhere
    assert of_systems("#if defined(__linux__)\nint x;\nvoid* p = mmap(0, 1);") == [
        "#if defined(__linux__)",
        "void* p = mmap(0, 1);",
    ]


def imports_at_import(tree: ast.Module) -> set[str]:
    """The modules that importing this module imports: what stands in no function."""
    found: set[str] = set()
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.partition(".")[0])
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            waiting += ast.iter_child_nodes(node)
    return found


def test_no_module_of_one_system_is_imported_at_import() -> None:
    paths = sorted((ROOT / "edgeformer").rglob("*.py"))
    found = {p.name: imports_at_import(ast.parse(p.read_text(encoding="utf-8"))) & SYSTEM_MODULES for p in paths}
    assert not {name: modules for name, modules in found.items() if modules}
    assert imports_at_import(ast.parse("if True:\n    import fcntl\ndef f():\n    import resource")) == {"fcntl"}


# ----------------------------------------------------------------------------------------------------------- cores


def folder_with(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, [0, 1, 2, 3]),
        ({"cpu_core/cpus": "0-1\n", "cpu_atom/cpus": "2-3\n"}, [0, 1]),  # Intel's hybrid processors
        ({"cpu_core/cpus": "8-9\n"}, [0, 1, 2, 3]),  # the process may run on none of the fast ones
        ({"cpu_core/cpus": "nonsense"}, [0, 1, 2, 3]),
        ({f"system/cpu/cpu{i}/cpu_capacity": "414\n" if i < 2 else "1024\n" for i in range(4)}, [2, 3]),  # RK3588
        ({f"system/cpu/cpu{i}/cpu_capacity": "1024\n" for i in range(4)}, [0, 1, 2, 3]),
        ({"system/cpu/cpu0/cpu_capacity": "1024\n"}, [0, 1, 2, 3]),  # of one only: nothing to compare
    ],
)
def test_efficiency_cores_are_not_counted(tmp_path: Path, files: dict[str, str], expected: list[int]) -> None:
    assert machine.performance_cpus([0, 1, 2, 3], folder_with(tmp_path, files)) == expected


def cpu_set(group: int, core: int, efficiency: int) -> bytes:
    entry = bytearray(32)
    entry[0:4], entry[12:14] = (32).to_bytes(4, "little"), group.to_bytes(2, "little")
    entry[15], entry[18] = core, efficiency
    return bytes(entry)


def test_physical_cores_of_windows() -> None:
    threads = [cpu_set(0, core, 1) for core in (0, 0, 2, 2)] + [cpu_set(0, core, 0) for core in (4, 5, 6)]
    assert machine.cores_of_cpu_sets(b"".join(threads)) == 2
    assert machine.cores_of_cpu_sets(cpu_set(0, 0, 0) + cpu_set(1, 0, 0)) == 2  # core 0 of two groups
    assert machine.cores_of_cpu_sets(b"") is None
    assert machine.cores_of_cpu_sets(bytes(32)) is None  # an entry of no length: not this structure


def test_free_memory_of_macos() -> None:
    text = (
        "Mach Virtual Memory Statistics: (page size of 16384 bytes)\nPages free:                                3.\n"
        "Pages active:                            900.\nPages inactive:                            4.\n"
    )
    assert machine.free_of_vm_stat(text) == 7 * 16384
    assert machine.free_of_vm_stat(text.replace("Pages free", "Pages gone")) is None
    assert machine.free_of_vm_stat("") is None


# ----------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("model.onnx", None),
        ("console", None),
        (".edgeformer", None),
        ("CON", "device"),
        ("aux.onnx", "device"),
        ("Lpt1.txt", "device"),
        ("a:b", "':'"),
        ('say "x"?', "'?'"),
        ("line\nbreak", "'\\n'"),
        ("ends.", "dot or a space"),
        ("ends ", "dot or a space"),
    ],
)
def test_names_that_windows_has_not(name: str, word: str | None) -> None:
    problem = machine.windows_name_problem(name)
    assert (problem is None) == (word is None)
    assert word is None or word in str(problem)


def test_a_bundle_has_no_file_that_windows_cannot_have(tmp_path: Path) -> None:
    (tmp_path / "aux.json").write_text("{}")
    with pytest.raises(BundleError, match=r"'aux\.json' is no name for a file of a bundle"):
        seal(tmp_path, {})


def test_a_locked_folder_is_locked_for_others_only(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib; from edgeformer.machine import lock_folder; "
        "print(lock_folder(pathlib.Path(sys.argv[1])) is not None)"
    )

    def another() -> str:
        done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, cwd=ROOT)
        return done.stdout.strip()

    lock = machine.lock_folder(tmp_path)
    assert lock is not None
    assert another() == "False"
    lock.close()
    assert another() == "True"


def test_a_file_in_use_on_windows_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise PermissionError(13, "Access is denied")

    monkeypatch.setattr("os.replace", refused)
    with pytest.raises(PermissionError, match="Access is denied"):
        machine.move(tmp_path / "a", tmp_path / "b", replace=True)
    monkeypatch.setattr(machine, "WINDOWS", True)
    with pytest.raises(PermissionError, match="a process has a file of it open or mapped"):
        machine.move(tmp_path / "a", tmp_path / "b", replace=True)


def test_a_console_without_utf8_ends_no_command() -> None:
    code = "from edgeformer.cli import main; print(main(['--version'])); print('ünïcode →')"
    environment = {"PATH": "", "PYTHONIOENCODING": "ascii", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[1:] == ["0", "?n?code ?"]


@pytest.mark.skipif(sys.platform != "linux", reason="/proc/self/smaps is Linux's")
def test_huge_pages_of_a_mapped_file_are_read_from_its_region(tmp_path: Path) -> None:
    (tmp_path / "data").write_bytes(bytes(1 << 16))
    data = np.memmap(tmp_path / "data", np.uint8, "r")
    found = machine.mapped_in_huge_pages(data)
    assert found is not None and 0 <= found <= data.nbytes
    at = data.ctypes.data
    maps = tmp_path / "smaps"
    regions = [(at - 4096, at, 1), (at, at + data.nbytes, 48), (at + data.nbytes, at + 2 * data.nbytes, 2)]
    lines = [f"{a:x}-{b:x} r--s 0 0 0 file\nRss: 9 kB\nFilePmdMapped:   {kib} kB\n" for a, b, kib in regions]
    maps.write_text("".join(lines))
    assert machine.mapped_in_huge_pages(data, maps) == 48 << 10
    maps.write_text(lines[0] + lines[2])
    assert machine.mapped_in_huge_pages(data, maps) is None
    assert machine.mapped_in_huge_pages(data, tmp_path / "none") is None


@pytest.mark.parametrize(("text", "expected"), [("always [madvise] never", True), ("always madvise [never]", False)])
def test_huge_pages_can_be_switched_off(tmp_path: Path, text: str, expected: bool) -> None:
    (tmp_path / "enabled").write_text(text)
    assert machine.has_huge_pages(tmp_path) == expected
    assert not machine.has_huge_pages(tmp_path / "missing")
