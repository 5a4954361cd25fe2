"""Ctrl-C in an export of a real model: how soon it comes at any moment, and that nothing is left.

    python -m bench.contract --only export

The export of SmolLM2-135M's GGUF file to 4 bits with a second quantization, in one process, so that imports are done. A
first run has a timer of the system that sends a signal every 50 ms. Python runs its handler where it would raise
KeyboardInterrupt: the time from the signal to the handler is the wait of a Ctrl-C at that moment. Then one run for each
stage: SIGINT at the moment of its longest wait. That latency ends where `export` raises KeyboardInterrupt, its clean-up
included. Afterwards the folder of the target and that of temporary files must be empty.
"""

from __future__ import annotations

import os
import signal
import statistics
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from bench.report import table
from bench.smollm2 import gguf_path

T = TypeVar("T")
EVERY = 0.05  # seconds between the timer's signals
SHORT = 0.1  # a shorter stage is not interrupted: it may have ended when the signal comes
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


@contextmanager
def waits() -> Iterator[list[tuple[float, float]]]:
    """(when the system's timer sent a signal, seconds until its handler ran) while the block runs."""
    found: list[tuple[float, float]] = []
    began = time.perf_counter()
    handled = 0  # signals: those that came while one waited are one for Python

    def handler(*_: object) -> None:
        nonlocal handled
        now = time.perf_counter()
        sent = began + (handled + 1) * EVERY
        if now >= sent:
            found.append((sent, now - sent))
            handled = int((now - began) / EVERY)

    old = signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, EVERY, EVERY)
    try:
        yield found
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)


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
    """For each stage: {stage, seconds, waits (how many, median, longest), latency}."""
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
    with waits() as seen:
        run(place, whole)
    ends = [at for _, at in whole.began[1:]] + [time.perf_counter()]
    found = []
    for number, ((stage, began), end) in enumerate(zip(whole.began, ends, strict=True)):
        here = [(at - began, seconds) for at, seconds in seen if began <= at < end]
        if end - began < SHORT or not here:
            continue
        worst, longest = max(here, key=lambda each: each[1])
        row = {
            "stage": stage.replace(str(gguf_path()), gguf_path().name).partition(":")[0],  # no path of this machine
            "seconds": float(f"{end - began:.3g}"),
            "waits": {
                "count": len(here),
                "median": float(f"{statistics.median(seconds for _, seconds in here):.3g}"),
                "longest": float(f"{longest:.3g}"),
            },
        }
        print(row, flush=True)
        latency = run(place, Stages(number, worst))
        found.append(row | {"latency": None if latency is None else float(f"{latency:.3g}")})
        print("  interrupted after", found[-1]["latency"], flush=True)
    return found


def page(rows: list[dict[str, Any]]) -> str:
    """The table of docs/contract.md."""
    lines = [
        [
            row["stage"],
            f"{row['seconds']:.1f} s",
            f"{row['waits']['count']:,}",
            *(f"{row['waits'][kind] * 1e3:.0f} ms" for kind in ("median", "longest")),
            "ended before" if row["latency"] is None else f"{row['latency'] * 1e3:.0f} ms",
        ]
        for row in rows
    ]
    heads = ["stage", "takes", "signals", "median", "longest", "interrupted after"]
    return (
        "An export of SmolLM2-135M's GGUF file: from a signal, one every 50 ms, to its handler in Python; and from "
        "SIGINT at the longest of these moments to the `KeyboardInterrupt` that `export` raises once all its files are "
        "removed:\n\n" + table(heads, lines)
    )
