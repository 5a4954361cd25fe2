"""Encoders: one request at a time has the model, since a batch runs on all its threads."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TypeVar

from edgeformer.model import Model
from edgeformer.server.endpoint import Call
from edgeformer.server.errors import too_busy
from edgeformer.server.registry import Loaded

Found = TypeVar("Found")


async def in_turn(
    call: Call, name: str | None, work: Callable[[Model], Found], stop: threading.Event | None = None
) -> tuple[str, Found]:
    """(the name of the model, what `work` gives for it), run in a thread when the model is free.

    `stop` is set when the client leaves: work that looks at it ends early.

    Raises:
        ApiError: there is no such model, or too many wait for it.
    """
    lease = await call.server.registry.lease(name)
    try:
        call.log["model"] = lease.entry.name
        came = time.perf_counter()
        async with turn(lease.loaded, call.server.options.queue_timeout):
            began = time.perf_counter()
            task = asyncio.get_running_loop().run_in_executor(None, work, lease.loaded.model)
            try:
                found = await asyncio.shield(task)
            except asyncio.CancelledError:
                if stop is not None:
                    stop.set()
                await asyncio.wait([task])  # the engine is busy until then
                task.exception()  # nobody else looks at it
                raise
        call.server.metrics.encoded(lease.entry.name, began - came, time.perf_counter() - began)
        return lease.entry.name, found
    finally:
        lease.release()


@asynccontextmanager
async def turn(loaded: Loaded, timeout: float) -> AsyncIterator[None]:
    """The model for one request alone: an encoder runs a batch with all its threads.

    Raises:
        ApiError: too many wait, or this one waited `timeout` seconds.
    """
    if loaded.turn.locked() and loaded.waiting >= loaded.queue:
        raise too_busy(f"{loaded.waiting} requests wait already. Try again later.", loaded.retry_after())
    loaded.waiting += 1
    try:
        await asyncio.wait_for(loaded.turn.acquire(), timeout or None)
    except TimeoutError:
        raise too_busy(f"The request waited {timeout:g} s for its turn.", loaded.retry_after()) from None
    finally:
        loaded.waiting -= 1
    try:
        yield
    finally:
        loaded.turn.release()
