"""All architectures, each in a subprocess with a time limit; results are saved after each one."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.coverage.examine import DEFAULT, ENGINES, FLOAT, examine
from bench.report import ROOT

RESULTS = ROOT / "docs" / "coverage.json"
PAGE = ROOT / "docs" / "coverage.md"
KEYS = tuple(f"{engine} {kind}" for engine in ENGINES for kind in (FLOAT, DEFAULT))
CODE = ("edgeformer", "csrc", "bench/coverage", "setup.py")  # a result depends on these and on installed packages


def commit() -> str:
    """The last commit of CODE, "<hash> of <date>"; "+" behind the hash if there are uncommitted changes."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    changed = "+" if git("status", "--porcelain", "--", *CODE) else ""
    return git("log", "-1", f"--format=%h{changed} of %cs", "--", *CODE)


def as_lines(rows: dict[str, Any]) -> str:
    """JSON with one line a row."""
    lines = [f"{json.dumps(name)}: {json.dumps(row, sort_keys=True)}" for name, row in sorted(rows.items())]
    return "{\n" + ",\n".join(lines) + "\n}\n"


def draw(names: list[str], day: str, count: int = 10) -> list[str]:
    """`count` names drawn for `day` (an ISO date): the same for one date, others for another."""
    return random.Random(day).sample(sorted(names), count)


def what_differs(found: dict[str, Any], row: dict[str, Any]) -> list[str]:
    """The differences between a row of the table and a new examination, as sentences.

    Of an engine only ok or not is compared, because messages have numbers in them.
    """
    told = []
    for what in ("status", "class", "layers"):
        if found.get(what) != row.get(what):
            told.append(f"{what} is {found.get(what)!r}, the table says {row.get(what)!r}")
    for key, then in sorted(row["engines"].items()):
        now = found["engines"].get(key, "not reached")
        if (now == "ok") != (then == "ok") and key in KEYS:
            told.append(f"{key}: {now}; the table says {then}")
    return told


def _worker(name: str, pipe: Any) -> None:
    sys.stderr = sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    pipe.send(examine(name))


def sweep(chosen: list[str], results: Path, limit: float, redo: str) -> dict[str, Any]:
    """Examines each name without a result that names its commit; writes the results after each one."""
    import torch
    import transformers
    from tqdm import tqdm

    import edgeformer.export.pipeline  # noqa: F401  loaded once: the subprocesses are forks of this one

    torch.set_num_threads(1)
    made = {"commit": commit(), "transformers": transformers.__version__}
    rows: dict[str, Any] = json.loads(results.read_text()) if results.exists() else {}
    again: dict[str, Callable[[dict[str, Any]], bool]] = {
        "none": lambda _: False,
        "failed": lambda row: not fine(row),
        "old": lambda row: {key: row.get(key) for key in made} != made,
        "all": lambda _: True,
    }
    todo = [n for n in chosen if "commit" not in rows.get(n, {}) or again[redo](rows[n])]
    for name in (bar := tqdm(todo, unit="model")):
        bar.set_postfix_str(f"{name}, {sum(fine(row) for row in rows.values())} fine")
        rows[name] = _apart(name, limit) | made
        results.parent.mkdir(exist_ok=True)
        kept = {n: {k: v for k, v in r.items() if k != "trace" or results != RESULTS} for n, r in rows.items()}
        results.write_text(as_lines(kept))
    return rows


def fine(row: dict[str, Any]) -> bool:
    """Whether the model works on every engine that takes it."""
    return row["status"] == "works" and all(v == "ok" for v in row["engines"].values())


def _apart(name: str, limit: float) -> dict[str, Any]:
    """The row of `name`, examined in a subprocess of at most `limit` seconds."""
    context = multiprocessing.get_context("fork")
    start = time.monotonic()
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_worker, args=(name, there))
    process.start()
    there.close()
    row: dict[str, Any]
    try:
        late = {"status": "no", "cause": f"not done in {limit:.0f} s", "engines": {}}
        row = here.recv() if here.poll(limit) else late
    except EOFError:
        row = {"status": "no", "cause": "the process died", "engines": {}}
    process.kill()
    process.join()
    return row | {"seconds": round(time.monotonic() - start, 1)}
