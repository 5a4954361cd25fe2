"""`edgeformer verify`: the parity check, engine by engine."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import typer
from rich.status import Status
from rich.table import Table

from edgeformer.cli.console import stderr, stdout
from edgeformer.cli.exit_codes import CHECK_FAILED
from edgeformer.engines.options import EngineOptions
from edgeformer.tools.verify import Report, verify


def check(path: Path, engines: Sequence[str], options: EngineOptions, *, as_json: bool) -> None:
    """Verify on each engine and print the reports; exit code 1 if an output of one differs."""
    reports: list[Report] = []
    for engine in engines:
        with stderr.status("verifying") if stderr.is_terminal else contextlib.nullcontext() as status:
            show = _shown_in(status)
            threads, isa, kv = options.threads, options.isa, options.kv
            reports.append(verify(path, engine, threads, isa=isa, kv=kv, progress=show))  # type: ignore[arg-type]
        if not as_json:
            _show(reports[-1])
    if as_json:
        print(json.dumps([report.as_dict() for report in reports], indent=2))
    if not all(report.passed for report in reports):
        raise typer.Exit(CHECK_FAILED)


def _shown_in(status: Status | None) -> Callable[[str], None]:
    return lambda step: None if status is None else status.update(f"{step} ...")


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
        reference = {"bundle": "at export", "float": "float model"}.get(one.reference, one.reference)
        table.add_row(one.output, one.run, reference, f"{100 * one.worst:.3g}", allowed, mark)
    stdout.print(table)
    stdout.print("[dim]% of the range of the reference output[/dim]")
    if report.cache:
        stdout.print(f"loaded without --kv: {report.cache}", markup=False, highlight=False)
