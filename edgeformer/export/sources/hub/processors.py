"""How pictures and sound become arrays: transformers' own processor is asked, and the runtime must give its numbers.

A folder's preprocessor_config.json (or the part of processor_config.json) leaves out what its class has as default. The
bundle's has every setting, and is written only when the runtime's steps give the processor's numbers on odd pictures
and sounds. So nobody keeps a list of processor classes.
"""

from __future__ import annotations

import contextlib
import json
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgeformer.bundle.signature import Array
from edgeformer.errors import ExportError, InputError, first_line
from edgeformer.export.quiet import quiet
from edgeformer.export.sources.model_files import ReadFile
from edgeformer.processing.audio import LogMel
from edgeformer.processing.image import FILE, SWITCHES, Steps
from edgeformer.processing.image_file import read as read_image

NESTED = "processor_config.json"
_BILINEAR = 2  # what transformers takes where no filter is named
_AS_IT_IS = (
    f"Without {FILE} and {NESTED} in its folder the model is exported alone, and its bundle takes arrays made by "
    "transformers' processor."
)


def image_settings(read: ReadFile, channels: int) -> dict[str, bytes]:
    """{preprocessor_config.json: every setting of the folder's image processor}; empty where it has none.

    Raises:
        ExportError: the processor cannot be loaded, asks for what the runtime does not compute, or does something that
            its settings do not say.
    """
    with _folder(read, "image_processor") as folder:
        if folder is None:
            return {}
        processor = _loaded("AutoImageProcessor", folder, backend="pil")
        settings = _image_settings(processor)
        try:
            steps = Steps.of(settings)
        except InputError as error:
            raise ExportError(f"{settings['image_processor_type']}: {error} {_AS_IT_IS}") from error
        _prove_images(processor, steps, settings, channels, folder)
    return {FILE: _json(settings)}


def sound_settings(read: ReadFile) -> dict[str, bytes]:
    """{preprocessor_config.json: every setting of the folder's feature extractor}; empty where it has none.

    Raises:
        ExportError: the feature extractor cannot be loaded.
    """
    with _folder(read, "feature_extractor") as folder:
        return {} if folder is None else {FILE: _json(_sound_settings(_loaded("AutoFeatureExtractor", folder)))}


def log_mel_settings(read: ReadFile, shape: Sequence[int | str]) -> dict[str, bytes]:
    """`sound_settings` of a model that the runtime gives sound to, as log-mel features [bins, frames] of `shape`.

    Raises:
        ExportError: the features are not those that the runtime computes.
    """
    with _folder(read, "feature_extractor") as folder:
        if folder is None:
            return {}
        extractor = _loaded("AutoFeatureExtractor", folder)
        settings = _sound_settings(extractor)
        try:
            front = LogMel.of(settings)
        except InputError as error:
            raise ExportError(f"{type(extractor).__name__}: {error} {_AS_IT_IS}") from error
        _prove_sound(extractor, front, settings, shape)
    return {FILE: _json(settings)}


# ------------------------------------------------------------------------------------------------------------- loading


@contextlib.contextmanager
def _folder(read: ReadFile, part: str) -> Iterator[Path | None]:
    """A folder with what says how the model's inputs are made; None where nothing does."""
    plain, nested = read(FILE), read(NESTED)
    if plain is None and (nested is None or part not in json.loads(nested)):
        yield None
        return
    with tempfile.TemporaryDirectory() as place:
        for name, content in ((FILE, plain), (NESTED, nested), ("config.json", read("config.json"))):
            if content is not None:
                (Path(place) / name).write_bytes(content)
        yield Path(place)


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
            f"{first_line(error)[:300].replace(str(folder), 'the folder')} {_AS_IT_IS}"
        ) from error


def _texts(folder: Path) -> str:
    return " ".join(path.read_text(encoding="utf-8") for path in folder.glob("*.json") if path.name != "config.json")


def _image_settings(processor: Any) -> dict[str, Any]:
    """What the processor goes by. Settings that its class does not know it carries along and never reads; should one
    do it all the same, the comparison shows it.
    """
    known = getattr(processor, "_valid_kwargs_names", None)
    found = json.loads(_json(processor.to_dict()))
    settings = {name: value for name, value in found.items() if known is None or name in known}
    settings |= {name: bool(getattr(processor, name, False)) for name in SWITCHES}
    settings["resample"] = settings.get("resample", _BILINEAR)
    return settings | {"image_processor_type": found.get("image_processor_type", type(processor).__name__)}


def _sound_settings(extractor: Any) -> dict[str, Any]:
    found = json.loads(_json(extractor.to_dict()))
    with contextlib.suppress(Exception), quiet():  # one that cannot be made without arguments keeps all it was given
        known = set(type(extractor)().to_dict())
        return {name: value for name, value in found.items() if name in known}
    return dict(found)


def _json(settings: Mapping[str, Any]) -> bytes:
    def plain(value: Any) -> Any:
        return value.tolist() if isinstance(value, np.ndarray) else getattr(value, "value", None) or dict(value)

    return (json.dumps(settings, indent=2, sort_keys=True, default=plain) + "\n").encode()


# ------------------------------------------------------------------------------------------------------------ pictures


