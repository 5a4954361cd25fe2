"""Calls into C++ that still run in daemon threads when the interpreter ends.

Python ends such a thread where it next asks for the GIL, by unwinding its stack; in a destructor of C++ that is
`terminate called without an active exception` and an abort. So the end of the interpreter waits for the calls that run,
and a daemon thread that begins another one sleeps until the process is gone.
"""

from __future__ import annotations

import atexit
import os
import threading
import time

EXIT_TIMEOUT = 5.0  # seconds; one step of a large model may take longer, and then the end is as it was without this


class _InFlight:
    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._count = 0
        self._ending = False

    def __enter__(self) -> None:
        with self._changed:
            while self._ending and threading.get_ident() != threading.main_thread().ident:
                self._changed.wait()
            self._count += 1

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._count -= 1
            if self._ending:
                self._changed.notify_all()

    def end(self) -> None:
        """Waits until no call runs."""
        until = time.monotonic() + EXIT_TIMEOUT
        with self._changed:
            self._ending = True
            while self._count > 0 and (left := until - time.monotonic()) > 0:
                self._changed.wait(left)


in_flight = _InFlight()
atexit.register(in_flight.end)


def _forget() -> None:
    """The threads of the parent are not in a forked child."""
    in_flight.__init__()  # type: ignore[misc]


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_forget)
