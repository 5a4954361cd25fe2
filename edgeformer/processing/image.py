"""Image preprocessing by the settings in preprocessor_config.json.

The export writes that file with all settings explicit, and compares these steps with transformers' processor on test
images. So a missing or unknown setting is an error here; there are no defaults.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgeformer.bundle.signature import Array
from edgeformer.errors import InputError
from edgeformer.processing.image_file import read
from edgeformer.processing.resize import resize

FILE = "preprocessor_config.json"
SWITCHES = ("do_resize", "do_rescale", "do_normalize")  # required
# Settings that do not change the result for one image: names, labels, batching, devices, and the layout of arrays
# (always [height, width, channels]).
IRRELEVANT = (
    *("image_processor_type", "feature_extractor_type", "processor_class", "auto_map", "default_to_square", "device"),
    *("disable_grouping", "return_tensors", "image_seq_length", "do_reduce_labels", "ignore_index", "num_labels"),
)
# Settings that have no effect with these values; others are unsupported.
ONLY: dict[str, tuple[Any, ...]] = {
    "data_format": ("channels_first",),
    "input_data_format": (),
    "keep_aspect_ratio": (False,),
    "ensure_multiple_of": (1,),
}
_SIZES = ({"height", "width"}, {"shortest_edge"}, {"shortest_edge", "longest_edge"}, {"max_height", "max_width"})


@dataclass(frozen=True)
class ImageSteps:
    """The preprocessing steps, in this order. A step that is None or False is skipped."""

    over_white: bool  # blend alpha over white
    size: Mapping[str, int] | None  # {height, width} | {shortest_edge(, longest_edge)} | {max_height, max_width}
    resample: int  # Pillow's number
    crop_pct: float | None  # resize to 1 / crop_pct of the size, before the crop
    crop: tuple[int, int] | None  # (height, width) of the center crop
    factor: float | None
    offset: bool  # subtract 1 after the multiplication by factor
    mean: Any
    std: Any  # None: no normalization
    std_again: bool  # divide by std a second time
    flip: bool  # RGB to BGR
    pad: tuple[int, int] | None  # (height, width); zeros at the bottom and right

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> ImageSteps:
        """The steps of a preprocessor_config.json.

        Raises:
            InputError: a setting is missing, unknown, or has an unknown value.
        """
        given = {name: value for name, value in settings.items() if value is not None and name not in IRRELEVANT}
        missing = [name for name in SWITCHES if name not in given]
        if missing:
            raise InputError(f"{FILE} does not say {', '.join(missing)}; export the model again.")
        take = _Remaining(given)
        resized, rescaled, normalized = (bool(take.pop(name)) for name in SWITCHES)
        size, resample, pct = take.pop("size"), take.pop("resample"), take.pop("crop_pct")
        crop, crop_size = take.pop("do_center_crop"), take.pop("crop_size")
        factor, offset = take.pop("rescale_factor"), take.pop("rescale_offset")
        mean, std, again = take.pop("image_mean"), take.pop("image_std"), take.pop("include_top")
        pad, pad_size = take.pop("do_pad"), take.pop("pad_size")
        if not pad and given.get("size_divisor") is not None:
            take.pop("size_divisor")  # part of padding, which is off
        found = cls(
            over_white=bool(take.pop("do_convert_rgb")),
            size=_size(size) if resized else None,
            resample=take.number("resample", resample, int) if resized else 0,
            crop_pct=take.number("crop_pct", pct, float) if resized and pct is not None else None,
            crop=_edges(crop_size, "crop_size") if crop else None,
            factor=take.number("rescale_factor", factor, float) if rescaled else None,
            offset=bool(offset) and rescaled,
            mean=_channels(mean, "image_mean") if normalized else None,
            std=_channels(std, "image_std") if normalized or again else None,
            std_again=bool(again),
            flip=bool(take.pop("do_flip_channel_order")),
            pad=_edges(pad_size, "pad_size") if pad and pad_size is not None else None,
        )
        take.nothing_left()
        return found

    @property
    def fixed(self) -> tuple[int, int] | None:
        """(height, width) of every result; None if it depends on the image."""
        if self.pad is not None:
            return self.pad
        if self.crop is not None:
            return self.crop
        if self.size is not None and "height" in self.size:
            return self.size["height"], self.size["width"]
        if self.size is not None and self.crop_pct is not None and "shortest_edge" in self.size:
            return self.size["shortest_edge"], self.size["shortest_edge"]
        return None

    def __call__(self, image: Array) -> Array:
        """float32 [channels, height, width] of uint8 [height, width, channels].

        Raises:
            InputError: the image is too narrow, or larger than the padded size.
        """
        if self.size is not None:
            image = self._resized(image, self.size)
        if self.crop is not None:
            image = center_crop(image, self.crop)
        array: Array = image
        if self.factor is not None:
            array = (array.astype(np.float64) * self.factor).astype(np.float32)
            array = array - np.float32(1) if self.offset else array
        # float32 from here on, as transformers computes it
        if self.mean is not None:
            array = (array.astype(np.float32) - self._row(self.mean, array)) / self._row(self.std, array)
        if self.std_again:
            array = array.astype(np.float32) / self._row(self.std, array)
        array = array[..., ::-1] if self.flip else array
        array = array if self.pad is None else _padded(array, self.pad)
        return np.ascontiguousarray(array.transpose(2, 0, 1), dtype=np.float32)

    def _resized(self, image: Array, size: Mapping[str, int]) -> Array:
        if self.crop_pct is None:
            return resize(image, target(image.shape, size), self.resample)
        short = size.get("shortest_edge")
        if self.crop is not None:  # larger by 1 / crop_pct; the center crop follows
            larger = {name: int(edge / self.crop_pct) for name, edge in size.items()}
            if size.get("height") == size.get("width"):
                larger = {"shortest_edge": larger.get("shortest_edge") or larger["height"]}
            return resize(image, target(image.shape, larger), self.resample)
        if short is None:
            raise InputError(f"{FILE} gives crop_pct with the size {dict(size)}, expected shortest_edge.")
        if short >= 384:  # resized without cropping: https://github.com/facebookresearch/ConvNeXt, datasets.py
            return resize(image, (short, short), self.resample)
        image = resize(image, shortest(image.shape, int(short / self.crop_pct)), self.resample)
        return center_crop(image, (short, short))

    def _row(self, values: Any, array: Array) -> Array:
        row = np.asarray(values, np.float32).reshape(-1)
        if row.size not in (1, array.shape[2]):
            raise InputError(f"{FILE} gives {row.size} means or deviations for {array.shape[2]} channels.")
        return row


class _Remaining:
    """Settings that are read one by one; those that remain are unknown."""

    def __init__(self, given: Mapping[str, Any]) -> None:
        self.left = dict(given)

    def pop(self, name: str) -> Any:
        return self.left.pop(name, None)

    def number(self, name: str, value: Any, kind: type) -> Any:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise InputError(f"{FILE} gives {name} as {value!r}, expected a number.")
        return kind(value)

    def nothing_left(self) -> None:
        # A setting that is switched off has no effect; the export compares the result with transformers.
        unknown = {
            name: value
            for name, value in self.left.items()
            if value is not False and value not in ONLY.get(name, ()) and value not in ("", [], {})
        }
        if unknown:
            listed = ", ".join(f"{name}={value!r}" for name, value in sorted(unknown.items()))
            raise InputError(f"{FILE} asks for {listed[:400]}, which edgeformer does not compute.")


def pixels(item: Any, settings: Mapping[str, Any] | ImageSteps, shape: tuple[int | str, ...]) -> Array:
    """float32 [channels, height, width] of an image: a path, a Pillow image, or an array [height, width(, channels)].

    `shape` is that of the graph's input.

    Raises:
        InputError: it is none of these, or the result has another size than the graph's input.
    """
    steps = settings if isinstance(settings, ImageSteps) else ImageSteps.of(settings)
    array = steps(read(item, int(shape[0]), over_white=steps.over_white))
    if any(isinstance(want, int) and want != got for want, got in zip(shape, array.shape, strict=True)):
        raise InputError(
            f"The picture is {list(array.shape[1:])} after preprocessing, the graph takes {list(shape[1:])}. "
            + (
                "Its proportions stay, so other ones than these do not fit; crop it first."
                if steps.fixed is None
                else f"{FILE} does not fit the model."
            )
        )
    return array


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _size(size: Any) -> Mapping[str, int]:
    """A size as a mapping of its edges."""
    if isinstance(size, Mapping):
        edges = {name: value for name, value in size.items() if value is not None}
        if set(edges) in _SIZES and all(_whole(value) for value in edges.values()):
            return edges
    elif isinstance(size, Sequence) and len(size) == 2 and all(map(_whole, size)):
        return {"height": size[0], "width": size[1]}
    raise InputError(
        f"{FILE} gives the size {size!r}, expected {{height, width}}, {{shortest_edge}}, {{shortest_edge, "
        "longest_edge} or {max_height, max_width}, in pixels."
    )


def _edges(size: Any, name: str) -> tuple[int, int]:
    if isinstance(size, int):
        size = {"height": size, "width": size}
    try:
        edges = _size(size)
        return edges["height"], edges["width"]
    except (InputError, KeyError):
        raise InputError(f"{FILE} gives {name} as {size!r}, expected {{height, width}} in pixels.") from None


def _channels(values: Any, name: str) -> Any:
    listed = values if isinstance(values, Sequence) else [values]
    if any(isinstance(value, bool) or not isinstance(value, (int, float)) for value in listed):
        raise InputError(f"{FILE} gives {name} as {values!r}, expected a number, or one a channel.")
    return values


def target(current: Sequence[int], size: Mapping[str, int]) -> tuple[int, int]:
    """(height, width) to resize [height, width, ...] to."""
    height, width = current[:2]
    if "height" in size:
        return size["height"], size["width"]
    if "max_height" in size:
        scale = min(size["max_height"] / height, size["max_width"] / width)
        return int(height * scale), int(width * scale)
    if "longest_edge" not in size:
        return shortest(current, size["shortest_edge"])
    # By the shorter edge; if the longer one would exceed its limit, by the longer one, with the shorter rounded.
    limit, edge = size["longest_edge"], float(size["shortest_edge"])
    short = size["shortest_edge"]
    if max(height, width) / min(height, width) * edge > limit:
        edge = limit * float(min(height, width)) / max(height, width)
        short = round(edge)
    if min(height, width) == short:
        return height, width
    return (int(edge * height / width), short) if width < height else (short, int(edge * width / height))


def shortest(current: Sequence[int], edge: int) -> tuple[int, int]:
    """(height, width) with the shorter edge `edge` and the aspect ratio of [height, width, ...]."""
    height, width = current[:2]
    return (int(edge * height / width), edge) if width <= height else (edge, int(edge * width / height))


def center_crop(image: Array, size: tuple[int, int]) -> Array:
    """The center of the image; zeros outside of it."""
    height, width = size
    top, left = (image.shape[0] - height) // 2, (image.shape[1] - width) // 2
    if top >= 0 and left >= 0:
        middle: Array = image[top : top + height, left : left + width]
        return middle
    canvas = np.zeros((max(height, image.shape[0]), max(width, image.shape[1]), image.shape[2]), image.dtype)
    y, x = -(-(canvas.shape[0] - image.shape[0]) // 2), -(-(canvas.shape[1] - image.shape[1]) // 2)
    canvas[y : y + image.shape[0], x : x + image.shape[1]] = image
    top, left = top + y, left + x
    return canvas[max(0, top) : top + height, max(0, left) : left + width]


def _padded(array: Array, size: tuple[int, int]) -> Array:
    height, width = size[0] - array.shape[0], size[1] - array.shape[1]
    if height < 0 or width < 0:
        raise InputError(f"The picture is {list(array.shape[:2])}, larger than the {list(size)} it is padded to.")
    return np.pad(array, ((0, height), (0, width), (0, 0)))
