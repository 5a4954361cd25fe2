"""Tries every setting of every kind of source on a tiny model: `python -m bench.sources`.

Writes docs/sources.md. Exit code 1 if a setting is silently ignored or has no row.
"""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import subprocess
import sys
import tempfile
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import bench.sources
from bench.report import ROOT, put, table
from bench.sources.row import Row

PAGE = ROOT / "docs" / "sources.md"
NOT_SWEEPS = ("row", "__main__")
PACKAGES = ("torch", "transformers", "gguf", "peft", "sentence-transformers", "tokenizers", "onnxruntime")


def sweeps() -> dict[str, ModuleType]:
    """{name: sweep} of this package; modules that begin with an underscore are helpers."""
    names = [m.name for m in pkgutil.iter_modules(bench.sources.__path__) if not m.name.startswith("_")]
    return {name: importlib.import_module(f"bench.sources.{name}") for name in names if name not in NOT_SWEEPS}


def section(sweep: ModuleType, rows: list[Row]) -> str:
    """The Markdown of one sweep."""
    counts = Counter(row.outcome for row in rows)
    summary = ", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items()))
    lines = [[f"`{row.setting}`", row.outcome, row.reference, row.detail.replace("|", "/")] for row in rows]
    body = table(["setting", "what happens", "reference", "seen"], lines)
    versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    about = f"{sweep.ABOUT}\n\n{len(rows)} settings: {summary}. Tests: {sweep.TESTS}."
    return f"{about}\n\n{body}\n\n*{_commit()}; {versions}.*"


def _commit() -> str:
    found = subprocess.run(["git", "log", "-1", "--format=commit %h of %cs"], cwd=ROOT, capture_output=True, text=True)
    return found.stdout.strip()


def failures(sweep: ModuleType, rows: list[Row]) -> list[str]:
    """The reasons for exit code 1."""
    ignored = [f"{row.setting} is ignored: {row.detail}" for row in rows if row.outcome == "ignored"]
    untried = sorted(set(sweep.settings()) - {row.setting for row in rows})
    return ignored + [f"{setting} was not tried" for setting in untried]


def main() -> None:
    from tqdm import tqdm

    known = sweeps()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[*known, []], help="sweeps; all by default")
    parser.add_argument("--dry", action="store_true", help="do not write docs/sources.md")
    options = parser.parse_args()
    bad: list[str] = []
    for name in options.names or known:
        sweep = known[name]
        with tempfile.TemporaryDirectory() as work:
            rows = list(tqdm(sweep.rows(Path(work)), total=len(sweep.settings()), desc=name, unit="setting"))
        bad += [f"{name}: {line}" for line in failures(sweep, rows)]
        if not options.dry:
            put(PAGE, name, section(sweep, rows))
    for line in bad:
        print(line, file=sys.stderr)
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
