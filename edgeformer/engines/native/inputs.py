"""Checks of what callers give to the native engine, before its bindings check sizes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from edgeformer.bundle.signature import IDS, Array
from edgeformer.errors import InputError


def fitting(name: str, given: Any, dtype: Any, shape: Sequence[Any]) -> Array:
    """The array, contiguous and of the program's type.

    Raises:
        InputError: it is of another kind or rank, or a token id is negative.
    """
    try:
        array = np.asarray(given)
    except ValueError:
        raise InputError(f"{name} is ragged, expected one array [{', '.join(map(str, shape))}]") from None
    kinds = "iu" if dtype is np.int64 else "b" if dtype is np.bool_ else "f"
    if array.dtype.kind not in kinds:
        raise InputError(f"{name} has dtype {array.dtype}, expected {np.dtype(dtype)}")
    if array.ndim != len(shape):
        raise InputError(f"{name} has shape {list(array.shape)}, expected [{', '.join(map(str, shape))}]")
    # ONNX's Gather takes -1 as the last row. The engine refuses ids above the table itself.
    if name.endswith(IDS) and array.size and int(array.min()) < 0:
        raise InputError(f"{name} holds the token id {int(array.min())}, expected at least 0")
    return np.ascontiguousarray(array, dtype) if array.ndim else np.asarray(array, dtype)


def whole(name: str, value: Any, most: int = 2**40) -> int:
    """The number.

    Raises:
        InputError: it is no whole number from 0 to `most`.
    """
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not 0 <= value <= most:
        raise InputError(f"{name} is {value!r}, expected a whole number from 0 to {most:,}.")
    return int(value)
