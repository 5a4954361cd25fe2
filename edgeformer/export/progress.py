"""Progress reports of an export. The command line draws them; a library call is silent by default."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol, TypeVar

T = TypeVar("T")


class Progress(Protocol):
    """Receives the name of each stage, and the items of long ones."""

    def stage(self, text: str) -> None:
        """Called when a stage begins."""

    def track(self, items: Iterable[T], name: str) -> Iterable[T]:
        """Returns `items`, and may show how many of them have been consumed."""


class Silent:
    """Shows nothing."""

    def stage(self, text: str) -> None:
        """Nothing."""

    def track(self, items: Iterable[T], name: str) -> Iterable[T]:  # noqa: ARG002  the protocol's
        """The items."""
        return items
