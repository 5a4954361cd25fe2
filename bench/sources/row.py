"""One setting of a source, and what the export or the run did with it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

Outcome = Literal["honoured", "refused", "irrelevant", "ignored"]


@dataclass(frozen=True)
class Row:
    """One line of docs/sources.md.

    honoured: the result changes as the reference's does. refused: an error names the setting. irrelevant: the
    reference's result does not change, or `detail` says why no result can depend on it. ignored: the reference's result
    changes and ours does not, or differently, without an error; the sweep then fails.
    """

    setting: str  # as its specification writes it
    outcome: Outcome
    detail: str  # the value tried and the observation: a difference, or the error message (cut)
    reference: str = ""  # the source of the expected result


class Sweep(Protocol):
    """A module of this package: settings of one kind of source, each tried on a tiny model."""

    TITLE: str  # the heading of its table
    ABOUT: str  # one or two sentences: the origin of the list of settings, and the reference
    TESTS: str  # the test files that check the table

    def settings(self) -> list[str]:
        """All settings, from the library or specification itself, so that new ones are included."""

    def rows(self, work: Path) -> Iterator[Row]:
        """One row for each of `settings()`, in that order; `work` is an empty folder to write to."""
