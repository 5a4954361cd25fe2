"""Runs the cases of `damage_worker` in processes that may die or hang, and collects what came of each.

    python -m support.damage_study SOURCE FIRST COUNT [ENGINES [unchecked]]     prints a summary; 1 if a case failed

SOURCE is a bundle, or `tiny:SCHEME` for a tiny one that is made here.

A failure is an exception that is not edgeformer's own, a process that died, or a case that ran for more than `SECONDS`.
"""

from __future__ import annotations

import collections
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SECONDS = 60.0
ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Study:
    """`kinds` counts the outcomes; `failures` has (seed, engine, damage, what happened)."""

    kinds: dict[str, int]
    failures: list[tuple[int, str, str, str]]


def study(source: Path, first: int, count: int, engines: str = "cpu,native,auto", *, unchecked: bool = False) -> Study:
    """Runs the cases `first` to `first + count`. A case that kills its process is a failure; the rest goes on."""
    kinds: collections.Counter[str] = collections.Counter()
    failures: list[tuple[int, str, str, str]] = []
    at, end = first, first + count
    with tempfile.TemporaryDirectory() as folder:
        while at < end:
            seed, engine, how = at, "?", ""
            command = [sys.executable, "-m", "support.damage_worker", str(source), folder, str(at), str(end - at)]
            command += [engines, *(["unchecked"] if unchecked else [])]
            paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
            errors = Path(folder) / "stderr"
            with errors.open("wb") as stderr:
                process = subprocess.Popen(
                    command,
                    stdout=subprocess.PIPE,
                    stderr=stderr,
                    env={**os.environ, "PYTHONPATH": paths, "EDGEFORMER_CACHE": "", "OMP_NUM_THREADS": "1"},
                )
            lines: queue.Queue[bytes | None] = queue.Queue()
            reader = threading.Thread(target=_read, args=(process.stdout, lines))
            reader.start()
            try:
                limit = 4 * SECONDS  # until the imports are done
                while (line := lines.get(timeout=limit)) is not None:
                    limit = SECONDS
                    record: dict[str, Any] = json.loads(line)
                    if "start" in record:
                        seed, engine = record["start"], engines.partition(",")[0]
                        continue
                    kind = record["kind"]
                    kinds[kind] += 1
                    if kind.startswith("UNTYPED"):
                        failures.append((seed, record["engine"], record["damage"], record["text"]))
            except queue.Empty:
                how = f"no answer after {SECONDS:g} s"
                process.kill()
            reader.join()
            code = process.wait()
            if code == 0 and not how:
                break
            text = errors.read_text(errors="replace")[-3000:]
            failures.append((seed, engine, "see the seed", how or f"the process ended with {code}: {text}"))
            at = seed + 1
    return Study(dict(kinds), failures)


def _read(stream: Any, lines: queue.Queue[bytes | None]) -> None:
    with stream:
        for line in stream:
            lines.put(line)
    lines.put(None)


def main(arguments: list[str]) -> int:
    """The command; see the module."""
    source, first, count, *more = arguments
    engines = more[0] if more else "cpu,native,auto"
    with tempfile.TemporaryDirectory() as folder:
        path, scheme = Path(source), source.partition("tiny:")[2]
        if scheme:
            from support import tiny

            path = tiny.write_lm(Path(folder) / "b", scheme="none" if scheme == "float" else scheme)
        found = study(path, int(first), int(count), engines, unchecked="unchecked" in more)
    for failure in found.failures:
        print(*failure, sep="\n  ", flush=True)
    print(f"{sum(found.kinds.values())} loads: {found.kinds}, {len(found.failures)} failures")
    return 1 if found.failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
