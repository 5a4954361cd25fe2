"""Long calls into a library that looks for no signals: Ctrl-C comes while they run."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

T = TypeVar("T")

# A lock that the main thread waits for can be interrupted, but not on Windows.
_WAIT = 0.1 if os.name == "nt" else None
_START = 1.0  # seconds in which a thread begins, where Ctrl-C came inside its start()


def interruptible(work: Callable[[], T], stop: Callable[[], object] | None = None) -> T:
    """`work()`, which must release the GIL. In the main thread it runs in a thread of its own meanwhile.

    A signal handler's exception, Ctrl-C's among them, calls `stop`, waits for the end of `work`, and is raised. Without
    `stop` it is raised at once, and `work` ends on its own; its result is dropped.
    """
    if threading.current_thread() is not threading.main_thread():
        return work()  # signal handlers run in the main thread alone
    done = threading.Event()
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:
            errors.append(error)
        finally:
            done.set()

    # A daemon: `edgeformer.engines.in_flight` waits for calls that run when the interpreter ends.
    thread, started = threading.Thread(target=run, name="edgeformer call", daemon=True), False
    try:
        with suppress(RuntimeError):  # no memory for a thread
            thread.start()
            started = True
        while started and not done.wait(_WAIT):
            pass
    except BaseException:
        if stop is not None:
            stop()
            done.wait(None if started else _START)
        raise
    if not started:
        return work()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]
