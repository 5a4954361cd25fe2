"""An image as uint8 [height, width, channels], from a file, a Pillow image or an array.

A file is read as by transformers' `load_image`: EXIF orientation applied, first frame, alpha dropped. A Pillow image is
read as by an image processor: without its orientation, alpha blended over white with `do_convert_rgb`. Images of more
than 8 bits a channel are refused.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from edgeformer.bundle.signature import Array
from edgeformer.errors import InputError, pip_install

# Pillow's modes of more than 8 bits a channel: its conversion to RGB clips all values above 255.
_DEEP = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")


def read(item: Any, channels: int = 3, *, over_white: bool = False) -> Array:
    """uint8 [height, width, channels] of a path, a Pillow image, or an array uint8 [height, width(, channels)].

    `over_white` is `do_convert_rgb`: the alpha of an image or array is blended over white.

    Raises:
        InputError: it is none of these, cannot be read, or has more than 8 bits a channel.
    """
    if isinstance(item, (str, os.PathLike)):
        return _open(item, channels, over_white)
    if hasattr(item, "convert") and hasattr(item, "getbands"):  # a Pillow image
        return _bytes(item, "The Pillow image", channels, over_white)
    array = np.asarray(item)
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or array.shape[2] not in (1, 3, 4) or array.dtype != np.uint8 or not array.size:
        raise InputError(
            f"The picture is {array.dtype}{list(array.shape)}, expected a path, a Pillow image, or uint8 "
            "[height, width, 3]."
        )
    if array.shape[2] == 4:
        array = _blended(array, over_white)
    if array.shape[2] == channels:
        return array
    if channels == 3:
        tripled: Array = np.repeat(array, 3, axis=2)
        return tripled
    # ITU-R 601-2, as Pillow's mode L: https://pillow.readthedocs.io/en/stable/reference/Image.html
    grey: Array = np.rint(array @ np.array([0.299, 0.587, 0.114])).astype(np.uint8)[..., None]
    return grey


def _blended(array: Array, over_white: bool) -> Array:
    if not over_white:
        raise InputError(
            f"The picture is uint8{list(array.shape)}, with an alpha channel, and the model's settings do not say "
            "how to remove it (no do_convert_rgb); give [height, width, 3]."
        )
    alpha = array[..., 3:] / 255
    blended: Array = np.round(alpha * array[..., :3] + (1 - alpha) * 255).astype(np.uint8)
    return blended


def _open(path: str | os.PathLike[str], channels: int, over_white: bool) -> Array:
    try:
        from PIL import Image, ImageOps
    except ImportError:
        raise InputError(
            f"Opening {path} needs Pillow ({pip_install('pillow')}); or give the picture as uint8 [height, width, 3]."
        ) from None
    try:
        with Image.open(path) as image:
            _shallow(image, str(path))
            upright = ImageOps.exif_transpose(image)
            # This drops alpha; a palette's or PNG file's transparent colour keeps its RGB value.
            return _bytes(upright.convert("RGB") if channels == 3 else upright, str(path), channels, over_white)
    except InputError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise InputError(
            f"{path} has more pixels than Pillow opens: {error} Make it smaller, or raise "
            "PIL.Image.MAX_IMAGE_PIXELS if you trust it."
        ) from error
    # Pillow's decoders raise SyntaxError and EOFError for damaged files.
    except (OSError, ValueError, SyntaxError, EOFError, TypeError, IndexError, KeyError) as error:
        raise InputError(f"{path} cannot be read as a picture: {error}.") from error


def _shallow(image: Any, name: str) -> None:
    if image.mode in _DEEP:
        raise InputError(
            f"{name} has the mode {image.mode}, more than 8 bits a channel, and the model was made for 8: Pillow and "
            "transformers would cut every value above 255 to white. Scale it to 8 bits yourself: "
            "np.asarray(image) / 65535 * 255 as uint8, say."
        )


def _bytes(image: Any, name: str, channels: int, over_white: bool) -> Array:
    _shallow(image, name)
    try:
        if over_white and ("A" in image.getbands() or image.info.get("transparency") is not None):
            from PIL import Image

            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image)
        array = np.asarray(image.convert("RGB" if channels == 3 else "L"))
    except (OSError, ValueError, SyntaxError) as error:
        raise InputError(f"{name} (mode {image.mode}) cannot be read as a picture: {error}.") from error
    return array if array.ndim == 3 else array[..., None]
