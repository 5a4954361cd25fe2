"""Settings of image processors, and kinds of image files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from bench.sources.row import Row
from edgeformer.errors import ExportError, InputError
from edgeformer.export.sources.hub.processors import image_settings
from edgeformer.processing.image import FILE, IRRELEVANT, ImageSteps
from edgeformer.processing.image_file import read

TITLE = "Pictures"
ABOUT = (
    "Every setting of every image processor that transformers can load without torchvision, tried on a class that "
    "has it; then kinds of image files. The reference is transformers' own processor (its PIL backend). A "
    "processor whose results differ from its settings (Owlv2, LeViT, Perceiver, video) is refused too: the export "
    "compares its arrays with the runtime's on unusual images."
)
TESTS = "tests/processing/test_images.py"
REFERENCE = "AutoImageProcessor"
PLAIN = "ViTImageProcessor"
# Values to try where a change of the class's default shows nothing. One row each.
VALUES: dict[str, tuple[Any, ...]] = {
    "size": (
        {"height": 24, "width": 40},
        20,
        {"shortest_edge": 40},
        {"shortest_edge": 40, "longest_edge": 48},
        {"longest_edge": 40},
        {"max_height": 40, "max_width": 50},
        {"min_pixels": 100, "max_pixels": 900},
    ),
    "resample": (0, 1, 2, 3, 4, 5, 6),
    "crop_size": ({"height": 20, "width": 30}, 28),
    "do_center_crop": (True,),
    "do_pad": (True,),
    "pad_size": ({"height": 300, "width": 310},),
    "rescale_factor": (1 / 127.5,),
    "image_mean": ([0.1, 0.2, 0.3], 0.4),
    "image_std": ([0.1, 0.2, 0.3], 0.4),
    "do_convert_rgb": (True,),
    "crop_pct": (0.5,),
    "data_format": ("channels_last",),
    "input_data_format": ("channels_last",),
    "default_to_square": (False,),
    "size_divisor": (16,),
    "ensure_multiple_of": (14,),
    "keep_aspect_ratio": (True,),
    "device": ("cpu",),
    "return_tensors": ("np",),
    "image_seq_length": (7,),
}
# Other settings that a setting needs to have an effect.
WITH: dict[str, dict[str, Any]] = {
    "crop_size": {"do_center_crop": True},
    "do_center_crop": {"crop_size": 28},
    "do_pad": {"pad_size": {"height": 300, "width": 310}},
    "pad_size": {"do_pad": True},
    "crop_pct": {"size": {"shortest_edge": 40}},
    "default_to_square": {"size": 40},
}
FILES = ("EXIF orientation", "palette", "transparent colour", "alpha", "CMYK", "1 bit", "16 bits", "animation")


def processors() -> list[Any]:
    """The image processor classes that load on this machine."""
    from transformers.models.auto import image_processing_auto as auto

    names = {mapping["pil"] for mapping in auto.IMAGE_PROCESSOR_MAPPING_NAMES.values() if "pil" in mapping}
    found = [auto.get_image_processor_class_from_name(name) for name in sorted(names)]
    return [kind for kind in found if not getattr(kind, "is_dummy", False) and hasattr(kind, "valid_kwargs")]


def settings() -> list[str]:
    """`size {...}` for a value from the table above; the name alone if the class's default is changed."""
    known = sorted({key for kind in processors() for key in kind.valid_kwargs.__annotations__})
    named = [f"{key} {json.dumps(value)}" for key in known for value in VALUES.get(key, (None,))]
    return [name.removesuffix(" null") for name in named] + [f"a file with {kind}" for kind in FILES]


def rows(work: Path) -> Iterator[Row]:
    """See `bench.sources.row.Sweep`."""
    kinds = {kind.__name__.removesuffix("Pil"): kind for kind in processors()}
    plain = {name: _settings({"image_processor_type": name}) for name in kinds}
    for setting in settings():
        if setting.startswith("a file with "):
            yield _file_row(setting, work)
            continue
        key, _, value = setting.partition(" ")
        names = [name for name, kind in kinds.items() if key in kind.valid_kwargs.__annotations__]
        # Prefers a class that is exported without the setting, then one whose error names it.
        names.sort(
            key=lambda name: (not isinstance(plain[name], dict), f"{key}=" not in str(plain[name]), name != PLAIN)
        )
        yield _row(setting, key, json.loads(value) if value else None, names[0], plain[names[0]], work)


