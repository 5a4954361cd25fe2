"""Energy that a machine uses, from its own meters: RAPL of Intel and AMD processors, or a Jetson's power monitor.

RAPL counts the energy of the processor packages (kernel.org, power/powercap). Since 2020 Linux shows it to root only:
with its counts a process could guess another's data. The INA3221 of Jetson boards tells volts and amperes of the whole
module at its input, VDD_IN (kernel.org, hwmon/ina3221), which are added up here every 50 ms.
"""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Protocol

from edgeformer.errors import EngineUnavailable

ROOT = Path("/")


class Meter(Protocol):
    """What counts energy."""

    name: str

    def joules(self) -> float:
        """The energy used since the meter was made."""

    def close(self) -> None:
        """Stop counting."""


class Rapl:
    """The energy of all processor packages, without memory and the rest of the machine."""

    def __init__(self, packages: list[Path]) -> None:
        self.name = "processor packages (RAPL)"
        # a package's counter starts again at 0 after this many microjoules: about an hour at 70 W
        self._wraps = [(path, int((path / "max_energy_range_uj").read_text())) for path in packages]
        self._last = [self._read(path) for path in packages]
        self._total = 0

    @staticmethod
    def _read(path: Path) -> int:
        return int((path / "energy_uj").read_text())

    def joules(self) -> float:
        """Right if it is called at least once in each round of the counters."""
        for i, (path, wrap) in enumerate(self._wraps):
            now = self._read(path)
            self._total += now - self._last[i] if now >= self._last[i] else now + wrap - self._last[i]
            self._last[i] = now
        return self._total / 1e6

    def close(self) -> None:
        """There is nothing to stop."""


class PowerMonitor:
    """The energy of a board at its power input: samples of volts x amperes, each held until the next."""

    def __init__(self, monitor: Path, channel: str, seconds: float = 0.05) -> None:
        self.name = f"{(monitor / f'in{channel}_label').read_text().strip()} (INA3221)"
        self._volts, self._amperes = monitor / f"in{channel}_input", monitor / f"curr{channel}_input"
        self._seconds, self._stop, self._lock = seconds, threading.Event(), threading.Lock()
        self._total, self._power, self._at = 0.0, self._watts(), time.perf_counter()
        self._thread = threading.Thread(target=self._sample, name="power monitor", daemon=True)
        self._thread.start()

    def _watts(self) -> float:
        return int(self._volts.read_text()) * int(self._amperes.read_text()) / 1e6  # millivolts x milliamperes

    def _add(self) -> float:
        with self._lock:
            now, power = time.perf_counter(), self._watts()
            self._total += self._power * (now - self._at)
            self._power, self._at = power, now
            return self._total

    def _sample(self) -> None:
        while not self._stop.wait(self._seconds):
            self._add()

    def joules(self) -> float:
        """The sum up to now."""
        return self._add()

    def close(self) -> None:
        """End the thread that samples."""
        self._stop.set()
        self._thread.join()


def open_meter(root: Path = ROOT) -> Meter:
    """The meter of this machine.

    Raises:
        EngineUnavailable: there is none, or this user may not read it; the message says which.
    """
    for monitor in sorted((root / "sys/bus/i2c/drivers/ina3221").glob("*/hwmon/hwmon*")):
        for label in sorted(monitor.glob("in[123]_label")):
            if label.read_text().strip() == "VDD_IN":
                return PowerMonitor(monitor, label.name[2])
    packages = []
    for zone in sorted((root / "sys/class/powercap").glob("intel-rapl:[0-9]*")):
        if zone.name.count(":") == 1:  # intel-rapl:0:0 is a part of intel-rapl:0
            packages.append(zone)
    if not packages:
        raise EngineUnavailable(
            "No energy meter: Linux shows neither RAPL (/sys/class/powercap/intel-rapl:0, of processors by Intel and "
            "AMD; virtual machines have none) nor an INA3221 with a channel VDD_IN (Jetson)."
        )
    try:
        return Rapl(packages)
    except PermissionError as error:
        raise EngineUnavailable(
            f"The energy meter {packages[0]}/energy_uj is readable by root only: run the command with sudo, or "
            f"`sudo chmod a+r {packages[0]}/energy_uj` until the next start."
        ) from error
