"""`edgeformer bench`: the table of tokens/s."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from edgeformer.cli.console import load_model, stderr
from edgeformer.cli.options import BenchFlags
from edgeformer.engines.options import EngineOptions
from edgeformer.errors import InputError
from edgeformer.tools.bench import Workload, bench, profile
from edgeformer.tools.energy import open_meter


def _numbers(text: str | None, flag: str, *, zero: bool = False) -> list[int]:
    """The whole numbers in "1,2,3"; zeros are dropped unless `zero`, so that `-p 0` means no prompt test."""
    if text is None:
        return []
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"{flag} is {text!r}, expected whole numbers with commas: 128,512.") from None
    if min(found) < 0:
        raise InputError(f"{flag} is {text!r}, expected numbers of at least 0.")
    return found if zero else [number for number in found if number]


def _workload(flags: BenchFlags) -> Workload:
    return Workload(
        _numbers(flags.prompts, "-p"),
        _numbers(flags.generated, "-n"),
        _numbers(flags.depths, "-d", zero=True),
        flags.repetitions,
    )


def _threads(flags: BenchFlags) -> Sequence[int | None]:
    return _numbers(flags.threads, "-t") or [None]


def print_rates(path: Path, engine: EngineOptions, flags: BenchFlags, *, as_json: bool) -> None:
    """Measure with a progress bar on stderr; print the table or JSON to stdout."""
    workload, threads = _workload(flags), _threads(flags)
    columns = (TextColumn("{task.description:16}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=stderr, transient=True, disable=not stderr.is_terminal) as bar:
        task = bar.add_task("loading", total=None)

        def progress(test: str, done: int, total: int) -> None:
            bar.update(task, description=test, completed=done, total=total)

        meter = open_meter() if flags.energy else None
        try:
            result = bench(path, workload, engine, threads=threads, progress=progress, meter=meter)
        finally:
            if meter is not None:
                meter.close()
    print(json.dumps(result.as_dict(), indent=2) if as_json else result.markdown())


def print_profile(path: Path, engine: EngineOptions, flags: BenchFlags) -> None:
    """Print the time by operation for every test, with the first number of threads."""
    workload, threads = _workload(flags), _threads(flags)
    model = load_model(path, replace(engine, threads=threads[0]).arguments())
    print(profile(model, workload))
