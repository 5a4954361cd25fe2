"""Ctrl-C that a library loses: it ends the export all the same."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType

from edgeformer.export.progress import Progress, T


@contextmanager
def no_interrupt_lost(progress: Progress) -> Iterator[Progress]:
    """Yields `progress` for the block; if Ctrl-C came in the block, it ends with KeyboardInterrupt.

    KeyboardInterrupt is raised in whatever code of Python runs. C++ that has called this code may make another error of
    it (PyTorch looks for the overload of an operator: "Expected a value of type 'List[int]', but instead found type
    'list'"), and what a callback or `__del__` raises is ignored by Python. So the signal's handler remembers that one
    came, and the block raises it where the next stage or item begins, or at its end, in place of another error.

    Raises:
        KeyboardInterrupt: the handler that the program had set has raised it, and nothing in the block let it through.
    """
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield progress  # no signal is handled here, or none becomes an exception
        return
    came: list[int] = []  # of signals: the exceptions would keep all of their frames
    signal.signal(signal.SIGINT, _remembered(before, came))
    try:
        yield _Watched(progress, came)
    except Exception as error:
        if came:
            raise KeyboardInterrupt from error
        raise
    finally:
        signal.signal(signal.SIGINT, before)
    _raise_lost(came)


def _remembered(
    handler: Callable[[int, FrameType | None], object], came: list[int]
) -> Callable[[int, FrameType | None], object]:
    def remember(number: int, frame: FrameType | None) -> object:
        try:
            return handler(number, frame)
        except KeyboardInterrupt:
            came.append(number)
            raise

    return remember


def _raise_lost(came: list[int]) -> None:
    if came:
        raise KeyboardInterrupt


class _Watched:
    """A `Progress` that raises what a library has lost."""

    def __init__(self, progress: Progress, came: list[int]) -> None:
        self._progress, self._came = progress, came

    def stage(self, text: str) -> None:
        _raise_lost(self._came)
        self._progress.stage(text)

    def track(self, items: Iterable[T], name: str) -> Iterator[T]:
        for item in self._progress.track(items, name):
            _raise_lost(self._came)
            yield item
