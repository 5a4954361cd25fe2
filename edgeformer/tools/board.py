"""What Linux tells about a board, its power and its heat: Jetson, Raspberry Pi, RK3588, laptops on battery.

Every function reads files below `root`, so that tests can show it the files of a board that is not here. None, or
nothing in a list, means that the system does not tell.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

ROOT = Path("/")

# Jetson Linux -> JetPack (developer.nvidia.com/embedded/jetpack-archive)
JETPACKS = {35: "5", 36: "6", 38: "7.0 or 7.1", 39: "7.2 or later"}
# onnxruntime-gpu's wheel for aarch64 (PyPI, 1.31): CUDA 13, glibc 2.34, Python 3.11 and later
CUDA_OF_WHEEL = 13
# What that wheel loads, as its extras `cuda` and `cudnn` name it, and cuBLAS, which cuDNN brings
CUDA_LIBRARIES = ("cudart", "cublas", "cublasLt", "cufft", "curand", "nvrtc", "cudnn")

# `vcgencmd get_throttled` (raspberrypi.com/documentation/computers/os.html): bits 0-3 now, 16-19 since the start
THROTTLE_BITS = ("under-voltage", "frequency capped", "throttled", "soft temperature limit")


@dataclass(frozen=True)
class Board:
    """A board by its device tree. kind: "jetson", "raspberrypi", "rockchip", or "" for others."""

    name: str
    kind: str


def board(root: Path = ROOT) -> Board | None:
    """The board, or None on machines without a device tree (PCs)."""
    tree = root / "proc/device-tree"
    name = _text(tree / "model")
    if not name:
        return None
    makers = [entry.partition(",") for entry in _text(tree / "compatible").split("\0")]
    kind = ""
    for maker, _, part in makers:
        if maker == "nvidia" and part.startswith("tegra"):
            kind = "jetson"
        elif maker in ("raspberrypi", "rockchip"):
            kind = kind or maker
    return Board(name.strip("\0 \n"), kind)


# ------------------------------------------------------------------------------------------------------------- Jetson


def jetson_linux(root: Path = ROOT) -> tuple[int, str] | None:
    """(36, "4.3"): the release of Jetson Linux and its revision, from /etc/nv_tegra_release."""
    found = re.search(r"# R(\d+) \(release\), REVISION: ([\d.]+)", _text(root / "etc/nv_tegra_release"))
    return (int(found[1]), found[2]) if found else None


def jetson_system(root: Path = ROOT) -> str:
    """Jetson Linux, its JetPack and CUDA, as text."""
    release = jetson_linux(root)
    if release is None:
        return "Jetson Linux unknown: /etc/nv_tegra_release cannot be read, as in a container"
    jetpack = JETPACKS.get(release[0])
    cuda = cuda_toolkit(root)
    toolkit = f"CUDA toolkit {cuda[0]}.{cuda[1]}" if cuda else "no CUDA toolkit in /usr/local/cuda"
    return f"Jetson Linux {release[0]}.{release[1]}" + (f", JetPack {jetpack}" if jetpack else "") + f"; {toolkit}"


def cuda_toolkit(root: Path = ROOT) -> tuple[int, int] | None:
    """(12, 6): the version of the CUDA toolkit in /usr/local/cuda."""
    found = re.search(r'"cuda"\s*:\s*{[^}]*"version"\s*:\s*"(\d+)\.(\d+)', _text(root / "usr/local/cuda/version.json"))
    return (int(found[1]), int(found[2])) if found else None


def missing_cuda_libraries() -> list[str]:
    """Which of the CUDA libraries that onnxruntime-gpu loads the system's linker does not find."""
    from ctypes.util import find_library

    return [f"lib{name}" for name in CUDA_LIBRARIES if find_library(name) is None]


