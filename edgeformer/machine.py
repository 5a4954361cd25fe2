"""What the operating system tells and does: cores, memory, names of things, locks and replaced files.

Everything that differs between Linux, macOS and Windows is here or in `csrc/platform/`. The module imports on each of
them; what a system does not tell is None.
"""

from __future__ import annotations

import ctypes
import os
import platform
import re
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

MADV_POPULATE_READ = 22  # madvise(2), Linux 5.14
WINDOWS, MACOS = sys.platform == "win32", sys.platform == "darwin"

# ------------------------------------------------------------------------------------------------------------- cores


def usable_cpus() -> list[int]:
    """The logical CPUs that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def cpu_quota(root: Path = Path("/sys/fs/cgroup")) -> float | None:
    """The CPU limit of the control group (containers), in CPUs, may be fractional; None if there is no limit."""
    try:
        quota, period = (root / "cpu.max").read_text().split()[:2]
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        pass
    try:
        microseconds = int((root / "cpu/cpu.cfs_quota_us").read_text())
        period_us = int((root / "cpu/cpu.cfs_period_us").read_text())
        return microseconds / period_us if microseconds > 0 else None
    except (OSError, ValueError, ZeroDivisionError):
        return None


def default_threads() -> int:
    """The number of physical performance cores that this process may use, at most its control group's CPU quota.

    Hyper-threads of one core share its multipliers and memory ports, so a second one adds no speed. Efficiency cores
    would make the others wait. The kernel would suspend threads above the quota, and all others would wait for them at
    the next barrier.
    """
    if WINDOWS or MACOS:
        count = (_windows_cores() if WINDOWS else _macos_cores()) or len(usable_cpus())
        return max(1, min(count, len(usable_cpus())))
    cores = set()
    for cpu in performance_cpus(usable_cpus()):
        try:
            siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text().strip()
        except OSError:
            siblings = str(cpu)
        cores.add(siblings)
    quota = cpu_quota()
    count = len(cores) if quota is None else min(len(cores), int(quota))
    return max(1, count)


def performance_cpus(cpus: Sequence[int], root: Path = Path("/sys/devices")) -> list[int]:
    """Those of the logical CPUs that Linux counts among the fast ones; all of them if it makes no difference.

    Intel's hybrid processors list them in `cpu_core/cpus`; ARM boards state `cpu_capacity`, 1024 for the fastest core
    (Linux, Documentation/admin-guide/sysctl and scheduler/sched-capacity). Fast: at least 2/3 of the largest capacity.
    """
    try:
        fast = _cpu_list((root / "cpu_core/cpus").read_text())
    except (OSError, ValueError):
        capacities: dict[int, int] = {}
        with suppress(OSError, ValueError):
            for cpu in cpus:
                capacities[cpu] = int((root / f"system/cpu/cpu{cpu}/cpu_capacity").read_text())
        if len(capacities) < len(cpus):
            return list(cpus)
        fast = {cpu for cpu, capacity in capacities.items() if 3 * capacity >= 2 * max(capacities.values())}
    return [cpu for cpu in cpus if cpu in fast] or list(cpus)


def _cpu_list(text: str) -> set[int]:
    """The numbers of a list of Linux: "0-3,8" is 0, 1, 2, 3, 8."""
    found: set[int] = set()
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        found.update(range(int(first), int(last or first) + 1))
    return found


def _windows_cores() -> int | None:
    length = ctypes.c_ulong()
    call = _windows("kernel32", "GetSystemCpuSetInformation")
    if call is None:
        return None
    call(None, 0, ctypes.byref(length), None, 0)
    buffer = ctypes.create_string_buffer(length.value)
    if not length.value or not call(buffer, length, ctypes.byref(length), None, 0):
        return None
    return cores_of_cpu_sets(buffer.raw[: length.value])


def cores_of_cpu_sets(data: bytes) -> int | None:
    """The number of physical cores of the highest efficiency class: SYSTEM_CPU_SET_INFORMATION of winnt.h, repeated.

    Offsets in an entry: its size 0 (4 bytes), group 12 (2), core 15, efficiency class 18.
    """
    cores: dict[int, set[tuple[int, int]]] = {}
    at = 0
    while at + 20 <= len(data):
        size = int.from_bytes(data[at : at + 4], "little")
        if size < 20:
            return None
        group, core, kind = int.from_bytes(data[at + 12 : at + 14], "little"), data[at + 15], data[at + 18]
        cores.setdefault(kind, set()).add((group, core))
        at += size
    return len(cores[max(cores)]) if cores else None


def _macos_cores() -> int | None:
    for name in ("hw.perflevel0.physicalcpu", "hw.physicalcpu"):  # the first: Apple's own processors
        value = _sysctl(name)
        if value:
            return int.from_bytes(value, "little")
    return None


# ------------------------------------------------------------------------------------------------------------ memory


def total_memory() -> int | None:
    """The memory of the machine in bytes, or the control group's limit if that is lower; None if unknown."""
    if WINDOWS:
        return _windows_memory(8)
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None
    for name in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            total = min(total, int(Path(name).read_text()))
        except (OSError, ValueError):
            continue
    return total


