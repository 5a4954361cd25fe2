"""Mixed use of one model for a long time: afterwards the same prompts give the same bits, and nothing is left.

    python -m support.soak SECONDS [ENGINE ...] [--save]    a line of JSON for each engine; 1 where something is wrong

Three threads generate from random prompts, leave streams, cancel answers of a scheduler, go on in sessions, fork and
select states, save and restore sessions, and load the bundle again. Memory is measured between rounds of ROUND
operations, when no call runs. The warm-up is counted in operations and not in seconds: an allocator takes the most that
three threads ever need at once, and what they need at once is chance. `--save` writes bench/results/soak.json and
docs/contract.md. Run it with MALLOC_ARENA_MAX=1: glibc makes up to eight heaps a core for threads, each of which grows
to its own peak, and that takes longer than a leak takes to be seen.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import random
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from support import tiny

from edgeformer import disk_cache, load

THREADS = 3
ROUND = 300  # operations of all threads between two measurements
# Of the warm-up. With 110 MB resident, the heap of glibc grew by 6 MB in the first 15,000 operations and by 1 MB in the
# next 30,000, while the bytes in use stayed (a run of 45,600 operations).
WARM = 15_000
AT_ONCE = 5  # measurements of which the median counts
GROWTH = 0.02  # the most that memory may grow after the warm-up
PAGE_SIZE = os.sysconf("SC_PAGESIZE") if hasattr(os, "sysconf") else 4096


class _Heap(ctypes.Structure):
    """`struct mallinfo2` of glibc 2.33."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "used", "free", "keepcost")
    ]


