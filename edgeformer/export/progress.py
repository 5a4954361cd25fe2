"""Where an export says what it does. The command line draws it; a library says nothing."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol, TypeVar

T = TypeVar("T")


class Progress(Protocol):
    """Told of each stage, and of each item of a long one."""

    def stage(self, text: str) -> None: ...

    def track(self, items: Iterable[T], name: str) -> Iterable[T]: ...


class Silent:
    """Says nothing."""

    def stage(self, text: str) -> None:
        pass

    def track(self, items: Iterable[T], name: str) -> Iterable[T]:
        return items
