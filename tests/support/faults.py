"""Faults of a disk at each step of a writer: kills, full disks, disks that became read-only.

A step is an opening for writing, a first half of what is written, the rest of it, an fsync, a rename, a deletion.
"""

from __future__ import annotations

import builtins
import io
import os
from collections.abc import Callable
from typing import Any

CALLS = ("fsync", "rename", "replace", "unlink", "mkdir")


class Half:
    """A file of which half of what is written arrives before the fault."""

    def __init__(self, file: Any, step: Callable[[], None]) -> None:
        self._file, self._step = file, step

    def write(self, content: Any) -> int:
        content = memoryview(content)
        half = self._file.write(content[: len(content) // 2])
        self._file.flush()
        self._step()
        return half + self._file.write(content[len(content) // 2 :])

    def __enter__(self) -> Half:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


class Steps:
    """While it is entered, the `at`-th step calls `fault`; `count` is the number of steps so far."""

    def __init__(self, at: int, fault: Callable[[], None], calls: tuple[str, ...] = CALLS) -> None:
        self.at, self.fault, self.count = at, fault, 0
        self._kept = [(os, name, getattr(os, name)) for name in calls]
        self._kept += [(module, "open", module.open) for module in (builtins, io)]

    def _step(self) -> None:
        self.count += 1
        if self.count == self.at:
            self.fault()

    def _call(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self._step()
            return function(*args, **kwargs)

        return call

    def _open(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            if mode != "wb":
                return function(file, mode, *args, **kwargs)
            self._step()
            return Half(function(file, mode, *args, **kwargs), self._step)

        return call

    def __enter__(self) -> Steps:
        for module, name, function in self._kept:
            setattr(module, name, (self._open if name == "open" else self._call)(function))
        return self

    def __exit__(self, *error: object) -> None:
        for module, name, function in self._kept:
            setattr(module, name, function)


def killed_at(step: int, work: Callable[[], None]) -> int:
    """The exit code of a child that does `work`: 9 where it was killed before its `step`-th step, 0 at its end."""
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    code = 1
    try:
        with Steps(step, lambda: os._exit(9)):
            work()
        code = 0
    finally:
        os._exit(code)


def refusing(number: int) -> Callable[[], None]:
    """A fault: the call fails with that error number."""

    def fault() -> None:
        raise OSError(number, os.strerror(number))

    return fault
