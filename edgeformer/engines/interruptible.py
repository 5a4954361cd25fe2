"""Long calls into a library that looks for no signals: Ctrl-C comes while they run."""

from __future__ import annotations

import _thread
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

T = TypeVar("T")

# A lock that the main thread waits for can be interrupted, but not on Windows.
_WAIT = 0.1 if os.name == "nt" else -1
_START = 1.0  # seconds in which a thread begins; after that the caller does the work, and the thread does nothing


def interruptible(work: Callable[[], T], stop: Callable[[], object] | None = None) -> T:
    """`work()`, which must release the GIL. In the main thread it runs in a thread of its own meanwhile.

    A signal handler's exception, Ctrl-C's among them, calls `stop`, waits for the end of `work`, and is raised. Without
    `stop` it is raised at once, and `work` ends on its own; its result is dropped.
    """
    if threading.get_ident() != threading.main_thread().ident:
        return work()  # signal handlers run in the main thread alone
    # Not a threading.Thread: its start() never returns where the new thread finds no memory for its first steps.
    # Like a daemon it does not hold the interpreter; `engines.in_flight` waits at its end for calls that run.
    # Locks and a list of known length, because what the thread does around `work` must need no memory.
    claimed, begun, done = threading.Lock(), _taken(), _taken()
    outcome: list[Any] = [None, None]  # result, error

    def run() -> None:
        if not claimed.acquire(blocking=False):
            return
        begun.release()
        try:
            outcome[0] = work()
        except BaseException as error:
            outcome[1] = error
        finally:
            done.release()

    try:
        with suppress(RuntimeError):  # no memory for a thread
            _thread.start_new_thread(run, ())
            begun.acquire(timeout=_START)
        ours = claimed.acquire(blocking=False)
        while not ours and not done.acquire(timeout=_WAIT):
            pass
    except BaseException:
        if not claimed.acquire(blocking=False) and stop is not None:
            stop()
            done.acquire()
        raise
    if ours:
        return work()
    if outcome[1] is not None:
        raise outcome[1]
    result: T = outcome[0]
    return result


def _taken() -> threading.Lock:
    lock = threading.Lock()
    lock.acquire()
    return lock
