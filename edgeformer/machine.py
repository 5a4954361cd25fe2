"""The CPU cores and the memory of this machine, and the default number of threads."""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path


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
    """The number of physical cores that this process may use, at most the CPU quota of its control group.

    Hyper-threads of one core share its multipliers and memory ports, so a second one adds no speed. The kernel would
    suspend threads above the quota, and all others would wait for them at the next barrier.
    """
    cores = set()
    for cpu in usable_cpus():
        try:
            siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text().strip()
        except OSError:
            siblings = str(cpu)
        cores.add(siblings)
    quota = cpu_quota()
    count = len(cores) if quota is None else min(len(cores), int(quota))
    return max(1, count)


def total_memory() -> int | None:
    """The memory of the machine in bytes, or the control group's limit if that is lower; None if unknown."""
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
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    return None


def peak_memory() -> int | None:
    """The largest resident size of this process so far, in bytes; None if unknown."""
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
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts in bytes, Linux in KiB


def cpu_name() -> str:
    """The name of the processor, or of the board on ARM."""
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
