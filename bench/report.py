"""Where measured numbers go: one JSON file a study, and a marked block in a Markdown page.

results/STUDY.json is a list with one entry a machine. An entry has the machine, its software, the date, and a summary
of each test: median, min, max and n, the number of rounds. The rounds themselves are not kept.
"""

from __future__ import annotations

import datetime
import json
import platform
import statistics
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"


def machine() -> dict[str, Any]:
    """The machine, the versions and the date, as every table names them."""
    from edgeformer import _native
    from edgeformer.machine import default_threads

    model = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    )
    packages = ("torch", "transformers", "onnx", "onnxruntime", "numpy")
    return {
        "cpu": f"{model}, {default_threads()} cores, {_native.isas()[0]}",
        "system": f"{platform.system()} {platform.release()}, Python {platform.python_version()}",
        "versions": {name: version(name) for name in packages},
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
    }


def summary(numbers: list[float]) -> dict[str, float]:
    """{median, min, max, n}: what is saved of repeated measurements, to seven digits.

    Raises:
        ValueError: there are no numbers.
    """
    if not numbers:
        raise ValueError("a summary of no numbers")
    found = {"median": statistics.median(numbers), "min": min(numbers), "max": max(numbers)}
    return {name: float(f"{value:.7g}") for name, value in found.items()} | {"n": len(numbers)}


def save(study: str, results: dict[str, Any], *, counts: bool = False, plotted: Sequence[str] = ()) -> Path:
    """Writes results/STUDY.json: this machine's results first, then those of other machines, one entry a machine.

    counts: the results are the same on every machine, so those of others are dropped.
    plotted: names of results that are for plots alone; of other machines they are dropped.
    """
    RESULTS.mkdir(exist_ok=True)
    facts = machine()
    others = [run for run in runs(study) if run["machine"]["cpu"] != facts["cpu"] and not counts]
    path = RESULTS / f"{study}.json"
    others = [{name: found for name, found in run.items() if name not in plotted} for run in others]
    path.write_text(compact([{"machine": facts, **results}, *others]) + "\n", encoding="utf-8")
    return path


def runs(study: str) -> list[dict[str, Any]]:
    """results/STUDY.json: one entry a machine, the last measured first; empty if nobody measured it."""
    path = RESULTS / f"{study}.json"
    found: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    return found


def compact(value: Any, indent: int = 0) -> str:
    """JSON in which everything that fits into a line of 200 characters is on one line."""
    line = json.dumps(value, ensure_ascii=False)
    if len(line) + indent <= 195 or not isinstance(value, dict | list) or not value:
        return line
    pad = " " * (indent + 1)
    if isinstance(value, list):
        parts = [pad + compact(item, indent + 1) for item in value]
    else:
        parts = [f"{pad}{json.dumps(str(key))}: {compact(item, indent + 1)}" for key, item in value.items()]
    opening, closing = "[]" if isinstance(value, list) else "{}"
    return opening + "\n" + ",\n".join(parts) + "\n" + " " * indent + closing


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def footnote(facts: dict[str, Any]) -> str:
    """One line under a table: where and when it was measured."""
    versions = ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
    return f"*{facts['cpu']}; {facts['system']}; {versions}; {facts['date']}.*"


def elsewhere(others: Sequence[dict[str, Any]], text: Callable[[dict[str, Any]], str], level: int = 3) -> list[str]:
    """What a page has of a study's other machines: for each a heading of `level`, and `text` of its run."""
    return [f"{'#' * level} On another machine: {run['machine']['cpu']}\n\n{text(run)}" for run in others]


def put(page: Path, block: str, text: str) -> None:
    """Replaces what stands between `<!-- BLOCK:begin -->` and `<!-- BLOCK:end -->` in `page`.

    Raises:
        ValueError: the page has no such block.
    """
    begin, end = f"<!-- {block}:begin -->", f"<!-- {block}:end -->"
    content = page.read_text(encoding="utf-8")
    if begin not in content or end not in content:
        raise ValueError(f"{page} has no block {begin} ... {end}")
    head, rest = content.split(begin, 1)
    page.write_text(f"{head}{begin}\n{text.strip()}\n{end}{rest.split(end, 1)[1]}", encoding="utf-8")
