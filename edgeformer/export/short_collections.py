"""Short collections of cycles, so that Ctrl-C does not wait for them."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager

from edgeformer.threads import Beside

_LOOK = 0.02  # seconds between two looks at the number of full collections


@contextmanager
def short_collections() -> Iterator[None]:
    """In the block a full collection looks only at objects that were made since the last one.

    An export has millions of objects, nearly all of which stay. A full collection of all takes 0.2 to 0.7 s, comes
    every few seconds, and no signal is handled in it. What has lived through one is frozen until the end of the block:
    https://docs.python.org/3/library/gc.html#gc.freeze. A program that has frozen objects itself is left as it is.

    A thread does it, because a function in `gc.callbacks` would lose Ctrl-C: one that waits for a collection is raised
    in the first Python code after it, and Python ignores what a callback raises.
    """
    if gc.get_freeze_count():
        yield
        return
    runs = True

    def freeze() -> None:
        try:
            collections = -1
            while runs:
                if collections != (collections := gc.get_stats()[2]["collections"]):
                    gc.freeze()
                time.sleep(_LOOK)
        finally:
            gc.unfreeze()

    freezer = Beside(freeze)
    try:
        freezer.start()
        yield
    finally:
        runs = False
        freezer.settle()
