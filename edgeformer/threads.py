"""Threads that a process can do without: where none can be started, or none begins, the caller does their work.

`threading.Thread.start` raises a bare RuntimeError where the system refuses a thread (RLIMIT_NPROC, the limit of a
container), and never returns where the new thread finds no memory for its first steps in Python (RLIMIT_AS), because it
waits for the thread to say that it began.
"""

from __future__ import annotations

import _thread
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Generic, TypeVar

from edgeformer.errors import OutOfMemory

T = TypeVar("T")

# A lock that the main thread waits for can be interrupted by Ctrl-C, but not on Windows.
_WAIT = 0.1 if os.name == "nt" else -1
BEGIN = 10.0  # seconds in which a thread must begin whose work the caller cannot do


class Beside(Generic[T]):
    """`work()` in a thread of its own, which never holds the interpreter's end, as a daemon does not.

    Whoever wants the result and finds that the thread has not begun does the work, and the thread then does nothing.
    """

    def __init__(self, work: Callable[[], T]) -> None:
        # Locks and a list of known length, because what the thread does around `work` must need no memory.
        self._work = work
        self._claimed, self._begun, self._done = threading.Lock(), _Mark(), _Mark()
        self._outcome: list[Any] = [None, None]  # result, error
        self._is_ours = False  # the callers'

    def start(self) -> None:
        """Starts the thread, if the system gives one. It does not wait."""
        try:
            _thread.start_new_thread(self._run, ())
        except (RuntimeError, MemoryError):
            self.claim()

    def claim(self) -> bool:
        """Whether no thread has begun the work; then none will."""
        self._is_ours = self._is_ours or self._claimed.acquire(blocking=False)
        return self._is_ours

    def begins(self, seconds: float) -> bool:
        """Whether the thread has begun; waits so long for it."""
        return not self._is_ours and self._begun.wait(seconds)

    def wait(self, seconds: float = -1) -> bool:
        """Whether the thread has ended the work; waits so long for it, and for ever by default."""
        return not self._is_ours and self._done.wait(seconds)

    def settle(self) -> None:
        """Waits until the thread has ended the work, if it has begun."""
        while not self.claim() and not self.wait(_WAIT):
            pass

    def result(self) -> T:
        """The result of the work, or its error. Waits for it, or does it here: called once."""
        self.settle()
        if self._is_ours:
            return self._work()
        if self._outcome[1] is not None:
            raise self._outcome[1]
        found: T = self._outcome[0]
        return found

    def _run(self) -> None:
        if not self._claimed.acquire(blocking=False):
            return
        self._begun.set()
        try:
            self._outcome[0] = self._work()
        except BaseException as error:
            self._outcome[1] = error
        finally:
            del self._work  # what it holds (a mapped file) is free when the caller goes on, not when this thread ends
            self._done.set()


def start(thread: threading.Thread, purpose: str) -> None:
    """`thread.start()`, for a thread that nobody can replace.

    Raises:
        OutOfMemory: the system refuses a thread, or it does not begin.
    """
    starter = Beside(thread.start)  # if that never returns, a thread is lost, not the caller
    starter.start()
    if starter.wait(BEGIN):
        with suppress(RuntimeError, MemoryError):
            return starter.result()
    starter.claim()
    raise OutOfMemory(
        f"No thread could be started for {purpose}: the system refused one, or there was no memory for its first "
        "steps. Free memory, end other threads, or raise the limits of the process (ulimit -u, ulimit -v)."
    )


class _Mark:
    """A flag that one thread sets once and others wait for. Setting it needs no memory, unlike `threading.Event`."""

    def __init__(self) -> None:
        self._lock, self._is_set = threading.Lock(), False
        self._lock.acquire()

    def set(self) -> None:
        self._is_set = True
        self._lock.release()

    def wait(self, seconds: float) -> bool:
        """Whether it is set; waits so long for it, and for ever if that is negative."""
        # The flag first: Ctrl-C may come when the lock was taken and not yet given back, which then never happens.
        if not self._is_set:
            if not self._lock.acquire(timeout=seconds):
                return False
            self._lock.release()
        return True
