"""A picture as the array that a vision model takes, after the steps in its preprocessor_config.json.

Resizing is done here, in numpy, as Pillow does it (a separable filter, widened where the picture shrinks, each pass
rounded to bytes), so that a device needs no imaging library; Pillow is only asked to open files.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from edgeformer.errors import InputError

Array = np.ndarray[Any, Any]

NEAREST, LANCZOS, BILINEAR, BICUBIC = 0, 1, 2, 3  # Pillow's numbers, which the config names


def pixels(item: Any, settings: Mapping[str, Any], shape: tuple[int | str, ...]) -> np.ndarray[Any, Any]:
    """float32 [channels, height, width] of a picture: a path, a Pillow image, or an array [height, width(, channels)].

    `shape` is what the graph takes.

    Raises:
        InputError: it is none of these, or the steps end in another size than the graph takes.
    """
    image = read(item, channels=int(shape[0]))  # uint8 [H, W, C]
    if settings.get("do_resize", True):
        target = _target(image.shape[:2], settings.get("size", {}))
        image = resize(image, target, int(settings.get("resample", BILINEAR)))
    if settings.get("do_center_crop"):
        image = center_crop(image, _edges(settings.get("crop_size", {})))
    array = image.astype(np.float64)
    if settings.get("do_rescale", True):
        array = array * float(settings.get("rescale_factor", 1 / 255))
    if settings.get("do_normalize", True):
        mean, std = (np.asarray(settings.get(name, 0.5), np.float64) for name in ("image_mean", "image_std"))
        array = (array - mean) / std
    if array.shape[2] != shape[0] or any(
        isinstance(want, int) and want != got for want, got in zip(shape[1:], array.shape[:2], strict=True)
    ):
        raise InputError(
            f"The picture is {list(array.shape[:2])} after preprocessing, the graph takes {list(shape[1:])}; "
            "preprocessor_config.json does not fit the model."
        )
    return np.ascontiguousarray(array.transpose(2, 0, 1), dtype=np.float32)


def read(item: Any, channels: int = 3) -> Array:
    """uint8 [height, width, channels]."""
    if isinstance(item, (str, os.PathLike)):
        item = _open(item)
    if hasattr(item, "convert") and hasattr(item, "size"):  # a Pillow image
        item = np.asarray(item.convert("RGB" if channels == 3 else "L"))
    array = np.asarray(item)
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or array.shape[2] not in (1, 3, 4) or array.dtype != np.uint8 or not array.size:
        raise InputError(
            f"The picture is {array.dtype}{list(array.shape)}, expected a path, a Pillow image, or uint8 "
            "[height, width, 3]."
        )
    array = array[..., :3]
    if array.shape[2] == channels:
        return array
    if channels == 3:
        tripled: Array = np.repeat(array, 3, axis=2)
        return tripled
    grey: Array = np.rint(array @ np.array([0.299, 0.587, 0.114])).astype(np.uint8)[..., None]
    return grey


def _open(path: str | os.PathLike[str]) -> Any:
    try:
        from PIL import Image
    except ImportError:
        raise InputError(
            f"Opening {path} needs Pillow (pip install pillow); or give the picture as uint8 [height, width, 3]."
        ) from None
    try:
        return Image.open(path)
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as a picture: {error}.") from error


def _edges(size: Any) -> tuple[int, int]:
    if isinstance(size, Mapping) and "height" in size:
        return int(size["height"]), int(size["width"])
    if isinstance(size, Mapping) and "shortest_edge" in size:
        return int(size["shortest_edge"]), int(size["shortest_edge"])
    if isinstance(size, int):
        return size, size
    if isinstance(size, Sequence) and len(size) == 2:
        return int(size[0]), int(size[1])
    raise InputError(f"preprocessor_config.json names the size {size!r}, expected height and width, or shortest_edge.")


def _target(current: tuple[int, ...], size: Any) -> tuple[int, int]:
    """(height, width) to resize to; a shortest edge keeps the proportions."""
    if not (isinstance(size, Mapping) and "shortest_edge" in size):
        return _edges(size)
    height, width = current
    short, long = (width, height) if width <= height else (height, width)
    new_short = int(size["shortest_edge"])
    new_long = int(new_short * long / short)
    return (new_long, new_short) if width <= height else (new_short, new_long)


def center_crop(image: Array, size: tuple[int, int]) -> Array:
    """The middle of the picture; zeros where it is smaller."""
    height, width = size
    top, left = (image.shape[0] - height) // 2, (image.shape[1] - width) // 2
    if top >= 0 and left >= 0:
        middle: Array = image[top : top + height, left : left + width]
        return middle
    canvas = np.zeros((max(height, image.shape[0]), max(width, image.shape[1]), image.shape[2]), image.dtype)
    y, x = -(-(canvas.shape[0] - image.shape[0]) // 2), -(-(canvas.shape[1] - image.shape[1]) // 2)
    canvas[y : y + image.shape[0], x : x + image.shape[1]] = image
    return center_crop(canvas, size)


def resize(image: Array, size: tuple[int, int], resample: int) -> Array:
    """uint8 [*size, channels] of uint8 [height, width, channels], by Pillow's filter number `resample`."""
    height, width = size
    if resample == NEAREST:
        rows = ((np.arange(height) + 0.5) * image.shape[0] / height).astype(np.int64)
        columns = ((np.arange(width) + 0.5) * image.shape[1] / width).astype(np.int64)
        nearest: Array = image[rows][:, columns]
        return nearest
    kernels = {BILINEAR: (_triangle, 1.0), BICUBIC: (_cubic, 2.0), LANCZOS: (_lanczos, 3.0)}
    if resample not in kernels:
        raise InputError(f"preprocessor_config.json asks for resample {resample}; known are 0 to 3.")
    kernel, support = kernels[resample]
    if image.shape[1] != width:
        image = _bytes(np.einsum("ow,hwc->hoc", _weights(image.shape[1], width, kernel, support), image))
    if image.shape[0] != height:
        image = _bytes(np.einsum("oh,hwc->owc", _weights(image.shape[0], height, kernel, support), image))
    return image


def _weights(before: int, after: int, kernel: Any, support: float) -> Array:
    """[after, before]: how much each old pixel gives to each new one; each row sums to 1."""
    scale = before / after
    stretch = max(scale, 1.0)  # shrinking averages over all pixels that a new one covers
    centers = (np.arange(after) + 0.5) * scale
    first = np.maximum((centers - support * stretch + 0.5).astype(np.int64), 0)
    last = np.minimum((centers + support * stretch + 0.5).astype(np.int64), before)
    places = np.arange(before)
    weights = kernel((places[None] - centers[:, None] + 0.5) / stretch)
    weights = np.where((places[None] >= first[:, None]) & (places[None] < last[:, None]), weights, 0.0)
    shares: Array = weights / weights.sum(1, keepdims=True)
    return shares


def _triangle(x: Array) -> Array:
    return np.maximum(0.0, 1.0 - np.abs(x))


def _cubic(x: Array, a: float = -0.5) -> Array:
    x = np.abs(x)
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


def _lanczos(x: Array) -> Array:
    return np.where(np.abs(x) < 3, np.sinc(x) * np.sinc(x / 3), 0.0)


def _bytes(values: Array) -> Array:
    rounded: Array = np.clip(np.floor(values + 0.5), 0, 255).astype(np.uint8)
    return rounded
