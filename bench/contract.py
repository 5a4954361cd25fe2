"""How soon Ctrl-C comes, and how fast another Python thread runs beside the model.

    python -m bench.contract BUNDLE        writes bench/results/contract.json and docs/contract.md; five minutes
    python -m bench.contract --write-only  the page again, from the saved numbers

Ctrl-C: a timer sends SIGINT to this process at a random moment of the work; the latency ends where KeyboardInterrupt
is caught. Pace: turns of a loop of plain Python in another thread, beside the model in this process, and beside the
same work in another process, which shares the caches and the cores but not the GIL. Run it with a high priority
(`nice -n -10`): on a busy machine both numbers measure the neighbours.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import random
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import edgeformer
from bench.report import ROOT, footnote, put, runs, save, summary, table
from edgeformer.model import Model

PAGE = ROOT / "docs" / "contract.md"
EngineName = Literal["native", "cpu"]
ENGINES: tuple[EngineName, ...] = ("native", "cpu")
PROMPT = 1500  # tokens: three passes of 512 rows on the native engine
WINDOW = 2.0  # seconds of a measurement of pace
Work = Callable[[], object]


def works(path: Path, engine: EngineName) -> dict[str, Work]:
    """What is interrupted, by name."""
    model = edgeformer.load(path, engine=engine, threads=1)
    new = prompts(PROMPT)

    def scheduled() -> None:
        with model.scheduler(max_sequences=2) as scheduler:
            scheduler.add(next(new), max_new_tokens=4, ignore_eos=True).result()

    return {
        "load": lambda: edgeformer.load(path, engine=engine, threads=1),
        "prompt": lambda: prefill(model, next(new)),
        "decode": lambda: decode(model),
        "stream": lambda: list(model.stream(next(new)[:8], max_new_tokens=400, ignore_eos=True)),
        "scheduler": scheduled,
    }


def prompts(length: int) -> Iterator[list[int]]:
    """Prompts of which no two begin alike: none is in a cache of prefixes."""
    for first in itertools.count():
        yield [3 + (first * 7 + i) % 5000 for i in range(length)]


def prefill(model: Model, ids: list[int]) -> None:
    model.generate(ids, max_new_tokens=1, ignore_eos=True)


def decode(model: Model) -> None:
    model.generate(list(range(3, 11)), max_new_tokens=400, ignore_eos=True)


def interrupted(work: Work, after: float) -> float | None:
    """Seconds from SIGINT, sent after so many, to KeyboardInterrupt; None if `work` had ended."""
    sent = [0.0]

    def send() -> None:
        sent[0] = time.perf_counter()
        os.kill(os.getpid(), signal.SIGINT)

    timer = threading.Timer(after, send)
    ended = False
    try:
        timer.start()
        work()
        ended = True
        timer.join()  # the signal comes here
        time.sleep(1)
    except KeyboardInterrupt:
        caught = time.perf_counter()
        timer.join()
        return None if ended else caught - sent[0]
    return None


def latencies(work: Work, rounds: int) -> list[float]:
    """Seconds, of interrupts at random moments of the work."""
    times = []
    for _ in range(3):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    whole, rng, found = min(min(times), 4.0), random.Random(0), []
    for _ in range(20 * rounds):
        latency = interrupted(work, rng.uniform(0.02, 0.9) * whole)
        if latency is not None:
            found.append(latency)
        if len(found) == rounds:
            break
    return found


def count(seconds: float) -> float:
    """Turns a second of a loop of plain Python."""
    turns, began = 0, time.perf_counter()
    until = began + seconds
    while time.perf_counter() < until:
        for _ in range(1000):
            turns += 1
    return turns / (time.perf_counter() - began)


def pace(work: Work | None) -> float:
    """`count` in another thread while this one does `work` again and again; None: while it sleeps."""
    found: list[float] = []
    other = threading.Thread(target=lambda: found.append(count(WINDOW)))
    other.start()
    while other.is_alive():
        if work is None:
            time.sleep(0.05)
        else:
            work()
    other.join()
    return found[0]


def elsewhere(path: str, engine: EngineName, name: str, ready: Any) -> None:
    """Does one of `pace_works` for ever, in a process of its own."""
    work = pace_works(Path(path), engine)[name]
    work()
    ready.set()
    while True:
        work()


def pace_works(path: Path, engine: EngineName) -> dict[str, Work]:
    """Work of much less than WINDOW seconds."""
    model = edgeformer.load(path, engine=engine, threads=1)
    new = prompts(256)
    return {
        "prompt": lambda: prefill(model, next(new)),
        "decode": lambda: model.generate(next(new)[:8], max_new_tokens=16, ignore_eos=True),
    }


def paces(path: Path, engine: EngineName, rounds: int) -> list[dict[str, Any]]:
    """For each work the pace of a Python thread beside it, as a part of its pace alone."""
    found = []
    for name, work in pace_works(path, engine).items():
        here: list[float] = []
        there: list[float] = []
        for _ in range(rounds):
            here.append(pace(work) / pace(None))
            context = multiprocessing.get_context("spawn")
            ready = context.Event()
            process = context.Process(target=elsewhere, args=(str(path), engine, name, ready), daemon=True)
            process.start()
            try:
                ready.wait(120)
                beside = pace(None)
            finally:
                process.terminate()
                process.join()
            there.append(beside / pace(None))
        found.append({"engine": engine, "work": name, "same_process": summary(here), "other_process": summary(there)})
    return found


def measure(path: Path, rounds: int) -> dict[str, Any]:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    interrupts: list[dict[str, Any]] = []
    pace_rows: list[dict[str, Any]] = []
    for engine in ENGINES:
        for name, work in works(path, engine).items():
            found = latencies(work, rounds)
            interrupts.append({"engine": engine, "work": name, "seconds": summary(found)})
            print(engine, name, f"{statistics.median(found) * 1e3:.0f} ms, longest {max(found) * 1e3:.0f}", flush=True)
        pace_rows += paces(path, engine, 3)
        for row in pace_rows[-2:]:
            print(engine, row, flush=True)
    return {"bundle": path.parent.name, "prompt": PROMPT, "interrupts": interrupts, "paces": pace_rows}


def page(run: dict[str, Any]) -> str:
    """The block of docs/contract.md."""
    rows = [
        [row["engine"], row["work"], *(f"{row['seconds'][kind] * 1e3:.0f} ms" for kind in ("median", "max"))]
        for row in run["interrupts"]
    ]
    percent = [
        [
            row["engine"],
            row["work"],
            *(f"{row[kind]['median']:.0%}, least {row[kind]['min']:.0%}" for kind in ("same_process", "other_process")),
        ]
        for row in run["paces"]
    ]
    rounds = run["interrupts"][0]["seconds"]["n"]
    return "\n\n".join(
        [
            f"Seconds from SIGINT to `KeyboardInterrupt`, {rounds} at random moments, {run['bundle']}, one thread, a "
            f"prompt of {run['prompt']:,} tokens:",
            table(["engine", "interrupted", "median", "longest"], rows),
            "Pace of another Python thread, as a part of its pace alone: beside the model, and beside the same work in "
            "another process (what sharing the hardware costs, without the GIL):",
            table(["engine", "beside", "same process", "another process"], percent),
            footnote(run["machine"]),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path, nargs="?")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--write-only", action="store_true")
    options = parser.parse_args()
    if not options.write_only:
        if options.bundle is None:
            parser.error("a bundle is needed")
        save("contract", measure(options.bundle, options.rounds))
    put(PAGE, "contract", page(runs("contract")[0]))


if __name__ == "__main__":
    main()
