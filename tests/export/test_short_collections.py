"""Full collections while an export runs look at new objects alone, and all is as before afterwards."""

from __future__ import annotations

import gc
import weakref

import pytest

from edgeformer.export.short_collections import short_collections


class Node:
    """One of two that hold each other: only a collection frees them."""

    def __init__(self) -> None:
        self.other: Node | None = None


def pair() -> tuple[Node, weakref.ref[Node]]:
    first, second = Node(), Node()
    first.other, second.other = second, first
    return first, weakref.ref(first)


def test_what_lived_through_a_collection_is_not_looked_at_again_before_the_end():
    before = list(gc.callbacks)
    old, seen = pair()
    with short_collections():
        assert gc.get_freeze_count() > 0
        young, gone = pair()
        del young
        gc.collect()
        assert gone() is None  # new ones are collected
        del old
        gc.collect()
        assert seen() is not None  # it was there at the beginning
    assert gc.get_freeze_count() == 0 and gc.callbacks == before
    gc.collect()
    assert seen() is None


def test_after_an_error_all_is_as_before():
    before = list(gc.callbacks)
    with pytest.raises(KeyboardInterrupt), short_collections():
        raise KeyboardInterrupt
    assert gc.get_freeze_count() == 0 and gc.callbacks == before


def test_what_a_program_has_frozen_stays_frozen():
    gc.freeze()
    try:
        count = gc.get_freeze_count()
        with short_collections():
            more = [[] for _ in range(1000)]
            gc.collect()
            assert count / 2 < gc.get_freeze_count() < count + len(more)  # some may be freed, these are not frozen
        assert count / 2 < gc.get_freeze_count()
    finally:
        gc.unfreeze()