def jetson_install(root: Path = ROOT, python: tuple[int, int] = sys.version_info[:2]) -> str:
    """The line that gives the engine `cuda` on this Jetson, or why none is known. Nothing of it was tried on one."""
    release = jetson_linux(root)
    if release is None or release[0] >= 38:
        number = "" if release is None else f"JetPack {JETPACKS.get(release[0], '7 or later')}: "
        return (
            f"{number}pip uninstall -y onnxruntime; pip install 'onnxruntime-gpu[cuda,cudnn]>=1.25'  "
            f"(PyPI's wheel for aarch64 is for CUDA {CUDA_OF_WHEEL}; not tried on a Jetson)"
        )
    return (
        f"JetPack {JETPACKS.get(release[0], 'older than 5')} has CUDA {'12' if release[0] == 36 else '11 or older'}, "
        f"and PyPI's onnxruntime-gpu for aarch64 is for CUDA {CUDA_OF_WHEEL}: build onnxruntime with --use_cuda for "
        f"Python {python[0]}.{python[1]}, or update to JetPack 7.2; the engine `native` needs neither"
    )


def power_mode(root: Path = ROOT) -> str | None:
    """The power mode of a Jetson ("15W"), from nvpmodel's settings and state; None if it has none."""
    number = re.search(r"pmode:(\d+)", _text(root / "var/lib/nvpmodel/status"))
    modes = re.findall(r"<\s*POWER_MODEL\s+ID=(\d+)\s+NAME=(\S+)\s*>", _text(root / "etc/nvpmodel.conf"))
    names = {int(mode): name for mode, name in modes}
    return names.get(int(number[1])) if number else None


# ------------------------------------------------------------------------------------------------------ power and heat


@dataclass(frozen=True)
class Battery:
    """What the machine runs on: percent (None if unknown), and whether it is being discharged."""

    percent: int | None
    discharging: bool


def battery(root: Path = ROOT) -> Battery | None:
    """The battery of the machine; None without one. Batteries of mice and phones are not counted."""
    for supply in sorted((root / "sys/class/power_supply").glob("*")):
        if _text(supply / "type").strip() == "Battery" and _text(supply / "scope").strip() != "Device":
            percent = _number(supply / "capacity")
            return Battery(percent, _text(supply / "status").strip() == "Discharging")
    return None


def temperature(root: Path = ROOT) -> float | None:
    """The highest of the temperatures that Linux tells, in degrees Celsius."""
    zones = (root / "sys/class/thermal").glob("thermal_zone*/temp")
    # A zone that is switched off reads as an error, 0 or a large negative number.
    found = [value / 1000 for value in map(_number, zones) if value is not None and 0 < value < 200_000]
    return max(found, default=None)


def slowed_down(root: Path = ROOT) -> list[str]:
    """Why the processor runs below its speed now, or has run so since the start."""
    found = []
    for device in sorted((root / "sys/class/thermal").glob("cooling_device*")):
        kind = _text(device / "type").strip()
        if "cpufreq" in kind and (_number(device / "cur_state") or 0) > 0:
            found.append(f"Linux holds back {kind} because of heat")
    cpu = root / "sys/devices/system/cpu/cpu0"
    count = _number(cpu / "thermal_throttle/package_throttle_count") or 0
    if count:
        found.append(f"the processor was slowed down by heat {count} times since the start")
    limit, full = _number(cpu / "cpufreq/scaling_max_freq"), _number(cpu / "cpufreq/cpuinfo_max_freq")
    if limit and full and limit < full:
        found.append(f"the frequency is limited to {limit // 1000} of {full // 1000} MHz")
    return found


def raspberry_throttling(run: str = "vcgencmd") -> list[str] | None:
    """What `vcgencmd get_throttled` tells of a Raspberry Pi; None if the command is not there."""
    with suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run([run, "get_throttled"], capture_output=True, text=True, timeout=5, check=True)
        if found := re.search(r"throttled=0x([0-9a-fA-F]+)", done.stdout):
            return list(_throttled(int(found[1], 16)))
    return None


def _throttled(bits: int) -> Iterator[str]:
    for at, name in enumerate(THROTTLE_BITS):
        if bits >> at & 1:
            yield f"{name} now"
        elif bits >> at + 16 & 1:
            yield f"{name} since the start"


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _number(path: Path) -> int | None:
    try:
        return int(_text(path))
    except ValueError:
        return None
