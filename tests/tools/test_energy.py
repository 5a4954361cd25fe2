"""Energy meters: counts and samples become joules; what cannot be read is said; the benchmark shows joules a token."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from edgeformer.engines.options import EngineOptions
from edgeformer.errors import EngineUnavailable
from edgeformer.tools.bench import Workload, bench
from edgeformer.tools.energy import PowerMonitor, Rapl, open_meter

CAP = "sys/class/powercap"
RAIL = "sys/bus/i2c/drivers/ina3221/1-0040/hwmon/hwmon1"


def rapl(root: Path, counts: list[int], wrap: int = 1_000_000) -> list[Path]:
    """A package for each count, and a part of the first, which must not be counted twice."""
    paths = [root / CAP / f"intel-rapl:{i}" for i in range(len(counts))]
    for path, count in zip([*paths, root / CAP / "intel-rapl:0:0"], [*counts, 5], strict=True):
        path.mkdir(parents=True, exist_ok=True)
        (path / "energy_uj").write_text(f"{count}\n")
        (path / "max_energy_range_uj").write_text(f"{wrap}\n")
    return paths


def test_rapl_adds_packages_and_knows_a_counter_that_starts_again(tmp_path: Path) -> None:
    rapl(tmp_path, [900_000, 100])
    meter = open_meter(tmp_path)
    assert isinstance(meter, Rapl) and meter.joules() == 0
    rapl(tmp_path, [950_000, 300])
    assert meter.joules() == pytest.approx(0.0502)
    rapl(tmp_path, [50_000, 300])  # 900 000 less: from 950 000 over 1 000 000 to 50 000
    assert meter.joules() == pytest.approx(0.1502)
    meter.close()


def board(root: Path, volts: int, amperes: int) -> None:
    (root / RAIL).mkdir(parents=True, exist_ok=True)
    for name, text in (("in1_label", "VDD_CPU"), ("in2_label", "VDD_IN"), ("in2_input", volts)):
        (root / RAIL / name).write_text(f"{text}\n")
    (root / RAIL / "curr2_input").write_text(f"{amperes}\n")


def test_a_jetsons_power_is_summed_over_time(tmp_path: Path) -> None:
    board(tmp_path, 5000, 2000)  # 10 W
    meter = open_meter(tmp_path)
    try:
        assert isinstance(meter, PowerMonitor) and "VDD_IN" in meter.name
        before, began = meter.joules(), time.perf_counter()
        time.sleep(0.2)
        used, seconds = meter.joules() - before, time.perf_counter() - began
        # `seconds` and the meter's own clock differ by the time between two lines; 10 W for the time that passed
        assert 10 * 0.2 <= used <= 10 * seconds + 0.1
    finally:
        meter.close()
    assert not meter._thread.is_alive()


def test_a_machine_without_a_meter_is_told(tmp_path: Path) -> None:
    with pytest.raises(EngineUnavailable, match="No energy meter: Linux shows neither RAPL"):
        open_meter(tmp_path)


def test_a_meter_for_root_only_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rapl(tmp_path, [1])

    def refused(path: Path) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Rapl, "_read", staticmethod(refused))
    with pytest.raises(EngineUnavailable, match="readable by root only: run the command with sudo"):
        open_meter(tmp_path)


class Counted:
    """Two joules at each look."""

    name = "a test"

    def __init__(self) -> None:
        self.total = 0.0

    def joules(self) -> float:
        self.total += 2
        return self.total

    def close(self) -> None:
        pass


def test_the_benchmark_shows_joules_a_token(q8: Path) -> None:
    found = bench(q8, Workload([4], [], repetitions=3), EngineOptions("native"), threads=[1], meter=Counted())
    (row,) = found.rows
    assert row.joules == pytest.approx(2 / 4)  # 2 J each of 3 runs of 4 tokens
    assert found.as_dict()["rows"][0]["joules_per_token"] == row.joules
    table = found.markdown().splitlines()
    assert table[0].endswith("| J/token |") and table[2].endswith("|     0.5 |")
    assert "energy of a test" in table[-1]
    plain = bench(q8, Workload([4], [], repetitions=1), EngineOptions("native"), threads=[1])
    assert "J/token" not in plain.markdown() and "meter" not in plain.as_dict()


def test_the_command_says_that_there_is_no_meter(q8: Path, edgeformer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgeformer.tools.energy.ROOT", q8)
    monkeypatch.setattr(open_meter, "__defaults__", (q8,))
    code, _, told = edgeformer("bench", q8, "-p", "4", "-n", "0", "-r", "1", "--energy")
    assert code and "No energy meter" in told
