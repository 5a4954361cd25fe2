"""Boards, their power and heat, from files such as Linux shows them; and what the doctor says of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgeformer.tools import board, doctor
from edgeformer.tools.board import Battery, Board

TREE = "proc/device-tree"
ORIN = {
    f"{TREE}/model": "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super\0",
    f"{TREE}/compatible": "nvidia,p3768-0000+p3767-0005-super\0nvidia,p3767-0005\0nvidia,tegra234\0",
    "etc/nv_tegra_release": "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64\n",
    "usr/local/cuda/version.json": '{"cuda": {"name": "CUDA SDK", "version": "12.6.11"}, "nvcc": {"version": "1.0"}}',
    "var/lib/nvpmodel/status": "pmode:0002 fmode:quiet\n",
    "etc/nvpmodel.conf": "< POWER_MODEL ID=0 NAME=15W >\nCPU_ONLINE CORE_0 1\n< POWER_MODEL ID=2 NAME=MAXN_SUPER >\n",
}
PI = {
    f"{TREE}/model": "Raspberry Pi 5 Model B Rev 1.0\0",
    f"{TREE}/compatible": "raspberrypi,5-model-b\0brcm,bcm2712\0",
}
ROCK = {f"{TREE}/model": "Radxa ROCK 5B\0", f"{TREE}/compatible": "radxa,rock-5b\0rockchip,rk3588\0"}
BATTERY = "sys/class/power_supply"
COOLING = "sys/class/thermal/cooling_device0"
CPU = "sys/devices/system/cpu/cpu0"


def root_with(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (ORIN, Board("NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super", "jetson")),
        (PI, Board("Raspberry Pi 5 Model B Rev 1.0", "raspberrypi")),
        (ROCK, Board("Radxa ROCK 5B", "rockchip")),
        ({f"{TREE}/model": "QEMU virt\0", f"{TREE}/compatible": "linux,dummy-virt\0"}, Board("QEMU virt", "")),
        ({}, None),
    ],
)
def test_boards_by_their_device_tree(tmp_path: Path, files: dict[str, str], expected: Board | None) -> None:
    assert board.board(root_with(tmp_path, files)) == expected


def test_a_jetson_tells_its_software_and_power_mode(tmp_path: Path) -> None:
    root = root_with(tmp_path, ORIN)
    assert board.jetson_linux(root) == (36, "4.3")
    assert board.cuda_toolkit(root) == (12, 6)
    assert board.jetson_system(root) == "Jetson Linux 36.4.3, JetPack 6; CUDA toolkit 12.6"
    assert board.power_mode(root) == "MAXN_SUPER"
    (root / "var/lib/nvpmodel/status").write_text("pmode:0007")  # a mode that the settings do not name
    assert board.power_mode(root) is None


def test_a_jetson_in_a_container_hides_its_release(tmp_path: Path) -> None:
    assert "unknown" in board.jetson_system(tmp_path)
    assert board.power_mode(tmp_path) is None
    assert board.cuda_toolkit(tmp_path) is None


@pytest.mark.parametrize(
    ("release", "words"),
    [
        (35, ["CUDA 11 or older", "JetPack 7.2"]),
        (36, ["CUDA 12", "build onnxruntime with --use_cuda for Python 3.12"]),
        (38, ["JetPack 7.0", "pip install 'onnxruntime-gpu[cuda,cudnn]"]),
        (39, ["JetPack 7.2", "pip install 'onnxruntime-gpu[cuda,cudnn]"]),
    ],
)
def test_the_line_that_installs_cuda_fits_the_jetpack(tmp_path: Path, release: int, words: list[str]) -> None:
    root = root_with(tmp_path, {"etc/nv_tegra_release": f"# R{release} (release), REVISION: 2.0, GCID: 1"})
    line = board.jetson_install(root, (3, 12))
    assert all(word in line for word in words), line


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, None),
        ({"AC/type": "Mains", "AC/online": "1"}, None),
        ({"mouse/type": "Battery", "mouse/scope": "Device", "mouse/status": "Discharging"}, None),
        ({"BAT0/type": "Battery", "BAT0/status": "Discharging", "BAT0/capacity": "41"}, Battery(41, True)),
        ({"BAT0/type": "Battery", "BAT0/status": "Full"}, Battery(None, False)),
    ],
)
def test_batteries(tmp_path: Path, files: dict[str, str], expected: Battery | None) -> None:
    root = root_with(tmp_path, {f"{BATTERY}/{name}": text + "\n" for name, text in files.items()})
    assert board.battery(root) == expected


def test_the_temperature_is_the_highest_that_makes_sense(tmp_path: Path) -> None:
    assert board.temperature(tmp_path) is None
    zones = {f"sys/class/thermal/thermal_zone{i}/temp": text for i, text in enumerate(("41500", "-256000", "63000"))}
    assert board.temperature(root_with(tmp_path, zones)) == 63.0


@pytest.mark.parametrize(
    ("files", "word"),
    [
        ({f"{COOLING}/type": "cpufreq-cpu0", f"{COOLING}/cur_state": "0"}, None),
        ({f"{COOLING}/type": "pwm-fan", f"{COOLING}/cur_state": "3"}, None),
        ({f"{COOLING}/type": "cpufreq-cpu0", f"{COOLING}/cur_state": "2"}, "holds back cpufreq-cpu0"),
        ({f"{CPU}/thermal_throttle/package_throttle_count": "7"}, "7 times"),
        ({f"{CPU}/cpufreq/scaling_max_freq": "2400000", f"{CPU}/cpufreq/cpuinfo_max_freq": "2400000"}, None),
        ({f"{CPU}/cpufreq/scaling_max_freq": "1500000", f"{CPU}/cpufreq/cpuinfo_max_freq": "2400000"}, "1500 of 2400"),
    ],
)
def test_what_slows_a_processor_down(tmp_path: Path, files: dict[str, str], word: str | None) -> None:
    found = board.slowed_down(root_with(tmp_path, files))
    assert (word is None) == (not found)
    assert word is None or word in found[0]


@pytest.mark.parametrize(
    ("bits", "expected"),
    [
        ("0x0", []),
        ("0x50000", ["under-voltage since the start", "throttled since the start"]),
        ("0x80008", ["soft temperature limit now"]),
    ],
)
def test_throttling_of_a_raspberry_pi(tmp_path: Path, bits: str, expected: list[str]) -> None:
    program = tmp_path / "vcgencmd"
    program.write_text(f"#!/bin/sh\n[ $1 = get_throttled ] && echo throttled={bits}\n")
    program.chmod(0o755)
    assert board.raspberry_throttling(str(program)) == expected
    assert board.raspberry_throttling(str(tmp_path / "missing")) is None


# ----------------------------------------------------------------------------------------------------------- doctor


def test_the_doctor_of_a_jetson(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "installed_wheels", lambda: {"onnxruntime": "1.32.0"})
    found = {f.topic: f for f in doctor._board(root_with(tmp_path, ORIN))}
    assert "Orin Nano" in found["board"].text
    assert "JetPack 6" in found["jetson"].text
    assert "MAXN_SUPER" in found["power"].text
    assert "build onnxruntime" in found["install"].text
    monkeypatch.setattr(doctor, "installed_wheels", lambda: {"onnxruntime-gpu": "1.31.1"})
    monkeypatch.setattr(board, "missing_cuda_libraries", lambda: ["libcudnn"])
    found = {f.topic: f for f in doctor._board(tmp_path)}
    assert "libcudnn" in found["cuda libraries"].text and "install" not in found


def test_the_doctor_of_a_raspberry_pi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = root_with(tmp_path, PI)
    monkeypatch.setattr(board, "raspberry_throttling", lambda: ["under-voltage now"])
    assert [(f.topic, f.verdict) for f in doctor._board(root)] == [("board", "fact"), ("power", "warning")]
    monkeypatch.setattr(board, "raspberry_throttling", list)
    assert [f.topic for f in doctor._board(root)] == ["board"]


def test_the_doctor_warns_of_battery_and_heat(tmp_path: Path) -> None:
    assert list(doctor._power(tmp_path)) == []
    files = {f"{BATTERY}/BAT0/type": "Battery", f"{BATTERY}/BAT0/status": "Discharging"}
    files |= {"sys/class/thermal/thermal_zone0/temp": "93000", f"{CPU}/thermal_throttle/package_throttle_count": "2"}
    found = {f.topic: f for f in doctor._power(root_with(tmp_path, files))}
    assert found["power"].verdict == found["heat"].verdict == "warning"
    assert "93 degrees" in found["heat"].text
    (tmp_path / f"{CPU}/thermal_throttle/package_throttle_count").write_text("0")
    assert [f.verdict for f in doctor._power(tmp_path)] == ["warning", "fact"]
