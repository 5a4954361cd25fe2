"""Full collections while an export runs look at new objects alone, and all is as before afterwards."""

from __future__ import annotations

import gc
import json
import os
import time
import weakref

import pytest
from support.own_process import run

from edgeformer.export.short_collections import short_collections


class Node:
    """One of two that hold each other: only a collection frees them."""

    def __init__(self) -> None:
        self.other: Node | None = None


def pair() -> tuple[Node, weakref.ref[Node]]:
    first, second = Node(), Node()
    first.other, second.other = second, first
    return first, weakref.ref(first)


def until_frozen(more_than: int = 0) -> int:
    """Waits until the thread has frozen more objects than these; how many."""
    end = time.monotonic() + 10
    while gc.get_freeze_count() <= more_than:
        assert time.monotonic() < end
        time.sleep(0.01)
    return gc.get_freeze_count()


def test_what_lived_through_a_collection_is_not_looked_at_again_before_the_end():
    old, seen = pair()
    with short_collections():
        first = until_frozen()
        young, gone = pair()
        del young
        gc.collect()
        assert gone() is None  # new ones are collected
        del old
        gc.collect()
        assert seen() is not None  # it was there at the beginning
        more = [[] for _ in range(1000)]
        gc.collect()
        assert until_frozen(first + len(more) // 2) > first
    assert gc.get_freeze_count() == 0
    gc.collect()
    assert seen() is None


def test_after_an_error_all_is_as_before():
    with pytest.raises(KeyError), short_collections():
        raise KeyError
    assert gc.get_freeze_count() == 0


def test_what_a_program_has_frozen_stays_frozen():
    gc.freeze()
    try:
        count = gc.get_freeze_count()
        with short_collections():
            more = [[] for _ in range(1000)]
            gc.collect()
            time.sleep(0.1)
            assert more and count / 2 < gc.get_freeze_count() <= count  # some may be freed, none is added
        assert count / 2 < gc.get_freeze_count() <= count
    finally:
        gc.unfreeze()


# A signal of the system's timer comes while a full collection runs, in which none is handled: a thread of Python could
# not send it then. `callback`: the planted defect.
COLLECTIONS = """
import contextlib
from edgeformer.export.short_collections import short_collections
sys.unraisablehook = lambda _: None
keep = [[] for _ in range(1 << 20)]

@contextlib.contextmanager
def callback():
    def freeze(phase, info):
        pass
    gc.callbacks.append(freeze)
    yield
    gc.callbacks.remove(freeze)

signal.signal(signal.SIGALRM, signal.default_int_handler)
lost = {}
for kind in (short_collections, callback):
    lost[kind.__name__] = 0
    for number in range(20):
        try:
            with kind():
                signal.setitimer(signal.ITIMER_REAL, 0.01)
                for _ in range(5):
                    gc.unfreeze()
                    gc.collect()
                time.sleep(0.1)
            lost[kind.__name__] += 1
        except KeyboardInterrupt:
            gc.callbacks.clear()
print(json.dumps(lost))
"""


@pytest.mark.skipif(os.name == "nt", reason="signal.setitimer is not on Windows")
def test_ctrl_c_during_a_collection_is_not_lost(tmp_path):
    lost = json.loads(run("import json\n" + COLLECTIONS, tmp_path, "cpu"))
    assert lost.pop("callback") > 0
    assert lost == {"short_collections": 0}
