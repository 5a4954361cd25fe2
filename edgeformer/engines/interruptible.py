"""Long calls into a library that looks for no signals: Ctrl-C comes while they run."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

from edgeformer.threads import Beside

T = TypeVar("T")

_START = 1.0  # seconds in which a thread begins; after that the caller does the work, and the thread does nothing


def interruptible(work: Callable[[], T], stop: Callable[[], object] | None = None) -> T:
    """`work()`, which must release the GIL. In the main thread it runs in a thread of its own meanwhile.

    A signal handler's exception, Ctrl-C's among them, calls `stop`, waits for the end of `work`, and is raised. Without
    `stop` it is raised at once, and `work` ends on its own; its result is dropped.
    """
    if threading.get_ident() != threading.main_thread().ident:
        return work()  # signal handlers run in the main thread alone
    thread = Beside(work)  # at the interpreter's end `engines.in_flight` waits for calls that run
    try:
        thread.start()
        thread.begins(_START)
        thread.settle()
    except BaseException:
        if stop is not None and not thread.claim() and thread.begins(_START):
            stop()
            thread.wait()
        raise
    return thread.result()