def available_memory() -> int | None:
    """The bytes that can be allocated without swapping; None if unknown."""
    if WINDOWS:
        return _windows_memory(16)
    if MACOS:
        with suppress(OSError, subprocess.SubprocessError):
            done = subprocess.run(["/usr/bin/vm_stat"], capture_output=True, text=True, timeout=5, check=True)
            return free_of_vm_stat(done.stdout)
        return None
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    return None


def free_of_vm_stat(text: str) -> int | None:
    """The bytes of free and inactive pages in what macOS's `vm_stat` prints; None if it is something else."""
    page = re.search(r"page size of (\d+) bytes", text)
    counts = [re.search(rf"^Pages {name}:\s+(\d+)", text, re.MULTILINE) for name in ("free", "inactive")]
    if page is None or None in counts:
        return None
    return int(page[1]) * sum(int(found[1]) for found in counts if found)


def has_huge_pages(root: Path = Path("/sys/kernel/mm/transparent_hugepage")) -> bool:
    """Whether large allocations get huge pages if they ask for them, as the native engine does (Linux)."""
    try:
        return "[never]" not in (root / "enabled").read_text()
    except OSError:
        return False


def mapped_in_huge_pages(data: np.memmap[Any, Any], maps: Path = Path("/proc/self/smaps")) -> int | None:
    """How many bytes of a mapped file the system has in huge pages, after reading all of it; None if unknown.

    Linux, `FilePmdMapped` in proc_pid_smaps(5). ext4 keeps files in huge pages since 6.16, as far as its
    cache finds such pages free when a file is written or read.
    """
    address = data.ctypes.data
    try:
        data._mmap.madvise(MADV_POPULATE_READ)  # type: ignore[attr-defined]
        lines = maps.read_text().splitlines()
    except (AttributeError, OSError, ValueError):
        return None
    inside = False
    for line in lines:
        if region := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(region[1], 16) <= address < int(region[2], 16)
        elif inside and line.startswith("FilePmdMapped:"):
            return int(line.split()[1]) * 1024
    return None


def peak_memory() -> int | None:
    """The largest resident size of this process so far, in bytes; None if unknown."""
    if WINDOWS:
        return _windows_peak()
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    try:
        import resource
    except ImportError:
        return None
    peak: int = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if MACOS else peak * 1024  # macOS counts in bytes, Linux in KiB


def _windows_memory(offset: int) -> int | None:
    """A field of MEMORYSTATUSEX: 8 bytes at 8 hold the physical memory, those at 16 what of it is available."""
    buffer = ctypes.create_string_buffer((64).to_bytes(4, "little"), 64)
    call = _windows("kernel32", "GlobalMemoryStatusEx")
    if call is None or not call(buffer):
        return None
    return int.from_bytes(buffer.raw[offset : offset + 8], "little")


def _windows_peak() -> int | None:
    buffer = ctypes.create_string_buffer(72)  # PROCESS_MEMORY_COUNTERS: the peak of the working set is at 8
    process, call = _windows("kernel32", "GetCurrentProcess"), _windows("kernel32", "K32GetProcessMemoryInfo")
    if process is None or call is None:
        return None
    process.restype = ctypes.c_void_p
    if not call(ctypes.c_void_p(process()), buffer, 72):
        return None
    return int.from_bytes(buffer.raw[8:16], "little")


# ------------------------------------------------------------------------------------------------------------- names


def system_name() -> tuple[str, str, str]:
    """(system, its release, processor type), such as ("Linux", "6.1.0", "x86_64").

    On Windows `platform.system` asks WMI, which takes long, and ends the process under Wine.
    """
    if WINDOWS:
        release: Any = sys.getwindowsversion()  # type: ignore[attr-defined, unused-ignore]
        number = f"{release.major}.{release.minor}.{release.build}"
        return "Windows", number, os.environ.get("PROCESSOR_ARCHITECTURE", "")
    return platform.system(), platform.release(), platform.machine()


