"""What the commands share: consoles for stdout and stderr, loading a model with a spinner, reading items."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from edgeformer.bundle.bundle import Bundle
from edgeformer.errors import EdgeformerWarning, InputError
from edgeformer.model import Model, load

stderr = Console(stderr=True, highlight=False, soft_wrap=True)
stdout = Console(highlight=False, width=None if sys.stdout.isatty() else 140)  # a pipe has no width: do not fold tables


@contextmanager
def waiting(text: str) -> Iterator[None]:
    """A spinner on stderr while the block runs, if stderr is a terminal."""
    if stderr.is_terminal:
        with stderr.status(text):
            yield
    else:
        yield


def load_model(bundle: Path | Bundle, where: Mapping[str, Any]) -> Model:
    """The model, with a spinner while it loads; warnings are printed afterwards, a line each."""
    name = bundle.path.name if isinstance(bundle, Bundle) else bundle.name
    with waiting(f"loading {name} ..."), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", EdgeformerWarning)
        model = load(bundle, **where)
    for warning in caught:
        stderr.print(f"[yellow]{escape(str(warning.message))}[/yellow]", soft_wrap=True)
    return model


def size(count: int) -> str:
    """A number of bytes for people: `12.3 MiB`."""
    value = float(count)
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.2f} GiB"


def read_items(arguments: Sequence[str]) -> list[str]:
    """The arguments; if they are `-`, or none and stdin is a pipe, the lines of stdin that are not blank.

    Raises:
        InputError: there are none.
    """
    if list(arguments) == ["-"] or (not arguments and not sys.stdin.isatty()):
        items = [line for line in sys.stdin.read().splitlines() if line.strip()]
    else:
        items = list(arguments)
    if not items:
        raise InputError(
            "There is nothing to read; give texts or pictures as arguments, or - and one per line on stdin."
        )
    return items
