"""The comparison of an engine's outputs with a bundle's reference, against numpy on whole arrays."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from edgeformer.engines import reference

ODD = [np.nan, np.inf, -np.inf]
VALUES = st.floats(-100, 100, width=32) | st.sampled_from(ODD)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(reference, "_BLOCK", 7)


@given(st.data())
def test_the_largest_difference_is_found_wherever_it_is(data):
    shape = data.draw(hnp.array_shapes(min_dims=2, max_dims=4, max_side=5))
    got = data.draw(hnp.arrays(np.float32, shape, elements=VALUES))
    expected = data.draw(hnp.arrays(np.float32, shape, elements=st.floats(-100, 100, width=32)))
    difference = np.abs(got.astype(np.float64) - expected)
    difference[~np.isfinite(difference)] = np.inf
    span = float(expected.max()) - float(expected.min()) or 1.0
    found = reference.compare("logits", "bundle", "in one run", got, expected, 0.1)
    assert found.worst == difference.max() / span
    assert difference[found.where] == difference.max()


def test_the_last_positions_are_compared_where_the_reference_holds_fewer():
    got = np.arange(24, dtype=np.float32).reshape(1, 6, 4)
    expected = got[:, 4:].copy()
    expected[0, 1, 2] += 7
    found = reference.compare("logits", "bundle", "in one run", got, expected, 0.1, last=True)
    assert found.where == (0, 5, 2) and found.worst == 7 / (expected.max() - expected.min())


def test_another_shape_is_infinitely_far():
    found = reference.compare("x", "bundle", "in one run", np.zeros((2, 3)), np.zeros((2, 4)), 0.1)
    assert found.worst == np.inf and "shape [2, 3], not [2, 4]" in found.run
