"""Preprocessing of images and audio: complete settings for the bundle, checked against transformers' processor.

A folder's preprocessor_config.json (or that part of processor_config.json) omits the defaults of its class. The file of
the bundle has every setting, and is written only if the runtime gives the processor's numbers on unusual images and
sounds. So no list of processor classes is needed.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgeformer.bundle.signature import Array
from edgeformer.errors import ExportError, InputError, first_line
from edgeformer.export.quiet import quiet
from edgeformer.export.sources.model_files import ReadFile
from edgeformer.files import temporary_folder
from edgeformer.processing.audio import LogMel
from edgeformer.processing.image import FILE, SWITCHES, ImageSteps
from edgeformer.processing.image_file import read as read_image

NESTED = "processor_config.json"
_BILINEAR = 2  # transformers' default for `resample`
_ADVICE = (
    f"Remove {FILE} and {NESTED} from the folder to export the model without preprocessing; the bundle then takes "
    "arrays made by transformers' processor."
)


def image_settings(read: ReadFile, channels: int) -> dict[str, bytes]:
    """{preprocessor_config.json: every setting of the folder's image processor}; {} if it has none.

    Raises:
        ExportError: the processor cannot be loaded, needs an operation that the runtime lacks, or its results differ
            from its settings.
    """
    with _folder(read, "image_processor") as folder:
        if folder is None:
            return {}
        processor = _loaded("AutoImageProcessor", folder, backend="pil")
        settings = _image_settings(processor)
        try:
            steps = ImageSteps.of(settings)
        except InputError as error:
            raise ExportError(f"{settings['image_processor_type']}: {error} {_ADVICE}") from error
        _check_images(processor, steps, settings, channels, folder)
    return {FILE: _json(settings)}


def sound_settings(read: ReadFile) -> dict[str, bytes]:
    """{preprocessor_config.json: every setting of the folder's feature extractor}; {} if it has none.

    Raises:
        ExportError: the feature extractor cannot be loaded.
    """
    with _folder(read, "feature_extractor") as folder:
        return {} if folder is None else {FILE: _json(_sound_settings(_loaded("AutoFeatureExtractor", folder)))}


def log_mel_settings(read: ReadFile, shape: Sequence[int | str]) -> dict[str, bytes]:
    """`sound_settings` of a model whose log-mel features, [bins, frames] of `shape`, the runtime computes.

    Raises:
        ExportError: the runtime's features differ from transformers'.
    """
    with _folder(read, "feature_extractor") as folder:
        if folder is None:
            return {}
        extractor = _loaded("AutoFeatureExtractor", folder)
        settings = _sound_settings(extractor)
        try:
            front = LogMel.of(settings)
        except InputError as error:
            raise ExportError(f"{type(extractor).__name__}: {error} {_ADVICE}") from error
        _check_sound(extractor, front, settings, shape)
    return {FILE: _json(settings)}


# ------------------------------------------------------------------------------------------------------------- loading


@contextlib.contextmanager
def _folder(read: ReadFile, part: str) -> Iterator[Path | None]:
    """A folder with the preprocessor's files and config.json; None if the model has no preprocessor."""
    plain, nested = read(FILE), read(NESTED)
    if plain is None and (nested is None or part not in json.loads(nested)):
        yield None
        return
    with temporary_folder() as place:
        for name, content in ((FILE, plain), (NESTED, nested), ("config.json", read("config.json"))):
            if content is not None:
                (place / name).write_bytes(content)
        yield place


def _loaded(loader: str, folder: Path, **more: Any) -> Any:
    import transformers

    try:
        with quiet():
            return getattr(transformers, loader).from_pretrained(folder, trust_remote_code=False, **more)
    except Exception as error:
        kinds = sorted(
            set(re.findall(r'"(?:image_processor|feature_extractor)_type":\s*"([^"]*)"', _texts(folder))) or {"none"}
        )
        raise ExportError(
            f"transformers cannot load the processor of {FILE} or {NESTED} (named: {', '.join(kinds)}): "
            f"{type(error).__name__}: "
            f"{first_line(error)[:300].replace(str(folder), 'the folder')} {_ADVICE}"
        ) from error


def _texts(folder: Path) -> str:
    return " ".join(path.read_text(encoding="utf-8") for path in folder.glob("*.json") if path.name != "config.json")


def _image_settings(processor: Any) -> dict[str, Any]:
    """All settings of the processor that its class knows.

    It stores unknown ones too, without reading them; if it does read one, the comparison of images shows it.
    """
    known = getattr(processor, "_valid_kwargs_names", None)
    found = json.loads(_json(processor.to_dict()))
    settings = {name: value for name, value in found.items() if known is None or name in known}
    settings |= {name: bool(getattr(processor, name, False)) for name in SWITCHES}
    settings["resample"] = settings.get("resample", _BILINEAR)
    return settings | {"image_processor_type": found.get("image_processor_type", type(processor).__name__)}


def _sound_settings(extractor: Any) -> dict[str, Any]:
    found = json.loads(_json(extractor.to_dict()))
    with contextlib.suppress(Exception), quiet():  # a class that needs arguments keeps all settings
        known = set(type(extractor)().to_dict())
        return {name: value for name, value in found.items() if name in known}
    return dict(found)


def _json(settings: Mapping[str, Any]) -> bytes:
    def plain(value: Any) -> Any:
        return value.tolist() if isinstance(value, np.ndarray) else getattr(value, "value", None) or dict(value)

    return (json.dumps(settings, indent=2, sort_keys=True, default=plain) + "\n").encode()


# -------------------------------------------------------------------------------------------------------------- images


def _check_images(processor: Any, steps: ImageSteps, settings: Mapping[str, Any], channels: int, folder: Path) -> None:
    name, compared = settings["image_processor_type"], 0
    last: InputError | None = None
    for what, item in _test_images(steps, channels, folder):
        expected, failure = _expected(processor, item)
        try:
            found = steps(read_image(item, channels, over_white=steps.over_white))
        except InputError as error:
            if expected is None:  # for example too large for its padding
                last = error
                continue
            raise ExportError(f"{name} takes {what}, edgeformer does not: {error} {_ADVICE}") from error
        compared += 1
        problem = failure or _difference(found, expected, steps)
        if problem:
            active = {key: value for key, value in settings.items() if value not in (None, False)}
            raise ExportError(
                f"{name} does not do what its settings say, so edgeformer cannot reproduce it: for {what} {problem}. "
                f"Settings: {', '.join(f'{key}={value!r}' for key, value in sorted(active.items()))}. {_ADVICE}"
            )
    if not compared:
        raise ExportError(f"{name} takes no test image: {last} {_ADVICE}")


def _test_images(steps: ImageSteps, channels: int, folder: Path) -> Iterator[tuple[str, Any]]:
    """(description, image) of sizes and modes that processors treat differently."""
    from PIL import Image

    rng = np.random.default_rng(0)
    edge = max(steps.fixed or (224, 224))
    sizes = ((edge // 2 + 3, edge // 3 + 5), (edge + 31, 2 * edge + 7), (3 * edge + 1, edge // 2 + 1), (edge, edge))
    for height, width in sizes:
        noise = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        image = Image.fromarray(noise if channels == 3 else noise[..., 0])
        yield f"an image of {width} x {height} pixels", image
    if channels != 3:
        return
    small = Image.fromarray(rng.integers(0, 256, (edge // 2 + 9, edge // 2 + 4, 4), dtype=np.uint8))  # RGBA
    palette = small.convert("RGB").quantize(16)
    palette.info["transparency"] = 3
    for kind in (small, small.convert("L"), small.convert("LA"), palette, small.convert("CMYK"), small.convert("1")):
        path = folder / f"odd.{'tiff' if kind.mode == 'CMYK' else 'png'}"
        kind.save(path)
        yield f"a file of mode {kind.mode}", str(path)
        if steps.over_white:  # other processors take RGB images only
            yield f"a Pillow image of mode {kind.mode}", kind


def _expected(processor: Any, item: Any) -> tuple[Array | None, str]:
    """(transformers' array [channels, height, width], "") or (None, the reason why there is none)."""
    try:
        with quiet():
            outputs = processor(images=item, return_tensors="np")
    except Exception as error:
        return None, f"it raises {type(error).__name__}: {str(error)[:200]}"
    if set(outputs) != {"pixel_values"}:
        return None, f"it gives {', '.join(outputs)}, expected pixel_values only"
    batch = np.asarray(outputs["pixel_values"])
    if batch.ndim != 4 or len(batch) != 1:
        return None, f"it gives an array {list(batch.shape)}, expected [1, channels, height, width]"
    return batch[0], ""


def _difference(found: Array, expected: Array | None, steps: ImageSteps) -> str:
    assert expected is not None
    if found.shape != expected.shape:
        return f"it gives {list(expected.shape)}, its settings {list(found.shape)}"
    # Both round to float32 after each of at most 4 operations, whose results are at most as large as these two.
    shift = 0.0 if steps.mean is None else float(np.max(np.abs(np.divide(steps.mean, steps.std))))
    bound = 4 * 2**-24 * (float(np.abs(expected).max()) + shift)
    worst = float(np.abs(found - expected).max())
    return "" if worst <= bound else f"its array differs by up to {worst:.2g} from what the settings give"


# --------------------------------------------------------------------------------------------------------------- audio


def _check_sound(extractor: Any, front: LogMel, settings: Mapping[str, Any], shape: Sequence[int | str]) -> None:
    # float32 transforms err by about log2(n) * 2**-24 of a frame's loudest bin: 6e-7. Features end 8 decades of power
    # below the loudest, 1e-4 of its amplitude; an error of 6e-3 there is 2 * log10(1 + 6e-3) / 4 = 1.3e-3.
    bound = 2e-3
    for what, samples in _test_sounds(front):
        found = front.features(samples)
        outputs, problem = {}, ""
        try:
            with quiet():
                outputs = extractor(samples, sampling_rate=front.sampling_rate, return_tensors="np")
            expected = np.asarray(next(iter(outputs.values())))[0]
        except Exception as error:
            problem = f"it raises {type(error).__name__}: {str(error)[:200]}"
        else:
            if expected.shape != found.shape:
                problem = f"it gives {list(expected.shape)}, its settings {list(found.shape)}"
            elif (worst := float(np.abs(found - expected).max())) > bound:
                problem = f"its features differ by up to {worst:.2g} from what the settings give"
            elif list(found.shape) != list(shape):
                problem = f"it gives {list(found.shape)}, the model takes {list(shape)}"
        if problem:
            listed = ", ".join(f"{name}={value!r}" for name, value in sorted(settings.items()))
            raise ExportError(
                f"{type(extractor).__name__} does not do what its settings say, so edgeformer cannot reproduce it: for "
                f"{what} {problem}. Settings: {listed}. {_ADVICE}"
            )


def _test_sounds(front: LogMel) -> Iterator[tuple[str, Array]]:
    rng = np.random.default_rng(0)
    for what, seconds in (("short audio", 0.4), ("long audio", 1.1)):  # in windows
        count = int(front.samples * seconds)
        time = np.arange(count) / front.sampling_rate
        chirp = 0.5 * np.sin(2 * np.pi * (100 + 0.2 * front.sampling_rate * time / time[-1]) * time)
        yield what, (chirp + 0.05 * rng.standard_normal(count)).astype(np.float32)
    yield "silence", np.zeros(front.samples // 3, np.float32)
