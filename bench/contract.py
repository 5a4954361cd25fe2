"""How soon Ctrl-C comes, and how fast another Python thread runs beside the model.

    python -m bench.contract BUNDLE             writes bench/results/contract.json and docs/contract.md
    python -m bench.contract BUNDLE --only gil  the pace of other threads alone, in under a minute; or `interrupts`
    python -m bench.contract --only export      Ctrl-C in an export of SmolLM2's GGUF file; some minutes
    python -m bench.contract --write-only       the page again, from the saved numbers

Ctrl-C: a timer sends SIGINT to this process at a random moment of the work; the latency ends where KeyboardInterrupt
is caught. In the export the moments are those of the longest wait, see bench.export_interrupts. Pace: turns of a loop
of plain Python in another thread, beside the model in this process, and beside the same work in another process, which
shares the caches and the cores but not the GIL. Run it with a high priority (`nice -n -10`): on a busy machine both
numbers measure the neighbours. GIL held: the CPU time of the calling thread outside of the C++ module's `forward`,
which frees the GIL, as a part of all its CPU time; neighbours change it little.
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
from bench import export_interrupts
from bench.report import ROOT, footnote, machine, put, runs, save, summary, table
from edgeformer.model import Model

PAGE = ROOT / "docs" / "contract.md"
EngineName = Literal["native", "cpu"]
ENGINES: tuple[EngineName, ...] = ("native", "cpu")
PROMPT = 1500  # tokens: three passes of 512 rows on the native engine
WINDOW = 1.0  # seconds of a measurement of pace
PARTS = ("interrupts", "gil", "export")
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


def elsewhere(path: str, engine: EngineName, name: str, go: Any, idle: Any) -> None:
    """Does one of `pace_works` again and again while `go` is set, in a process of its own."""
    work = pace_works(edgeformer.load(path, engine=engine, threads=1))[name]
    work()
    while True:
        idle.set()
        go.wait()
        idle.clear()
        while go.is_set():
            work()


def pace_works(model: Model) -> dict[str, Work]:
    """Work of less than WINDOW seconds."""
    new = prompts(256)
    return {
        "prompt": lambda: prefill(model, next(new)),
        "decode": lambda: model.generate(next(new)[:8], max_new_tokens=16, ignore_eos=True),
    }


def held(model: Model, work: Work) -> float | None:
    """The part of this thread's CPU time in `work` that is outside of the native engine's `forward`."""
    native: Any = getattr(model.engine, "_native", None)
    if native is None:
        return None
    inside = [0.0]

    class Timed:
        def forward(self, *args: Any) -> Any:
            began = time.thread_time()
            try:
                return native.forward(*args)
            finally:
                inside[0] += time.thread_time() - began

        def __getattr__(self, name: str) -> Any:
            return getattr(native, name)

    engine: Any = model.engine
    engine._native = Timed()
    try:
        began = time.thread_time()
        work()
        whole = time.thread_time() - began
    finally:
        engine._native = native
    return 1 - inside[0] / whole


def paces(path: Path, engine: EngineName, rounds: int) -> list[dict[str, Any]]:
    """For each work the pace of a Python thread beside it, as a part of its pace alone."""
    found = []
    model = edgeformer.load(path, engine=engine, threads=1)
    for name, work in pace_works(model).items():
        here: list[float] = []
        there: list[float] = []
        context = multiprocessing.get_context("spawn")
        go, idle = context.Event(), context.Event()
        process = context.Process(target=elsewhere, args=(str(path), engine, name, go, idle), daemon=True)
        process.start()
        try:
            work()
            idle.wait(120)
            for _ in range(rounds):
                here.append(pace(work) / pace(None))
                go.set()
                while idle.is_set():
                    time.sleep(0.01)
                beside = pace(None)
                go.clear()
                idle.wait(120)
                there.append(beside / pace(None))
        finally:
            process.terminate()
            process.join()
        row = {"engine": engine, "work": name, "same_process": summary(here), "other_process": summary(there)}
        share = held(model, work)
        found.append(row | ({} if share is None else {"held": float(f"{share:.3g}")}))
    return found


def measure(path: Path | None, parts: tuple[str, ...], rounds: int) -> dict[str, Any]:
    """The parts that were measured now; `path` is needed for all but the export."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    measured: dict[str, Any] = {"bundle": path.parent.name, "prompt": PROMPT} if path is not None else {}
    interrupts: list[dict[str, Any]] = []
    pace_rows: list[dict[str, Any]] = []
    for engine in ENGINES if path is not None else ():
        assert path is not None
        for name, work in works(path, engine).items() if "interrupts" in parts else ():
            found = latencies(work, rounds)
            interrupts.append({"engine": engine, "work": name, "seconds": summary(found)})
            print(engine, name, f"{statistics.median(found) * 1e3:.0f} ms, longest {max(found) * 1e3:.0f}", flush=True)
        if "gil" in parts:
            pace_rows += paces(path, engine, 3)
            for row in pace_rows[-2:]:
                print(engine, row, flush=True)
    rows = {"interrupts": interrupts, "paces": pace_rows}
    if "export" in parts:
        rows["export"] = export_interrupts.measure()
    return measured | {name: row for name, row in rows.items() if row}


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
    if any("held" in row for row in run["paces"]):
        for line, row in zip(percent, run["paces"], strict=True):
            line.append(f"{row['held']:.1%}" if "held" in row else "not measured")
    header = ["engine", "beside", "same process", "another process"]
    header += ["GIL held"] * any("held" in row for row in run["paces"])
    rounds = run["interrupts"][0]["seconds"]["n"]
    exported = [export_interrupts.page(run["export"])] if "export" in run else []
    return "\n\n".join(
        [
            f"Seconds from SIGINT to `KeyboardInterrupt`, {rounds} at random moments, {run['bundle']}, one thread, a "
            f"prompt of {run['prompt']:,} tokens:",
            table(["engine", "interrupted", "median", "longest"], rows),
            *exported,
            "Pace of another Python thread, as a part of its pace alone: beside the model, and beside the same work in "
            "another process (what sharing the hardware costs, without the GIL):",
            table(header, percent),
            *([measured(run)] if "dates" in run else []),
            footnote(run["machine"]),
        ]
    )


def measured(run: dict[str, Any]) -> str:
    """When each part was, and whether other work ran then."""
    beside = dict.fromkeys(run["disturbed"], " (beside other work)")
    return "Measured: " + ", ".join(f"{part} {date}{beside.get(part, '')}" for part, date in run["dates"].items()) + "."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path, nargs="?")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--write-only", action="store_true")
    parser.add_argument("--only", choices=PARTS, help="measure this part; the others stay as they were saved")
    parser.add_argument("--disturbed", action="store_true", help="note that other work ran on the machine")
    options = parser.parse_args()
    parts = (options.only,) if options.only else PARTS
    if not options.write_only:
        if options.bundle is None and parts != ("export",):
            parser.error("a bundle is needed")
        before = (runs("contract") or [{}])[0]
        dates = before.get("dates") or {part: before["machine"]["date"] for part in PARTS[:2] if before}
        disturbed = set(before.get("disturbed", ())) - {*parts} | {part for part in parts if options.disturbed}
        kept = {name: value for name, value in before.items() if name != "machine"}
        kept |= measure(options.bundle, parts, options.rounds)
        dates |= dict.fromkeys(parts, machine()["date"])
        save("contract", kept | {"dates": dates, "disturbed": sorted(disturbed)})
    put(PAGE, "contract", page(runs("contract")[0]))


if __name__ == "__main__":
    main()
