"""Passes over the scores of a whole vocabulary: by the C++ extension, or by numpy where it is not built.

numpy takes about twice the time, and gives the same up to rounding. With the extension a sum has the same bits on
every CPU.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from types import ModuleType

Array = np.ndarray[Any, Any]
BLOCK = 256  # scores of one sum
LONG = 2048  # numbers for which sums by blocks, and the extension, are faster


def exponential_sums(scores: Array, largest: float) -> tuple[Array, float]:
    """(float64 [ceil(n / BLOCK)]: the sums of exp(scores - largest) by blocks, the sum of exp(scores - largest) *
    (scores - largest)) for `scores` [n]; one of -inf adds 0 to both. Exponentials and sums in a block are float32.
    """
    extension = _extension(scores)
    if extension is not None:
        sums, slope = extension.exponential_sums(scores, largest)
        return sums, slope
    shifted = np.maximum(scores - largest, -1e4)  # exp gives 0 there, and 0 * -1e4 is no NaN
    each = np.exp(shifted)
    whole = len(each) // BLOCK * BLOCK
    sums = each[:whole].reshape(-1, BLOCK).sum(1).astype(np.float64)
    if whole < len(each):
        sums = np.append(sums, each[whole:].sum())
    return sums, float(np.dot(each, shifted))


def places_reaching(scores: Array, bound: Any) -> np.ndarray[Any, np.dtype[np.intp]]:
    """The places, ascending, of the `scores` [n] that are at least `bound`."""
    extension = _extension(scores)
    if extension is None:
        return np.flatnonzero(scores >= bound)
    places: np.ndarray[Any, np.dtype[np.intp]] = extension.places_reaching(scores, bound)
    return places


def _extension(scores: Array) -> ModuleType | None:
    is_fit = len(scores) >= LONG and scores.dtype == np.float32 and scores.flags.c_contiguous
    return _loaded() if is_fit else None


@cache
def _loaded() -> ModuleType | None:
    try:
        from edgeformer import _native

        _native.exponential_sums(np.zeros(1, np.float32), 0.0)
    except (ImportError, ValueError):  # the latter: EDGEFORMER_ISA is wrong, which the native engine refuses
        return None
    return _native
