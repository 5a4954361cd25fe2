"""Sound as arrays: reading WAV files, changing the rate, and the log-mel features of speech models, in numpy."""

from __future__ import annotations

import os
import wave
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from edgeformer.errors import InputError

Array = np.ndarray[Any, Any]
F32 = np.ndarray[Any, np.dtype[np.float32]]


def read_wav(path: str | os.PathLike[str], rate: int) -> F32:
    """The samples of a PCM WAV file, mixed to one channel, in [-1, 1], at `rate` samples a second.

    Raises:
        InputError: it is no WAV file, or is compressed.
    """
    try:
        with wave.open(os.fspath(path), "rb") as file:
            width, channels, found = file.getsampwidth(), file.getnchannels(), file.getframerate()
            data = file.readframes(file.getnframes())
    except (OSError, EOFError, wave.Error) as error:
        raise InputError(f"{path} cannot be read as a PCM WAV file: {error}.") from error
    data = data[: len(data) // (width * channels) * width * channels]  # a pipe's header may promise more than there is
    if width == 1:
        samples = np.frombuffer(data, np.uint8).astype(np.float32) / 128 - 1
    elif width == 3:
        parts = np.frombuffer(data, np.uint8).reshape(-1, 3).astype(np.int32)
        samples = ((parts[:, 0] << 8 | parts[:, 1] << 16 | parts[:, 2] << 24) / 2**31).astype(np.float32)
    else:
        samples = np.frombuffer(data, {2: "<i2", 4: "<i4"}[width]).astype(np.float32) / 2 ** (8 * width - 1)
    mono = samples.reshape(-1, channels).mean(1, dtype=np.float32)
    return resample(mono, found, rate)


def resample(samples: F32, rate: int, wanted: int, taps: int = 32) -> F32:
    """`samples` of `rate` a second at `wanted` a second: a windowed sinc, with nothing above half the lower rate.

    https://ccrma.stanford.edu/~jos/resample/
    """
    if rate == wanted or not len(samples):
        return samples
    count = int(np.ceil(len(samples) * wanted / rate))
    cutoff = min(1.0, wanted / rate)
    half = int(np.ceil(taps / cutoff))
    padded = np.pad(samples.astype(np.float64), (half, half + 1))
    out = np.empty(count, np.float32)
    offsets = np.arange(-half + 1, half + 1)
    for start in range(0, count, 1 << 14):  # bounds the memory
        places = np.arange(start, min(start + (1 << 14), count)) * (rate / wanted)
        whole = places.astype(np.int64)
        distance = offsets[None] - (places - whole)[:, None]  # (outputs, taps)
        window = np.where(np.abs(distance) < half, np.cos(distance * (np.pi / 2 / half)) ** 2, 0.0)
        weights = cutoff * np.sinc(cutoff * distance) * window
        out[start : start + len(places)] = (padded[whole[:, None] + offsets[None] + half] * weights).sum(1)
    return out


@dataclass(frozen=True)
class LogMel:
    """Settings of a log-mel front end, named as in preprocessor_config.json."""

    feature_size: int = 80  # mel bins
    sampling_rate: int = 16000
    hop_length: int = 160
    n_fft: int = 400
    chunk_length: float = 30  # seconds that a window is padded or cut to

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> LogMel:
        known = {name: settings[name] for name in cls.__dataclass_fields__ if settings.get(name) is not None}
        return cls(**known)

    @property
    def samples(self) -> int:
        """Samples of one window."""
        return int(self.chunk_length * self.sampling_rate)

    def features(self, samples: Array) -> F32:
        """float32 [feature_size, samples / hop_length] of one window, padded with silence or cut.

        Power spectrum over a Hann window, mel filters, log10 with a floor 8 below the loudest, scaled to about
        [-1, 1]: Radford et al. 2022, https://arxiv.org/abs/2212.04356, section 2.2.
        """
        wave = np.zeros(self.samples)
        cut = np.asarray(samples, np.float64)[: self.samples]
        wave[: len(cut)] = cut
        half = self.n_fft // 2
        padded = np.pad(wave, half, mode="reflect")
        window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(self.n_fft) / self.n_fft)  # periodic
        frames = np.lib.stride_tricks.sliding_window_view(padded, self.n_fft)[:: self.hop_length]
        power = np.abs(np.fft.rfft(frames * window, axis=-1)) ** 2  # (frames, n_fft / 2 + 1)
        mel = _filters(self.n_fft // 2 + 1, self.feature_size, self.sampling_rate) @ power[:-1].T
        log = np.log10(np.maximum(mel, 1e-10))
        scaled: F32 = ((np.maximum(log, log.max() - 8.0) + 4.0) / 4.0).astype(np.float32)
        return scaled


@lru_cache(maxsize=4)
def _filters(bins: int, count: int, rate: int) -> Array:
    """[count, bins]: triangles of equal area, equally spaced on the Slaney mel scale from 0 to half the rate."""
    edges = _hertz(np.linspace(0.0, _mel(min(rate / 2, 8000.0)), count + 2))
    places = np.linspace(0, rate / 2, bins)
    rise = (places[None] - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    fall = (edges[2:, None] - places[None]) / (edges[2:] - edges[1:-1])[:, None]
    area = (2.0 / (edges[2:] - edges[:-2]))[:, None]
    filters: Array = np.maximum(0.0, np.minimum(rise, fall)) * area
    return filters


_LINEAR = 200.0 / 3  # hertz a mel below 1 kHz
_STEP = np.log(6.4) / 27.0  # and above, logarithmic


def _mel(hertz: float) -> float:
    return hertz / _LINEAR if hertz < 1000 else 15.0 + float(np.log(hertz / 1000.0)) / _STEP


def _hertz(mel: Array) -> Array:
    high: Array = np.where(mel < 15, mel * _LINEAR, 1000.0 * np.exp(_STEP * (mel - 15.0)))
    return high
