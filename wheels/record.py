"""What `make wheels` built: bench/results/wheels.json, and the table of docs/platforms.md that is made from it."""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bench.report import RESULTS, ROOT, compact, put, table
from wheels.targets import PYTHONS, TARGETS, Target

RECORD = RESULTS / "wheels.json"
PAGE = ROOT / "docs" / "platforms.md"
MARKS = ROOT / "build" / "zig"  # beside zig's cache: what deletes it deletes them
NOTHING, CACHE = "from nothing", "from the cache"


@contextmanager
def timed(target: Target, pythons: Iterable[str]) -> Iterator[dict[str, Any]]:
    """Fills in the seconds of CPU time that the child processes of the body take, and from what they started.

    Nothing is filled in unless it is a build for all Pythons, and the cache has nothing for this target or has what the
    last build for all of them left.
    """
    mark = MARKS / f"built-{target.name}"
    known = set(mark.read_text().split()) if mark.exists() else None
    found: dict[str, Any] = {}
    before = os.times()
    yield found
    after = os.times()
    if set(pythons) == set(PYTHONS) and (known is None or known == set(PYTHONS)):
        seconds = sum(getattr(after, name) - getattr(before, name) for name in ("children_user", "children_system"))
        found[NOTHING if known is None else CACHE] = round(seconds)
    mark.parent.mkdir(parents=True, exist_ok=True)
    mark.write_text(" ".join(sorted((known or set()) | set(pythons))))


def facts(wheel: Path, extension: Path, problems: list[str]) -> dict[str, Any]:
    """One wheel: its size and its extension's in bytes, what the check found, the compiler, the date."""
    return {
        "bytes": wheel.stat().st_size,
        "extension": extension.stat().st_size,
        "problems": problems,
        "zig": version("ziglang"),
        "date": today(),
    }


def today() -> str:
    """The date in UTC: 2026-11-30."""
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")


def read() -> dict[str, Any]:
    """{"wheels": {tag: facts}, "cpu_seconds": {target: {from what: seconds}}, "whole": ...} of what was recorded."""
    saved: dict[str, Any] = {"wheels": {}, "cpu_seconds": {}, "whole": None}
    if RECORD.exists():
        saved |= json.loads(RECORD.read_text(encoding="utf-8"))
    return saved


def write(
    wheels: dict[str, dict[str, Any]], seconds: dict[str, dict[str, int]], whole: dict[str, Any] | None = None
) -> None:
    """Adds wheels and times to the record, and writes the table of the page anew.

    whole: {"seconds", "jobs", "date"} of a command that built all of them from nothing.
    """
    saved = read()
    tags = [target.tag(python) for target in TARGETS.values() for python in PYTHONS]
    both = saved["wheels"] | wheels
    spent = {name: saved["cpu_seconds"].get(name, {}) | seconds.get(name, {}) for name in TARGETS}
    kept = {"wheels": {tag: both[tag] for tag in tags if tag in both}, "cpu_seconds": spent}
    kept["whole"] = whole or saved["whole"]
    RECORD.write_text(compact(kept) + "\n", encoding="utf-8")
    put(PAGE, "wheels", page(kept))


def page(saved: dict[str, Any]) -> str:
    """The table: a line a target."""
    rows = []
    for target in TARGETS.values():
        built = {python: saved["wheels"].get(target.tag(python)) for python in PYTHONS}
        made = {python: found for python, found in built.items() if found}
        wrong = [f"{python}: {'; '.join(found['problems'])}" for python, found in made.items() if found["problems"]]
        spent = saved["cpu_seconds"].get(target.name, {})
        rows.append(
            [
                f"`{target.platform}`",
                ", ".join(made) or "not recorded",
                megabytes(found["bytes"] for found in made.values()),
                megabytes(found["extension"] for found in made.values()),
                "; ".join(wrong) or ("passed" if made else ""),
                *(f"{spent[kind]} s" if kind in spent else "not measured" for kind in (NOTHING, CACHE)),
            ]
        )
    header = ["wheel", "built for CPython", "wheel, MB", "extension, MB", "check", NOTHING, CACHE]
    dates = sorted({found["date"] for found in saved["wheels"].values()})
    compilers = sorted({found["zig"] for found in saved["wheels"].values()})
    when = " to ".join(dates[:1] + dates[1:][-1:])
    note = f"*Times: CPU time, for the wheels of all Pythons; zig {', '.join(compilers)}; {when}.*"
    if whole := saved["whole"]:
        total = sum(spent.get(NOTHING, 0) for spent in saved["cpu_seconds"].values()) / 60
        lasted = f"{whole['seconds'] / 60:.0f} minutes with --jobs {whole['jobs']}, beside whatever else ran"
        note += f"\n\nThe whole command, from nothing: {lasted} ({whole['date']}), {total:.0f} minutes of CPU time. "
        note += "The target is 20 minutes."
    return f"{table(header, rows)}\n\n{note}"


def megabytes(sizes: Iterable[int]) -> str:
    """The largest of some sizes in bytes: "1.5"."""
    found = list(sizes)
    return f"{max(found) / 1e6:.1f}" if found else ""
