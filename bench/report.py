"""Where measured numbers go: a JSON file beside this one, and a marked block in a Markdown page."""

from __future__ import annotations

import datetime
import json
import platform
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"


def machine() -> dict[str, Any]:
    """The machine, the versions and the date, as every table names them."""
    from edgeformer import _native  # type: ignore[attr-defined]
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


def save(name: str, results: dict[str, Any]) -> Path:
    """Writes results/NAME.json. What another machine measured there before moves to results/ITS-NAME/."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    if path.exists():
        cpu = json.loads(path.read_text(encoding="utf-8"))["machine"]["cpu"]
        if cpu != machine()["cpu"]:
            other = RESULTS / re.sub(r"[^a-z0-9]+", "-", cpu.lower()).strip("-")
            other.mkdir(exist_ok=True)
            path.replace(other / path.name)
    path.write_text(
        json.dumps({"machine": machine(), **results}, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    return path


def elsewhere(name: str) -> list[dict[str, Any]]:
    """results/*/NAME.json: what other machines measured."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob(f"*/{name}.json"))]


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def footnote(facts: dict[str, Any]) -> str:
    """One line under a table: where and when it was measured."""
    versions = ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
    return f"*{facts['cpu']}; {facts['system']}; {versions}; {facts['date']}.*"


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