def cpu_name() -> str:
    """The name of the processor, or of the board on ARM."""
    if WINDOWS:
        return _windows_cpu_name() or os.environ.get("PROCESSOR_IDENTIFIER", "unknown")
    if MACOS:
        name = _sysctl("machdep.cpu.brand_string")
        return name.rstrip(b"\0").decode() if name else platform.machine()
    try:
        fields: dict[str, str] = {}
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            fields[key.strip()] = value.strip()
        for key in ("model name", "Model", "Hardware"):
            if fields.get(key):
                return fields[key]
    except OSError:
        pass
    try:  # ARM boards: the name is in the device tree, not in /proc/cpuinfo
        return Path("/proc/device-tree/model").read_text().rstrip("\0\n")
    except OSError:
        return platform.processor() or platform.machine()


def _windows_cpu_name() -> str | None:
    import winreg

    registry: Any = winreg
    place = r"HARDWARE\DESCRIPTION\System\CentralProcessor\0"
    with suppress(OSError), registry.OpenKey(registry.HKEY_LOCAL_MACHINE, place) as key:
        return str(registry.QueryValueEx(key, "ProcessorNameString")[0]).strip()
    return None


# ------------------------------------------------------------------------------------------------------------- files


class FolderLock:
    """A lock of this process on a folder, until `close` or the end of the process."""

    def __init__(self, descriptor: int, file: Path | None = None) -> None:
        self._descriptor, self._file = descriptor, file

    def close(self) -> None:
        """Give the lock back."""
        os.close(self._descriptor)
        if self._file is not None:
            with suppress(OSError):  # another process has opened it meanwhile
                self._file.unlink()


def lock_folder(folder: Path) -> FolderLock | None:
    """Lock `folder`, or a file; None if another process holds the lock. On Windows the lock is `NAME.lock` beside it.

    Raises:
        OSError: the folder or the file cannot be opened.
    """
    if not WINDOWS:
        import fcntl

        descriptor = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(descriptor)
            return None
        return FolderLock(descriptor)
    # A folder with an open file in it cannot be renamed there, and a folder itself cannot be opened.
    import msvcrt

    windows: Any = msvcrt
    file = folder.with_name(folder.name + ".lock")
    try:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT)
    except PermissionError:
        return None  # its holder deletes it just now
    try:
        windows.locking(descriptor, windows.LK_NBLCK, 1)
    except OSError:
        os.close(descriptor)
        return None
    return FolderLock(descriptor, file)


def move(source: Path, target: Path, *, replace: bool = False) -> None:
    """`os.rename`, or `os.replace`, with a message that says what to do when Windows refuses.

    Raises:
        PermissionError: on Windows, a process has a file of `source` or `target` open or mapped.
        OSError: it cannot be renamed.
    """
    try:
        (os.replace if replace else os.rename)(source, target)
    except PermissionError as error:
        if not WINDOWS:
            raise
        raise PermissionError(
            error.errno,
            f"{target} cannot be replaced or moved: a process has a file of it open or mapped, as a loaded model "
            "has, and Windows keeps such files; close that model or process, then try again",
        ) from error


def fsync(path: Path) -> None:
    """Write what the system holds of a file or a folder to the disk. Windows has no such call for a folder."""
    if WINDOWS and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDWR if WINDOWS else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ----------------------------------------------------------------------------------------------- calls of the systems


def _windows(library: str, name: str) -> Any | None:
    """A function of a DLL of Windows; None if there is none."""
    try:
        return getattr(ctypes.WinDLL(library), name)  # type: ignore[attr-defined, unused-ignore]
    except (AttributeError, OSError):
        return None


def _sysctl(name: str) -> bytes | None:
    """A value of macOS's sysctl; None if there is none."""
    try:
        call = ctypes.CDLL(None).sysctlbyname
    except (AttributeError, OSError, TypeError):
        return None
    size = ctypes.c_size_t()
    if call(name.encode(), None, ctypes.byref(size), None, 0) or not size.value:
        return None
    buffer = ctypes.create_string_buffer(size.value)
    return None if call(name.encode(), buffer, ctypes.byref(size), None, 0) else buffer.raw[: size.value]
