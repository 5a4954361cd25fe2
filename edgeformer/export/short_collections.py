"""Short collections of cycles, so that Ctrl-C does not wait for them."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def short_collections() -> Iterator[None]:
    """In the block a full collection looks only at objects that were made since the last one.

    An export has millions of objects, nearly all of which stay. A full collection of all takes 0.2 to 0.7 s, comes
    every few seconds, and no signal is handled in it. What has lived through one is frozen until the end of the block:
    https://docs.python.org/3/library/gc.html#gc.freeze. A program that has frozen objects itself is left as it is.
    """
    if gc.get_freeze_count():
        yield
        return

    def freeze(phase: str, info: dict[str, int]) -> None:
        if phase == "stop" and info["generation"] == 2:
            gc.freeze()

    try:
        gc.freeze()
        gc.callbacks.append(freeze)
        yield
    finally:
        if freeze in gc.callbacks:
            gc.callbacks.remove(freeze)
        gc.unfreeze()
