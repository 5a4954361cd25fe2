"""`edgeformer doctor`: what this machine can run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import typer
from rich.markup import escape

from edgeformer.cli.console import stdout, waiting
from edgeformer.cli.exit_codes import CHECK_FAILED
from edgeformer.tools.doctor import Finding, examine, examine_bundle

MARKS = {"yes": "[green]yes[/green]", "no": "[red]no [/red]", "warning": "[yellow]!  [/yellow]", "fact": "   "}


def report(bundle: Path | None, *, as_json: bool) -> None:
    """Print the findings one by one; exit code 1 if no engine can run."""
    findings = []
    for finding in _findings(bundle):
        findings.append(finding)
        if not as_json:
            line = f"{MARKS[finding.verdict]} [bold]{finding.topic:14}[/bold] {escape(finding.text)}"
            stdout.print(line, soft_wrap=True)
    if as_json:
        print(json.dumps([asdict(finding) for finding in findings], indent=2))
    last = {f.topic: f.verdict for f in findings if f.topic.startswith("engine") and f.verdict != "warning"}
    if "yes" not in last.values():
        raise typer.Exit(CHECK_FAILED)


def _findings(bundle: Path | None) -> Iterator[Finding]:
    yield from examine()
    if bundle is not None:
        with waiting(f"trying {bundle.name} ..."):
            found = list(examine_bundle(bundle))
        yield from found
