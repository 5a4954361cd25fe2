"""Resizing 8-bit images with the bits of Pillow 13, so that a device needs no Pillow.

A separable filter, widened when the image is reduced. Weights are fixed-point numbers of 22 bits, and each of the two
passes rounds to bytes: https://pillow.readthedocs.io/en/stable/handbook/concepts.html#filters
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from edgeformer.bundle.signature import Array
from edgeformer.errors import InputError

NEAREST = 0
_ONE = 1 << 22  # 22 bits leave 8 bits of value and 2 bits of headroom in a 32-bit sum


def resize(image: Array, size: tuple[int, int], resample: int) -> Array:
    """uint8 [*size, channels] of uint8 [height, width, channels], by Pillow's filter number `resample`.

    Raises:
        InputError: the filter is unknown, or the size has no pixels.
    """
    height, width = size
    if resample != NEAREST and resample not in FILTERS:
        raise InputError(f"resample is {resample}; known are Pillow's filters 0 to 5.")
    if min(size) < 1:
        raise InputError(
            f"A picture of {image.shape[1]} x {image.shape[0]} pixels would be resized to {width} x {height}: it is "
            "too narrow for this model's preprocessing."
        )
    if resample == NEAREST:
        nearest: Array = image[_nearest(image.shape[0], height)][:, _nearest(image.shape[1], width)]
        return nearest
    lost, narrowed = image.shape[0] - height, image.shape[1] - width
    # Each pass rounds, so their order matters. Pillow resizes the rows first if the height is reduced far more.
    # https://github.com/python-pillow/Pillow/pull/9549, since 13.0
    tall_first = lost > 0 and lost > 2 * narrowed
    for axis in (0, 1) if tall_first else (1, 0):
        if image.shape[axis] != size[axis]:
            image = np.moveaxis(_along_first(np.moveaxis(image, axis, 0), size[axis], resample), 0, axis)
    return image


def _nearest(before: int, after: int) -> Array:
    """int64 [after]: the old row of each new row. Positions are summed step by step, for the same rounding."""
    step = before / after
    positions = np.full(after, step)
    positions[0] = step * 0.5
    return np.add.accumulate(positions).astype(np.int64).clip(0, before - 1)


def _along_first(image: Array, after: int, resample: int) -> Array:
    """uint8 [after, ...] of uint8 [before, ...]: each new row is a weighted sum of neighbouring old rows."""
    flat = np.ascontiguousarray(image).reshape(len(image), -1)
    out = np.empty((after, flat.shape[1]), np.uint8)
    for row, (first, weights) in enumerate(_windows(len(image), after, resample)):
        # Integers below 2**53 in float64: the sum is exact in any order.
        total = weights @ flat[first : first + len(weights)].astype(np.float64)
        out[row] = np.floor((total + _ONE // 2) / _ONE).clip(0, 255)
    return out.reshape(after, *image.shape[1:])


def _windows(before: int, after: int, resample: int) -> list[tuple[int, Array]]:
    """For each new row: (the first old row, fixed-point weights from there on)."""
    kernel, support = FILTERS[resample]
    scale = before / after
    stretch = max(scale, 1.0)  # a reduction averages over all rows that a new one covers
    found = []
    for row in range(after):
        center = (row + 0.5) * scale
        first = max(int(center - support * stretch + 0.5), 0)
        last = min(int(center + support * stretch + 0.5), before)
        weights = kernel((np.arange(first, last) - center + 0.5) * (1.0 / stretch))
        weights = weights / np.add.accumulate(weights)[-1]  # summed in order, for the same rounding
        found.append((first, np.trunc(weights * _ONE + np.copysign(0.5, weights))))
    return found


def _box(x: Array) -> Array:
    return np.where((x > -0.5) & (x <= 0.5), 1.0, 0.0)


def _triangle(x: Array) -> Array:
    return np.maximum(0.0, 1.0 - np.abs(x))


def _hamming(x: Array) -> Array:
    return np.where(np.abs(x) < 1, np.sinc(x) * (0.54 + 0.46 * np.cos(np.pi * x)), 0.0)


def _cubic(x: Array, a: float = -0.5) -> Array:
    x = np.abs(x)
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


def _lanczos(x: Array) -> Array:
    return np.where(np.abs(x) < 3, np.sinc(x) * np.sinc(x / 3), 0.0)


# Pillow's number -> (kernel, its support).
FILTERS: dict[int, tuple[Callable[[Array], Array], float]] = {
    1: (_lanczos, 3.0),
    2: (_triangle, 1.0),
    3: (_cubic, 2.0),
    4: (_box, 0.5),
    5: (_hamming, 1.0),
}
