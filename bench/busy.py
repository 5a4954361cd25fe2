"""Decoding beside a busy process: two threads must not be slower than one.

    python -m bench.busy BUNDLE     prints a table of tokens per second (median of the rounds)

A busy process takes one of two cores for at least half of the time. Rounds with and without it alternate, so that other
load on the machine affects both.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import time

import numpy as np

from bench.report import table
from edgeformer.engines.native.engine import NativeEngine

STEPS = 24


def spin() -> None:
    while True:
        pass


def rate(engine: NativeEngine) -> float:
    """Tokens per second of `STEPS` greedy steps after a short prompt."""
    state, ids = engine.new_state(), np.array([[504, 2010, 3575, 314]])
    started = 0.0
    for step in range(STEPS + 2):
        if step == 2:
            started = time.perf_counter()
        logits = engine.forward([({"input_ids": ids, "logits_to_keep": np.array(1)}, state)])[0]["logits"]
        ids = logits[:, -1].argmax(-1)[None]
    return STEPS / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle")
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    engines = {threads: NativeEngine.from_bundle(options.bundle, threads=threads) for threads in (1, 2)}
    rates: dict[tuple[bool, int], list[float]] = {}
    load = os.getloadavg()[0]
    for _ in range(options.rounds):
        for busy in (False, True):
            other = multiprocessing.get_context("spawn").Process(target=spin, daemon=True) if busy else None
            if other:
                other.start()
                time.sleep(1)
            try:
                for threads, engine in engines.items():
                    rates.setdefault((busy, threads), []).append(rate(engine))
            finally:
                if other:
                    other.terminate()
                    other.join()
    rows = [
        ["one busy process" if busy else "nothing else of ours", str(threads), f"{statistics.median(found):.1f}",
         f"{min(found):.1f} to {max(found):.1f}"]
        for (busy, threads), found in rates.items()
    ]  # fmt: skip
    print(table(["beside", "threads", "tokens/s", "range"], rows))
    print(f"{len(os.sched_getaffinity(0))} cores, load {load:.1f} before the first round")


if __name__ == "__main__":
    main()
