"""Checks of what callers give to the native engine, before its bindings check sizes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from edgeformer.bundle.signature import Array
from edgeformer.errors import InputError


def fits(given: Any, dtype: np.dtype[Any], rank: int) -> bool:
    """Whether it is already what `fitting` makes of it."""
    return type(given) is np.ndarray and given.dtype == dtype and given.ndim == rank and given.flags.c_contiguous


def fitting(name: str, given: Any, dtype: np.dtype[Any], shape: Sequence[Any]) -> Array:
    """The array, contiguous and of the program's type.

    Raises:
        InputError: it is of another kind or rank.
    """
    try:
        array = np.asarray(given)
    except ValueError:
        raise InputError(f"{name} is ragged, expected one array [{', '.join(map(str, shape))}]") from None
    if array.dtype.kind not in ("iu" if dtype.kind == "i" else dtype.kind):
        raise InputError(f"{name} has dtype {array.dtype}, expected {dtype}")
    if array.ndim != len(shape):
        raise InputError(f"{name} has shape {list(array.shape)}, expected [{', '.join(map(str, shape))}]")
    return np.ascontiguousarray(array, dtype) if array.ndim else np.asarray(array, dtype)


def whole(name: str, value: Any, most: int = 2**40) -> int:
    """The number.

    Raises:
        InputError: it is no whole number from 0 to `most`.
    """
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not 0 <= value <= most:
        raise InputError(f"{name} is {value!r}, expected a whole number from 0 to {most:,}.")
    return int(value)
