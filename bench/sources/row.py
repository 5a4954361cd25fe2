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

    honoured: the result changed as the reference's does. refused: a typed error names the setting. irrelevant: the
    reference's result does not change either, or `detail` says why no result can depend on it. ignored: the
    reference's result changes and ours does not, or to something else, and nobody said so. That one is a failure.
    """

    setting: str  # as its own specification spells it
    outcome: Outcome
    detail: str  # the value tried and what was seen: a difference, or the message of the refusal (cut short)
    reference: str = ""  # what computed the expected result


class Sweep(Protocol):
    """A module of this package: settings of one kind of source, each tried on a tiny model."""

    TITLE: str  # the heading of its table
    ABOUT: str  # one or two sentences: where the list of settings comes from, and what the reference is
    TESTS: str  # the test files that hold what the table says

    def settings(self) -> list[str]:
        """All settings, from the library or specification itself, so that a new one appears by itself."""

    def rows(self, work: Path) -> Iterator[Row]:
        """One row for each of `settings()`, in that order; `work` is an empty folder to write to."""
