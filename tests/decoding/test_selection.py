"""The largest of many numbers, compared with a sort."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from edgeformer.decoding.selection import at_least_kth, covering, kth_largest, largest

VALUES = arrays(
    np.float32,
    st.integers(1, 700),
    elements=st.one_of(st.sampled_from([-np.inf, 0.0, 1.0]), st.floats(-9, 9, width=32)),
)


def check(values, count):
    order = sorted(range(len(values)), key=lambda place: (-values[place], place))
    alive = [place for place in order if values[place] > -np.inf]
    kth = values[order[count - 1]]
    assert kth_largest(values, count) == kth
    assert largest(values, count).tolist() == alive[:count]
    assert at_least_kth(values, count).tolist() == sorted(place for place in alive if values[place] >= kth)


@given(VALUES, st.integers(1, 60))
@settings(max_examples=300, deadline=None)
def test_the_largest_are_those_of_a_sort(values, count):
    values[0] = 2.0  # something that is not -inf
    check(values, min(count, len(values)))


@pytest.mark.parametrize("count", [1, 2, 5, 50, 300, 2000])
@pytest.mark.parametrize("size", [2048, 49_152, 50_257])
def test_the_largest_of_a_vocabulary(size, count):
    rng = np.random.default_rng(size + count)
    check(rng.standard_normal(size).astype(np.float32), count)
    check(rng.integers(0, 40, size).astype(np.float32), count)  # many are equal
    rising = np.arange(size, dtype=np.float32)  # all the largest in the last row
    check(rising, count)
    values = np.full(size, -np.inf, np.float32)  # a constraint that leaves few
    values[rng.integers(0, size, 9)] = 1.0
    check(values, count)


def test_the_largest_zero_are_none():
    assert largest(np.ones(3), 0).tolist() == [] and largest(np.ones(3), 9).tolist() == [0, 1, 2]


@given(st.integers(0, 1000), st.floats(0, 1.2), st.sampled_from([1, 2, 300, 5000]))
@settings(max_examples=200, deadline=None)
def test_covering_ends_where_a_sorted_sum_reaches_the_goal(seed, share, size):
    rng = np.random.default_rng(seed)
    keys = rng.integers(-20, 20, size).astype(np.float32) if seed % 2 else rng.standard_normal(size).astype(np.float32)
    weights = rng.integers(1, 9, size).astype(np.float32)  # whole numbers: sums are exact
    goal = share * float(weights.sum())
    found = covering(keys, weights, goal)
    fitting = [key for key in np.unique(keys) if weights[keys <= key].sum() >= goal] if size <= 300 else None
    if fitting is not None:
        assert found == (fitting[0] if fitting else keys.max())
    else:
        assert found == keys.max() or weights[keys <= found].sum() >= goal
        assert weights[keys < found].sum() < goal or found == keys.min()


def test_covering_of_equal_keys_is_the_key():
    for value in (0.0, 0.1, -3e30):
        assert covering(np.full(3000, value, np.float32), np.ones(3000, np.float32), 1500.0) == np.float32(value)
