"""`edgeformer bench`: the table of tokens/s."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from edgeformer.cli.console import load_model, stderr
from edgeformer.errors import InputError
from edgeformer.tools.bench import bench
from edgeformer.tools.bench import profile as profile_model


def numbers(text: str | None, flag: str, *, zero: bool = False) -> list[int]:
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


def measure(path: Path, where: Mapping[str, Any], lists: Mapping[str, Any], repetitions: int, *, as_json: bool) -> None:
    """Measure with a bar on stderr, print the table or JSON to stdout."""
    columns = (TextColumn("{task.description:16}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=stderr, transient=True, disable=not stderr.is_terminal) as bar:
        task = bar.add_task("loading", total=None)

        def progress(test: str, done: int, total: int) -> None:
            bar.update(task, description=test, completed=done, total=total)

        result = bench(path, repetitions=repetitions, progress=progress, **lists, **where)
    print(json.dumps(result.as_dict(), indent=2) if as_json else result.markdown())


def profile(path: Path, where: Mapping[str, Any], lists: Mapping[str, Any]) -> None:
    """Print the time by operation for every test, with the first number of threads."""
    tests = dict(lists)
    model = load_model(path, {**where, "threads": tests.pop("threads")[0]})
    print(profile_model(model, **tests))
