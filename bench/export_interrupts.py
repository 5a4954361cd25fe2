"""Ctrl-C in an export of a real model: how soon it comes in each stage, and that nothing is left.

    python -m bench.contract --only export

The export of SmolLM2-135M's GGUF file to 4 bits with a second quantization, in one process, so that imports are done. A
first run gives the stages and their seconds. Then one run for each stage, and two more for long ones: a timer sends
SIGINT inside it; the latency ends where `export` raises KeyboardInterrupt. Afterwards the folder of the target and that
of temporary files must be empty.
"""

from __future__ import annotations

import os
import signal
import tempfile
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

from bench.report import table
from bench.smollm2 import gguf_path

T = TypeVar("T")
LONG = 3.0  # seconds of a stage that is interrupted three times
SHORT = 0.1  # a shorter one is left out: it may have ended when the signal comes
TOKENS = 256  # that accuracy is measured on


class Stages:
    """A `Progress` that notes when each stage begins, and starts a timer at one of them."""

    def __init__(self, wanted: int = -1, after: float = 0.0) -> None:
        self.began: list[tuple[str, float]] = []
        self.sent: list[float] = []
        self.timer = threading.Timer(after, self._send)
        self._wanted = wanted

    def stage(self, text: str) -> None:
        """The next one begins."""
        if len(self.began) == self._wanted:
            self.timer.start()
        self.began.append((text, time.perf_counter()))

    def track(self, items: Iterable[T], name: str) -> Iterable[T]:  # noqa: ARG002  the protocol's
        """Returns `items`."""
        return items

    def _send(self) -> None:
        self.sent.append(time.perf_counter())
        os.kill(os.getpid(), signal.SIGINT)


def run(place: Path, progress: Stages) -> float | None:
    """Exports; seconds from the signal to KeyboardInterrupt, None where none came before the end.

    Raises:
        RuntimeError: an interrupted export left something.
    """
    from edgeformer.export import ExportOptions, export

    out = place / str(len(os.listdir(place)))
    out.mkdir()
    options = ExportOptions(str(gguf_path()), out / "bundle", quantize="q4a", calibration="none", tokens=TOKENS)
    try:
        export(options, progress)
        progress.timer.cancel()
        if progress.timer.ident is not None:
            progress.timer.join()  # a signal that was sent comes here
        return None
    except KeyboardInterrupt:
        latency = time.perf_counter() - progress.sent[0]
        progress.timer.join()
    left = [*os.listdir(out), *os.listdir(tempfile.gettempdir())]
    if left:
        raise RuntimeError(f"Ctrl-C in {progress.began[-1][0]!r} left {left}")
    return latency


def measure() -> list[dict[str, Any]]:
    """For each stage: {stage, seconds, latencies}."""
    old = tempfile.tempdir
    with tempfile.TemporaryDirectory(prefix="export-") as name:
        place, scratch = Path(name) / "out", Path(name) / "scratch"
        place.mkdir()
        scratch.mkdir()
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(Path(name) / "inductor")  # torch's own, which stays
        tempfile.tempdir = str(scratch)
        try:
            return _measure(place)
        finally:
            tempfile.tempdir = old


def _measure(place: Path) -> list[dict[str, Any]]:
    whole = Stages()
    run(place, whole)
    ends = [at for _, at in whole.began[1:]] + [time.perf_counter()]
    found = []
    for number, ((stage, began), end) in enumerate(zip(whole.began, ends, strict=True)):
        seconds = end - began
        if seconds < SHORT:
            continue
        parts = (0.2, 0.5, 0.8) if seconds > LONG else (0.5,)
        latencies = [run(place, Stages(number, part * seconds)) for part in parts]
        caught = [float(f"{latency:.4g}") for latency in latencies if latency is not None]
        stage = stage.replace(str(gguf_path()), gguf_path().name)
        found.append({"stage": stage, "seconds": float(f"{seconds:.3g}"), "latencies": caught})
        print(found[-1], flush=True)
    return found


def page(rows: list[dict[str, Any]]) -> str:
    """The table of docs/contract.md."""
    lines = [
        [
            row["stage"],
            f"{row['seconds']:.1f} s",
            ", ".join(f"{latency * 1e3:.0f} ms" for latency in row["latencies"]) or "ended before",
        ]
        for row in rows
    ]
    return (
        "Seconds from SIGINT to `KeyboardInterrupt` in an export of SmolLM2-135M's GGUF file; nothing was left:\n\n"
        + table(["stage", "takes", "interrupted after"], lines)
    )