def resident() -> int:
    """Bytes of this process that are in memory."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE_SIZE


def in_use() -> int | None:
    """Bytes that malloc has given out and not got back; None where the C library does not say it."""
    mallinfo2 = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if mallinfo2 is None:
        return None
    mallinfo2.restype = _Heap
    heap = mallinfo2()
    return int(heap.used + heap.hblkhd)


class Soak:
    """One model, what is done with it, and what went wrong."""

    def __init__(self, path: Path, engine: Any, folder: Path) -> None:
        self.path, self.engine, self.folder = path, engine, folder
        kept: Any = folder / "prefixes" if engine == "native" else None
        self.model = load(path, engine, threads=2, prefix_cache=kept)
        self.scheduler = self.model.scheduler(max_sequences=4)
        self.counts: Counter[str] = Counter()
        self.problems: list[str] = []
        self.jobs = {
            self.generate: 6,
            self.leave_stream: 3,
            self.cancel: 3,
            self.go_on: 3,
            self.states: 3,
            self.reload: 1,
        }
        if engine == "native":
            self.jobs[self.save] = 3

    def probe(self) -> list[Any]:
        """Tokens and logits of fixed prompts."""
        ids = [[5 + i, 40, 17, 88 + i] for i in range(4)]
        tokens = [
            self.model.generate(one, max_new_tokens=24, ignore_eos=True, session=self.model.session()).ids
            for one in ids
        ]
        engine = self.model.engine
        return [tokens, engine.forward([({"input_ids": np.array(ids[:1])}, engine.new_state())])[0]["logits"].tobytes()]

    def generate(self, rng: random.Random) -> None:
        seed = rng.randrange(1 << 30)
        self.model.generate(prompt(rng), max_new_tokens=rng.randrange(1, 30), temperature=0.8, seed=seed)

    def leave_stream(self, rng: random.Random) -> None:
        stream = self.model.stream(prompt(rng), max_new_tokens=40, ignore_eos=True)
        for _ in range(rng.randrange(5)):
            next(stream)

    def cancel(self, rng: random.Random) -> None:
        answers = [self.scheduler.add(prompt(rng), max_new_tokens=30, ignore_eos=True) for _ in range(2)]
        time.sleep(rng.random() * 0.02)
        answers[0].cancel()
        for answer in answers:
            answer.result(300)

    def go_on(self, rng: random.Random) -> None:
        session, ids = self.model.session(), prompt(rng)
        for _ in range(3):
            ids = ids + self.model.generate(ids, max_new_tokens=4, ignore_eos=True, session=session).ids

    def states(self, rng: random.Random) -> None:
        """A fork, and a copy by `select`, give the bits of the state that they come from."""
        engine = self.model.engine
        state, ids = engine.new_state(), np.array([prompt(rng)])
        engine.forward([({"input_ids": ids}, state)])
        others = [state.fork(), state.fork()]
        others[1].select([0])
        found = [engine.forward([({"input_ids": ids[:, :1]}, one)])[0]["logits"] for one in (state, *others)]
        if any(not np.array_equal(found[0], one) for one in found):
            self.problems.append("a forked state gives other bits")

    def save(self, rng: random.Random) -> None:
        """A session that was saved and restored goes on with the same tokens."""
        session, ids = self.model.session(), prompt(rng)
        ids = ids + self.model.generate(ids, max_new_tokens=4, ignore_eos=True, session=session).ids
        path = self.folder / f"{threading.get_ident()}.session"
        session.save(path)
        found = [
            self.model.generate(ids, max_new_tokens=4, ignore_eos=True, session=one).ids
            for one in (session, self.model.session(path))
        ]
        path.unlink()
        if found[0] != found[1]:
            self.problems.append("a restored session gives other tokens")

    def reload(self, rng: random.Random) -> None:
        load(self.path, self.engine, threads=1).generate(prompt(rng), max_new_tokens=2)

    def work(self, operations: Iterator[int], seed: int) -> None:
        rng = random.Random(seed)
        jobs, weights = list(self.jobs), list(self.jobs.values())
        for _ in operations:
            job = rng.choices(jobs, weights)[0]
            try:
                job(rng)
            except Exception as error:
                self.problems.append(f"{job.__name__}: {type(error).__name__}: {error}")
            self.counts[job.__name__] += 1

    def round(self, seed: int, operations: int = ROUND) -> tuple[int, int | None]:
        """(bytes resident, bytes in use) after so many operations."""
        shared = iter(range(operations))  # next() of it is atomic under the GIL
        threads = [threading.Thread(target=self.work, args=(shared, seed + i)) for i in range(THREADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        disk_cache.finish()
        return resident(), in_use()

    def run(self, seconds: float, warm: int = WARM, operations: int = ROUND) -> dict[str, Any]:
        """Rounds until the time is over, at least `warm` operations and 2 * AT_ONCE rounds more."""
        before, memory, until = self.probe(), [], time.monotonic() + seconds
        after = warm // operations
        while len(memory) < after + 2 * AT_ONCE or time.monotonic() < until:
            memory.append(self.round(len(memory) * THREADS, operations))
            if self.problems:
                break
        same = self.probe() == before
        self.scheduler.close()
        disk_cache.finish()
        measured = memory[after:]
        return {
            "engine": self.engine,
            "seconds": round(seconds),
            "operations": sum(self.counts.values()),
            "warm": after * operations,
            "kinds": dict(sorted(self.counts.items())),
            "resident_mb": [round(one / 1e6, 1) for one in ends([resident for resident, _ in measured])],
            "in_use_mb": [round(one / 1e6, 2) for one in ends([used for _, used in measured if used is not None])],
            "same_bits": same,
            "threads_left": threading.active_count() - 1,
            "problems": self.problems[:10],
        }


def ends(values: list[int]) -> list[float]:
    """The medians of the first and of the last AT_ONCE values."""
    return [statistics.median(values[:AT_ONCE]), statistics.median(values[-AT_ONCE:])] if values else []


def problems(report: dict[str, Any]) -> list[str]:
    """What of a report is wrong, in words."""
    found = list(report["problems"])
    for name in ("resident_mb", "in_use_mb"):
        if report[name] and (grown := report[name][1] / report[name][0] - 1) > GROWTH:
            found.append(f"{name} grew by {grown:.1%} after {report['warm']:,} operations, allowed {GROWTH:.0%}")
    if not report["same_bits"]:
        found.append("the same prompts give other bits than before")
    if report["threads_left"]:
        found.append(f"{report['threads_left']} threads are left")
    return found


def prompt(rng: random.Random) -> list[int]:
    return [rng.randrange(3, 300) for _ in range(rng.choice((1, 3, 20, 140)))]


def soak(engine: str, seconds: float, **options: int) -> dict[str, Any]:
    """The report of one engine on a tiny model of 8 bits."""
    with tempfile.TemporaryDirectory() as folder:
        path = tiny.write_lm(Path(folder) / "b", scheme="q8")
        return Soak(path, engine, Path(folder)).run(seconds, **options)


def page(run: dict[str, Any]) -> str:
    """The block of docs/contract.md."""
    from bench.report import footnote, table

    rows = []
    for one in run["engines"]:
        numbers = [f"{a:.1f} -> {b:.1f} MB ({b / a - 1:+.1%})" for a, b in (one["resident_mb"], one["in_use_mb"])]
        kinds = ", ".join(f"{name} {count:,}" for name, count in one["kinds"].items())
        same = "the same" if one["same_bits"] else "other"
        rows.append([one["engine"], f"{one['seconds'] / 60:.0f}", f"{one['operations']:,}", *numbers, same,
                     str(one["threads_left"]), kinds])  # fmt: skip
    header = ["engine", "minutes", "operations", "resident", "in use (malloc)", "bits", "threads left", "of each kind"]
    return table(header, rows) + "\n\n" + footnote(run["machine"])


def main(arguments: list[str]) -> int:
    seconds, *names = [one for one in arguments if one != "--save"]
    reports = []
    for engine in names or ["native", "cpu"]:
        reports.append(soak(engine, float(seconds)))
        print(json.dumps(reports[-1]), problems(reports[-1]) or "nothing is wrong", flush=True)
    if "--save" in arguments:
        from bench.report import ROOT, put, runs, save

        others = [one for run in runs("soak")[:1] for one in run["engines"] if one["engine"] not in names]
        save("soak", {"engines": [*reports, *(others if names else ())]})
        put(ROOT / "docs" / "contract.md", "soak", page(runs("soak")[0]))
    return 1 if any(map(problems, reports)) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