def _prove_images(processor: Any, steps: Steps, settings: Mapping[str, Any], channels: int, folder: Path) -> None:
    name, compared = settings["image_processor_type"], 0
    last: InputError | None = None
    for what, item in _odd_pictures(steps, channels, folder):
        expected, failure = _expected(processor, item)
        try:
            found = steps(read_image(item, channels, over_white=steps.over_white))
        except InputError as error:
            if expected is None:  # too large for its padding, say
                last = error
                continue
            raise ExportError(f"{name} takes {what}, edgeformer does not: {error} {_AS_IT_IS}") from error
        compared += 1
        problem = failure or _difference(found, expected, steps)
        if problem:
            asked = {key: value for key, value in settings.items() if value not in (None, False)}
            raise ExportError(
                f"{name} does not do what its settings say, so edgeformer cannot follow it: for {what} {problem}. "
                f"Settings: {', '.join(f'{key}={value!r}' for key, value in sorted(asked.items()))}. {_AS_IT_IS}"
            )
    if not compared:
        raise ExportError(f"{name} takes no picture at all: {last} {_AS_IT_IS}")


def _odd_pictures(steps: Steps, channels: int, folder: Path) -> Iterator[tuple[str, Any]]:
    """(words, picture) of shapes and kinds that processors treat differently."""
    from PIL import Image

    rng = np.random.default_rng(0)
    edge = max(steps.fixed or (224, 224))
    sizes = ((edge // 2 + 3, edge // 3 + 5), (edge + 31, 2 * edge + 7), (3 * edge + 1, edge // 2 + 1), (edge, edge))
    for height, width in sizes:
        noise = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        image = Image.fromarray(noise if channels == 3 else noise[..., 0])
        yield f"a picture of {width} x {height} pixels", image
    if channels != 3:
        return
    small = Image.fromarray(rng.integers(0, 256, (edge // 2 + 9, edge // 2 + 4, 4), dtype=np.uint8))  # RGBA
    palette = small.convert("RGB").quantize(16)
    palette.info["transparency"] = 3
    for kind in (small, small.convert("L"), small.convert("LA"), palette, small.convert("CMYK"), small.convert("1")):
        path = folder / f"odd.{'tiff' if kind.mode == 'CMYK' else 'png'}"
        kind.save(path)
        yield f"a file of mode {kind.mode}", str(path)
        if steps.over_white:  # without it processors take RGB images alone
            yield f"a Pillow image of mode {kind.mode}", kind


def _expected(processor: Any, item: Any) -> tuple[Array | None, str]:
    """(transformers' array [channels, height, width], "") or (None, why there is none)."""
    try:
        with quiet():
            outputs = processor(images=item, return_tensors="np")
    except Exception as error:
        return None, f"it raises {type(error).__name__}: {str(error)[:200]}"
    if set(outputs) != {"pixel_values"}:
        return None, f"it gives {', '.join(outputs)}, expected pixel_values alone"
    batch = np.asarray(outputs["pixel_values"])
    if batch.ndim != 4 or len(batch) != 1:
        return None, f"it gives an array {list(batch.shape)}, expected [1, channels, height, width]"
    return batch[0], ""


def _difference(found: Array, expected: Array | None, steps: Steps) -> str:
    assert expected is not None
    if found.shape != expected.shape:
        return f"it gives {list(expected.shape)}, its settings {list(found.shape)}"
    # Both round to float32 after each of at most 4 operations, whose results are at most as large as these two.
    shift = 0.0 if steps.mean is None else float(np.max(np.abs(np.divide(steps.mean, steps.std))))
    bound = 4 * 2**-24 * (float(np.abs(expected).max()) + shift)
    worst = float(np.abs(found - expected).max())
    return "" if worst <= bound else f"its array differs by up to {worst:.2g} from what the settings give"


# --------------------------------------------------------------------------------------------------------------- sound


def _prove_sound(extractor: Any, front: LogMel, settings: Mapping[str, Any], shape: Sequence[int | str]) -> None:
    # float32 transforms err by about log2(n) * 2**-24 of a frame's loudest bin: 6e-7. Features end 8 decades of power
    # below the loudest, 1e-4 of its amplitude; an error of 6e-3 there is 2 * log10(1 + 6e-3) / 4 = 1.3e-3.
    bound = 2e-3
    for what, samples in _odd_sounds(front):
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
                f"{type(extractor).__name__} does not do what its settings say, so edgeformer cannot follow it: for "
                f"{what} {problem}. Settings: {listed}. {_AS_IT_IS}"
            )


def _odd_sounds(front: LogMel) -> Iterator[tuple[str, Array]]:
    rng = np.random.default_rng(0)
    for what, seconds in (("a short sound", 0.4), ("a long sound", 1.1)):  # in windows
        count = int(front.samples * seconds)
        time = np.arange(count) / front.sampling_rate
        chirp = 0.5 * np.sin(2 * np.pi * (100 + 0.2 * front.sampling_rate * time / time[-1]) * time)
        yield what, (chirp + 0.05 * rng.standard_normal(count)).astype(np.float32)
    yield "silence", np.zeros(front.samples // 3, np.float32)
