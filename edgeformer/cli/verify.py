"""`edgeformer verify`: the parity check, engine by engine."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import typer
from rich.table import Table

from edgeformer.cli import CHECK_FAILED
from edgeformer.cli.console import stderr, stdout
from edgeformer.tools.verify import Report, verify


def check(path: Path, engines: Sequence[str], where: Mapping[str, Any], *, as_json: bool) -> None:
    """Verify on each engine; exit code 1 if any differs."""
    reports = []
    for engine in engines:
        with stderr.status("verifying") if stderr.is_terminal else _Silent() as status:
            reports.append(verify(path, engine, progress=lambda step, s=status: s.update(f"{step} ..."), **where))  # type: ignore[misc, arg-type]
        if not as_json:
            _show(reports[-1])
    if as_json:
        print(json.dumps([report.as_dict() for report in reports], indent=2))
    if not all(report.passed for report in reports):
        raise typer.Exit(CHECK_FAILED)


class _Silent:
    def __enter__(self) -> _Silent:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def update(self, text: str) -> None:
        pass


def _show(report: Report) -> None:
    verdict = "[green]the numbers are the model's[/green]" if report.passed else "[bold red]FAILED[/bold red]"
    stdout.print(f"[bold]{Path(report.path).name}[/bold] on {report.engine}: {verdict}")
    table = Table(box=None, padding=(0, 2))
    for title in ("output", "run", "reference"):
        table.add_column(title, style="" if title == "output" else "dim")
    table.add_column("worst %", justify="right")
    table.add_column("allowed %", justify="right")
    table.add_column("")
    for one in report.checks:
        allowed = "" if one.tolerance is None else f"{100 * one.tolerance:.3g}"
        mark = (
            "[dim]shown only[/dim]"
            if one.tolerance is None
            else "ok"
            if one.passed
            else f"[red]at {list(one.where)}[/red]"
        )
        reference = "at export" if one.reference == "bundle" else "float model"
        table.add_row(one.output, one.run, reference, f"{100 * one.worst:.3g}", allowed, mark)
    stdout.print(table)
    stdout.print("[dim]% of the range of the reference output[/dim]")