def _settings(given: dict[str, Any]) -> dict[str, Any] | str:
    """The settings that the export writes, or its error message."""
    content = json.dumps(given).encode()
    try:
        return dict(json.loads(image_settings(lambda file: content if file == FILE else None, 3)[FILE]))
    except ExportError as error:
        return str(error)


def _short(message: str) -> str:
    """The error message without the advice."""
    reason = message.partition(" Without ")[0]
    return reason if len(reason) <= 160 else f"{reason[:157]}..."


def _row(setting: str, key: str, value: Any, name: str, plain: dict[str, Any] | str, work: Path) -> Row:
    if isinstance(plain, str):
        return Row(setting, "refused", _short(plain), REFERENCE)
    base = {"image_processor_type": name, **WITH.get(key, {})}
    tried = base | {key: _other(plain.get(key)) if value is None else value}
    shown = f"{name}, {key}={tried[key]!r}"
    written = _settings(tried)
    if isinstance(written, str):
        return Row(setting, "refused", f"{shown}: {_short(written)}", REFERENCE)
    differs, moved = _differences(written, base, tried, work)
    if differs > 1e-5:
        return Row(setting, "ignored", f"{shown}: off by {differs:.2g}", REFERENCE)
    if moved:
        seen = "another size" if moved == float("inf") else f"moves values by {moved:.2g}"
        return Row(setting, "honoured", f"{shown}: {seen}, off by {differs:.1g}", REFERENCE)
    why = "no array depends on it" if key in IRRELEVANT else "transformers' arrays stay the same"
    return Row(setting, "irrelevant", f"{shown}: {why}", REFERENCE)


def _other(value: Any) -> Any:
    """Another value of the same type."""
    if isinstance(value, bool) or value is None:
        return not value
    if isinstance(value, (int, float)):
        return value * 2
    return value


def _differences(written: dict[str, Any], base: Any, tried: Any, work: Path) -> tuple[float, float]:
    """(difference from transformers' array, effect of the setting on transformers' array)."""
    from PIL import Image

    noise = np.random.default_rng(0).integers(0, 256, (250, 260, 4), dtype=np.uint8)
    pictures = [Image.fromarray(noise).convert("RGB"), Image.fromarray(noise[:90, :50]).convert("RGB")]
    steps = ImageSteps.of(written)
    pictures += [Image.fromarray(noise)] if steps.over_white else []
    differs = moved = 0.0
    for picture in pictures:
        before, after = (_transformers(given, picture, work) for given in (base, tried))
        found = steps(read(picture, over_white=steps.over_white))
        if after is None or found.shape != after.shape:
            return float("inf"), 0.0
        differs = max(differs, float(np.abs(found - after).max()))
        same = before is not None and before.shape == after.shape
        moved = max(moved, float(np.abs(before - after).max()) if same else float("inf"))
    return differs, moved


def _transformers(given: Any, picture: Any, work: Path) -> Any:
    from transformers import AutoImageProcessor

    (work / FILE).write_text(json.dumps(given))
    processor = AutoImageProcessor.from_pretrained(work, backend="pil")
    try:
        return np.asarray(processor(images=picture, return_tensors="np")["pixel_values"])[0]
    except ValueError:
        return None


def _file_row(setting: str, work: Path) -> Row:
    from PIL import Image
    from transformers.image_utils import load_image

    noise = np.random.default_rng(0).integers(0, 256, (61, 83, 4), dtype=np.uint8)
    rgba, exif = Image.fromarray(noise), Image.Exif()
    rgb, exif[0x0112] = rgba.convert("RGB"), 6
    palette = rgb.quantize(16)
    made = {
        "EXIF orientation": (rgb, "png", {"exif": exif}),
        "palette": (palette, "png", {}),
        "transparent colour": (palette, "png", {"transparency": 3}),
        "alpha": (rgba, "png", {}),
        "CMYK": (rgb.convert("CMYK"), "jpg", {}),
        "1 bit": (rgb.convert("1"), "png", {}),
        "16 bits": (Image.fromarray(noise[..., 0].astype(np.uint16) * 257), "png", {}),
        "animation": (rgb, "webp", {"save_all": True, "append_images": [rgb.rotate(90)]}),
    }
    image, suffix, more = made[setting.removeprefix("a file with ")]
    path = work / f"file.{suffix}"
    image.save(path, **more)
    try:
        found = read(path)
    except InputError as error:
        return Row(setting, "refused", str(error).replace(f"{work}/", "")[:160], "load_image")
    same = np.array_equal(found, np.asarray(load_image(str(path))))
    return Row(setting, "honoured" if same else "ignored", "the same bytes" if same else "other bytes", "load_image")
