"""Settings of feature extractors, and forms of audio files."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from bench.sources.row import Row
from edgeformer.errors import ExportError, InputError
from edgeformer.export.sources.hub.processors import log_mel_settings
from edgeformer.processing.audio import DERIVED, IRRELEVANT, LogMel, read_wav
from edgeformer.processing.image import FILE

TITLE = "Sound"
ABOUT = (
    "Every argument and attribute of WhisperFeatureExtractor, whose features the runtime computes, then the "
    "feature extractors of other audio models (their bundles take arrays), then forms of audio files. The "
    "references are transformers' own extractor, and samples that were known before they were written."
)
TESTS = "tests/processing/test_audio.py"
RATE = 16000
BASE = {"feature_extractor_type": "WhisperFeatureExtractor", "feature_size": 40, "chunk_length": 2}
VALUES: dict[str, Any] = {
    "feature_size": 80,
    "sampling_rate": 8000,
    "hop_length": 200,
    "chunk_length": 1,
    "n_fft": 512,
    "padding_value": 0.25,
    "padding_side": "left",
    "dither": 0.1,
    "return_attention_mask": True,
    "do_normalize": True,
    "n_samples": 7,
    "nb_max_frames": 7,
}
# The quantization step of a format for values in [-1, 1]; None: lossy, the tone must be right to 5 %.
FORMS: dict[str, tuple[str, str, float | None]] = {
    **{f"WAV {kind}": ("WAV", kind, step) for kind, step in (("PCM_U8", 2**-7), ("PCM_16", 2**-15))},
    **{f"WAV {kind}": ("WAV", kind, 2**-23) for kind in ("PCM_24", "PCM_32", "FLOAT", "DOUBLE")},
    **{f"WAV {kind}": ("WAV", kind, 2**-5) for kind in ("ULAW", "ALAW")},
    "WAV extensible PCM_24": ("WAVEX", "PCM_24", 2**-23),
    "WAV extensible FLOAT": ("WAVEX", "FLOAT", 2**-23),
    "RF64 PCM_16": ("RF64", "PCM_16", 2**-15),
    "FLAC PCM_16": ("FLAC", "PCM_16", 2**-15),
    "FLAC PCM_24": ("FLAC", "PCM_24", 2**-23),
    "OGG VORBIS": ("OGG", "VORBIS", None),
    "OGG OPUS": ("OGG", "OPUS", None),
    "MP3": ("MP3", "MPEG_LAYER_III", None),
}
OTHERS = {
    **{f"at {rate} Hz": ("FLOAT", rate) for rate in (8000, 22050, 44100, 48000)},
    "cut short": ("PCM_16", RATE),
    "without samples": ("PCM_16", RATE),
    "with NaN": ("FLOAT", RATE),
}


def settings() -> list[str]:
    """Names of settings, then `extractor NAME`, then formats and defects of files."""
    import transformers

    kind = transformers.WhisperFeatureExtractor
    own = {
        *kind().to_dict(),
        *_arguments(kind),
        "do_normalize",
    }  # the last is an argument of its call, not of its constructor
    forms = [f"a file of {name}" for name in FORMS] + [f"a file {name}" for name in OTHERS]
    return [*sorted(own - {"feature_extractor_type"}), *(f"extractor {name}" for name in extractors()), *forms]


def extractors() -> list[str]:
    """The other feature extractors of transformers."""
    from transformers.models.auto.feature_extraction_auto import FEATURE_EXTRACTOR_MAPPING_NAMES as KNOWN

    return sorted({name for name in KNOWN.values() if name != "WhisperFeatureExtractor"})


def _arguments(kind: Any) -> set[str]:
    found = {name for base in kind.__mro__[:-1] if "__init__" in vars(base) for name in _names(vars(base)["__init__"])}
    return found - {"self", "kwargs"}


def _names(maker: Any) -> list[str]:
    return list(inspect.signature(maker).parameters)


def rows(work: Path) -> Iterator[Row]:
    """See `bench.sources.row.Sweep`."""
    for setting in settings():
        if setting.startswith("extractor "):
            yield _extractor_row(setting)
        elif setting.startswith("a file of "):
            yield _form_row(setting, *FORMS[setting.removeprefix("a file of ")], work)
        elif setting.startswith("a file "):
            yield _trouble_row(setting, *OTHERS[setting.removeprefix("a file ")], work)
        else:
            yield _row(setting)


def _settings(given: Any, shape: Any) -> Any:
    content = json.dumps(given).encode()
    return json.loads(log_mel_settings(lambda file: content if file == FILE else None, shape)[FILE])


def _short(message: str) -> str:
    """The error message without the advice."""
    reason = message.partition(" Without ")[0]
    return reason if len(reason) <= 160 else f"{reason[:157]}..."


def _row(setting: str) -> Row:
    import transformers

    given, reference = BASE | {setting: VALUES[setting]}, "WhisperFeatureExtractor"
    shown = f"{setting}={VALUES[setting]!r}"
    before, after = (transformers.WhisperFeatureExtractor(**settings) for settings in (BASE, given))
    try:
        front = LogMel.of(_settings(given, (after.feature_size, after.nb_max_frames)))
    except ExportError as error:
        return Row(setting, "refused", f"{shown}: {_short(str(error))}", reference)
    samples = (np.random.default_rng(0).standard_normal(9000) * 0.1).astype(np.float32)
    expected, plain = (
        kind(samples, sampling_rate=kind.sampling_rate, return_tensors="np")["input_features"][0]
        for kind in (after, before)
    )
    found = front.features(samples)
    off = float(np.abs(found - expected).max()) if found.shape == expected.shape else float("inf")
    if off > 2e-3:  # float32 transforms: see `processors._check_sound`
        return Row(setting, "ignored", f"{shown}: off by {off:.2g}", reference)
    if expected.shape != plain.shape or np.abs(expected - plain).max() > 2e-3:
        return Row(setting, "honoured", f"{shown}: off by {off:.1g}", reference)
    known = "transformers computes it from the others" if setting in DERIVED else "the features stay the same"
    assert setting in IRRELEVANT + DERIVED, setting
    return Row(setting, "irrelevant", f"{shown}: {known}", reference)


def _extractor_row(setting: str) -> Row:
    try:
        _settings({"feature_extractor_type": setting.removeprefix("extractor ")}, (80, 3000))
    except ExportError as error:
        return Row(
            setting, "refused", f"where sound is to be transcribed: {_short(str(error))}", "AutoFeatureExtractor"
        )
    return Row(setting, "honoured", "its features are those of its settings", "AutoFeatureExtractor")


def _form_row(setting: str, container: str, subtype: str, step: float | None, work: Path) -> Row:
    import soundfile

    tone = (0.7 * np.sin(2 * np.pi * 440 * np.arange(RATE) / RATE)).astype(np.float32)
    soundfile.write(work / "sound", np.stack([tone, tone], 1), RATE, subtype=subtype, format=container)
    found = read_wav(work / "sound", RATE)
    if step is not None:
        off = float(np.abs(found - tone).max()) if found.shape == tone.shape else float("inf")
        outcome, bound = ("honoured" if off <= step + 2**-22 else "ignored"), f"{step:.2g}"
        return Row(setting, outcome, f"off by {off:.2g}, its step is {bound}", "the tone")  # type: ignore[arg-type]
    inner = found[4000:12000].astype(np.float64)
    basis = np.exp(2j * np.pi * 440 * np.arange(len(inner)) / RATE)
    wanted = 2 * np.real(np.mean(inner * basis.conj()) * basis)
    off = float(np.sqrt(np.mean((inner - wanted) ** 2) / np.mean(tone**2))) + abs(float(np.abs(wanted).max()) / 0.7 - 1)
    return Row(setting, "honoured" if off < 0.05 else "ignored", f"off by {off:.2g} of the tone (lossy)", "the tone")


def _trouble_row(setting: str, subtype: str, rate: int, work: Path) -> Row:
    import soundfile

    tone = (0.5 * np.sin(2 * np.pi * 440 * np.arange(rate) / rate)).astype(np.float32)
    if "NaN" in setting:
        tone[5] = np.nan
    path = work / "sound.wav"
    soundfile.write(path, tone[:0] if "without" in setting else tone, rate, subtype=subtype)
    if "cut" in setting:
        path.write_bytes(path.read_bytes()[:2000])
    try:
        found = read_wav(path, RATE)
    except InputError as error:
        return Row(setting, "refused", str(error).replace(f"{work}/", ""), "the tone")
    expected = 0.5 * np.sin(2 * np.pi * 440 * np.arange(len(found)) / RATE)
    off = float(np.abs(found - expected)[400:-400].max())
    return Row(setting, "honoured" if off < 1e-4 else "ignored", f"off by {off:.1g}", "the tone")
