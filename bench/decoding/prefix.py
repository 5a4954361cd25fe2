"""The first token of a prompt whose beginning was seen before: in the same process, and in another one.

    python -m bench.decoding.prefix BUNDLE FOLDER THREADS NUMBER      one process; prints its seconds as JSON

Prompts are 1,024 tokens that all share and 24 of their own. Each process first runs another prompt, to warm up.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.decoding.setting import (
    LIMIT,
    Options,
    Prompts,
    by_threads,
    note,
    summaries,
    threads_text,
    verdict,
)
from bench.peers.runners.measure import Others
from bench.report import ROOT, table

SHARED, OWN = 1024, 24
SAME, OTHER = 0.10, 0.20  # of the first one's time


def child(bundle: str, folder: str, threads: int, number: int) -> dict[str, float]:
    """Seconds to the first token of two prompts with the same beginning; cached: tokens that were not run again."""
    import edgeformer
    from edgeformer import disk_cache

    others = Others()
    model = edgeformer.load(bundle, "native", threads=threads, prefix_cache=folder)
    texts = Prompts.of(model)
    shared = texts.take(SHARED)
    for _ in range(8 * number):
        texts.take(OWN)  # the second process has other prompts
    arguments: dict[str, Any] = {"max_new_tokens": 1, "ignore_eos": True, "temperature": 0, "speculation": "off"}
    for _ in range(4):
        model.generate(texts.take(SHARED // 2), **arguments)
    found = {}
    for name in ("first", "second"):
        own = texts.take(OWN)
        disk_cache.finish()  # the next prompt comes later than the folder is written
        began = time.perf_counter()
        result = model.generate(shared + own, **arguments)
        found[name] = time.perf_counter() - began
        found[f"{name}_cached"] = float(result.cached_tokens)
    disk_cache.finish()
    return found | {"others": others.cores()}


def process(options: Options, folder: str, threads: int, number: int) -> dict[str, float]:
    """`child` in a process of its own."""
    command = [sys.executable, "-m", "bench.decoding.prefix", str(options.bundle), folder, str(threads), str(number)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the process of {threads_text(threads)} failed: {done.stderr.strip()[-500:]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def pair(options: Options, threads: int) -> dict[str, float]:
    """One round: a process with an empty folder, then another with what it left there."""
    with tempfile.TemporaryDirectory() as folder:
        one, other = (process(options, folder, threads, number) for number in range(2))
    if one["first_cached"] or one["second_cached"] < SHARED or other["first_cached"] < SHARED:
        raise RuntimeError(f"tokens of the beginning that were cached: {one} and {other}")
    return {
        "first": one["first"],
        "same": one["second"],
        "other": other["first"],
        "same_share": one["second"] / one["first"],
        "other_share": other["first"] / one["first"],
        "others": max(one["others"], other["others"]),
    }


def measure(options: Options) -> dict[str, Any]:
    """threads -> summaries of first, same and other (seconds), and of their shares."""
    measured: dict[str, Any] = {}
    most = 0.0
    for threads in options.threads:
        rounds = []
        for _ in range(options.rounds):
            tried = [pair(options, threads)]
            while len(tried) < (1 if options.quick else 3) and tried[-1]["others"] > LIMIT:
                tried.append(pair(options, threads))
            best = min(tried, key=lambda one: one["others"])
            most = max(most, best.pop("others"))
            rounds.append(best)
        measured[str(threads)] = summaries(rounds)
    return {"shared": SHARED, "own": OWN, "others": most, "measured": measured}


def text(saved: dict[str, Any], _: Path) -> str:
    """The table."""
    rows = []
    for threads in by_threads(saved):
        value = {name: one["median"] for name, one in saved["measured"][str(threads)].items()}
        rows.append(
            [
                threads_text(threads),
                f"{value['first'] * 1e3:.0f}",
                f"{value['same'] * 1e3:.1f}",
                f"{value['same_share']:.1%}, {verdict(value['same_share'], SAME, least=False)}",
                f"{value['other'] * 1e3:.1f}",
                f"{value['other_share']:.1%}, {verdict(value['other_share'], OTHER, least=False)}",
            ]
        )
    heads = ["", "first time, ms", "second, same process, ms", f"of the first (at most {SAME:.0%})"]
    heads += ["from the folder, other process, ms", f"of the first (at most {OTHER:.0%})"]
    return "\n\n".join(
        [
            f"Time to the first token of a prompt of {saved['shared']:,} + {saved['own']} tokens whose first "
            f"{saved['shared']:,} were seen before:",
            table(heads, rows),
            note(saved),
        ]
    )


if __name__ == "__main__":
    place, kept, count, which = sys.argv[1:]
    print(json.dumps(child(place, kept, int(count), int(which))))
