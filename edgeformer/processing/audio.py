"""Audio as arrays: reading recordings, resampling, and the log-mel features of speech models."""

from __future__ import annotations

import os
import wave
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, BinaryIO, Literal

import numpy as np

from edgeformer.bundle.signature import F32, Array
from edgeformer.errors import InputError, pip_install

_PIPED = 0x7FFF_0000  # bytes
MOST_RATE = 96_000  # samples a second of all channels together, where the length is limited: 48 kHz, stereo


@dataclass(frozen=True)
class Recording:
    """A recording that is read: a path, or an open binary file that can seek, with the name for messages."""

    source: str | os.PathLike[str] | BinaryIO
    name: str

    @contextmanager
    def opened(self) -> Iterator[BinaryIO]:
        """The file at its beginning."""
        if isinstance(self.source, (str, os.PathLike)):
            with open(self.source, "rb") as file:
                yield file
        else:
            self.source.seek(0)
            yield self.source

    @property
    def readable(self) -> Any:
        """What the readers take: the path, or the file at its beginning."""
        if isinstance(self.source, (str, os.PathLike)):
            return os.fspath(self.source)
        self.source.seek(0)
        return self.source


def read_wav(
    source: str | os.PathLike[str] | BinaryIO, rate: int, *, name: str | None = None, most_seconds: float | None = None
) -> F32:
    """The samples of a recording, mixed to one channel, in [-1, 1], at `rate` samples a second.

    With soundfile installed it reads the formats of libsndfile: WAV (PCM, float, mu-law, extensible), FLAC, MP3, OGG
    and more; without it, PCM WAV only. `source` is a path, or a binary file that can seek; `name` is what messages
    call it. Compressed silence is short: with `most_seconds` no more is decoded than so much sound.

    Raises:
        InputError: the file is missing, of an unknown format, truncated, empty, longer than `most_seconds`, or has NaN
            or infinite samples.
    """
    file = Recording(source, name or str(source))
    _complete(file)
    samples, found = _by_soundfile(file, most_seconds) or _by_wave(file)
    if not len(samples):
        raise InputError(f"{file.name} holds no samples.")
    _check_length(file, len(samples), found, most_seconds)
    mono: F32 = samples.mean(1, dtype=np.float32)
    if not np.isfinite(mono).all():
        raise InputError(f"{file.name} holds samples that are no numbers (NaN or infinity).")
    try:
        return resample(mono, found, rate)
    except InputError as error:
        raise InputError(f"{file.name}: {error}") from error


def _check_length(recording: Recording, count: int, rate: int, most_seconds: float | None) -> None:
    """
    Raises:
        InputError: `count` samples are more than `most_seconds`.
    """
    if most_seconds is not None and count > most_seconds * rate:
        raise InputError(
            f"{recording.name} has {count / rate:,.0f} s of sound, the limit is {most_seconds:,.0f} s; cut it into "
            "parts."
        )


def _by_soundfile(recording: Recording, most_seconds: float | None) -> tuple[F32, int] | None:
    """(samples [count, channels], their rate); None where soundfile is not installed."""
    try:
        import soundfile
    except (ImportError, OSError):  # OSError: libsndfile is missing
        return None
    try:
        with soundfile.SoundFile(recording.readable) as file:
            rate, expected = file.samplerate, file.frames
            if most_seconds is not None:
                _check_length(recording, expected, rate, most_seconds)
                # Few seconds may still be many numbers: eight channels of 655 kHz.
                _check_length(recording, expected * file.channels, MOST_RATE, most_seconds)
            samples = file.read(dtype="float32", always_2d=True)
            streamed = file.format in ("WAV", "WAVEX", "AU")  # written to a pipe, these have no valid length
    except (OSError, RuntimeError, TypeError, ValueError) as error:  # libsndfile's errors are RuntimeErrors
        if isinstance(error, InputError):
            raise
        raise InputError(f"{recording.name} cannot be read as a recording: {error}") from error
    if len(samples) < expected and not streamed:
        raise InputError(
            f"{recording.name} is cut short: it has {len(samples):,} of {expected:,} samples; copy it again."
        )
    return samples, rate


def _by_wave(recording: Recording) -> tuple[F32, int]:
    """(samples [count, channels], their rate) of PCM WAV by Python's own reader."""
    name = recording.name
    try:
        with wave.open(recording.readable, "rb") as file:
            width, channels, rate = file.getsampwidth(), file.getnchannels(), file.getframerate()
            data = file.readframes(file.getnframes())
    except (OSError, EOFError, ValueError, wave.Error) as error:
        raise InputError(
            f"{name} cannot be read as a PCM WAV file: {error or 'it ends too early'}. FLAC, MP3, OGG and other forms "
            f"of WAV (float, extensible, mu-law) need soundfile: {pip_install('soundfile')}"
        ) from error
    if width not in (1, 2, 3, 4):
        raise InputError(
            f"{name} has samples of {width} bytes, expected 1 to 4; for others: {pip_install('soundfile')}"
        )
    data = data[: len(data) // (width * channels) * width * channels]  # the header of piped data may give a larger size
    samples: F32
    if width == 1:  # 8-bit samples are unsigned, all others signed
        samples = np.frombuffer(data, np.uint8).astype(np.float32) / np.float32(128) - np.float32(1)
    elif width == 3:
        parts = np.frombuffer(data, np.uint8).reshape(-1, 3).astype(np.int32)
        samples = ((parts[:, 0] << 8 | parts[:, 1] << 16 | parts[:, 2] << 24) / 2**31).astype(np.float32)
    else:
        samples = np.frombuffer(data, {2: "<i2", 4: "<i4"}[width]).astype(np.float32)
        samples /= np.float32(2 ** (8 * width - 1))
    return samples.reshape(-1, channels), rate


def _complete(recording: Recording) -> None:
    """Checks that a WAV file is not truncated: the readers take a truncated file as a shorter recording.

    Raises:
        InputError: the data chunk goes past the end of the file, or there is none.
    """
    path = recording.source
    # A pipe can be read only once; a missing file is the readers' error.
    if isinstance(path, (str, os.PathLike)) and not os.path.isfile(path):
        return
    try:
        with recording.opened() as file:
            _check_chunks(recording.name, file)
    except OSError as error:
        raise InputError(f"{recording.name} cannot be read: {error}.") from error


def _check_chunks(name: str, file: BinaryIO) -> None:
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    head = file.read(12)
    if head[:4] not in (b"RIFF", b"RIFX", b"RF64") or head[8:12] != b"WAVE":
        return
    order: Literal["little", "big"] = "big" if head[:4] == b"RIFX" else "little"
    long = 0  # size of the data in an RF64 file
    while len(chunk := file.read(8)) == 8:
        length = int.from_bytes(chunk[4:], order)
        if chunk[:4] == b"ds64":  # https://tech.ebu.ch/docs/tech/tech3306.pdf: bytes of the file, of the data
            sizes = file.read(length)
            long = int.from_bytes(sizes[8:16], order)
            continue
        if chunk[:4] == b"data":
            present = size - file.tell()
            length = long or length
            # A program that writes to a pipe does not know the length and writes about 2 or 4 GiB.
            if length > present and (long or length < _PIPED):
                raise InputError(
                    f"{name} is cut short: it holds {present:,} bytes of samples, its header says {length:,}; "
                    "copy it again."
                )
            return
        file.seek(length + length % 2, os.SEEK_CUR)
    raise InputError(f"{name} is cut short: it is a WAV file of {size:,} bytes without samples; copy it again.")


def resample(samples: F32, rate: int, wanted: int) -> F32:
    """`samples` of `rate` a second, resampled to `wanted` a second by soxr.

    Raises:
        InputError: the rates differ and soxr is not installed.
    """
    if rate == wanted or not len(samples):
        return samples
    try:
        import soxr
    except ImportError:
        raise InputError(
            f"the recording has {rate:,} samples a second, the model takes {wanted:,}, and changing the rate needs "
            f"soxr: {pip_install('soxr')}"
        ) from None
    changed: F32 = soxr.resample(samples, rate, wanted, quality="HQ").astype(np.float32, copy=False)
    return changed


# Settings that do not change the features: names, an attention mask that no graph takes, a normalization that is only
# an argument of the call. DERIVED ones follow from other settings.
IRRELEVANT = ("feature_extractor_type", "processor_class", "auto_map", "return_attention_mask", "do_normalize")
DERIVED = ("n_samples", "nb_max_frames", "mel_filters")


@dataclass(frozen=True)
class LogMel:
    """Settings of a log-mel front end, named as in preprocessor_config.json."""

    feature_size: int  # mel bins
    sampling_rate: int
    hop_length: int
    n_fft: int
    chunk_length: float  # seconds of a window; shorter ones are padded, longer ones cut
    padding_value: float = 0.0
    padding_side: str = "right"

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> LogMel:
        """The front end of a preprocessor_config.json.

        Raises:
            InputError: a setting is missing, unknown, or has an unknown value.
        """
        given = {
            name: value for name, value in settings.items() if value is not None and name not in IRRELEVANT + DERIVED
        }
        if given.pop("dither", 0.0) != 0.0:
            raise InputError(f"preprocessor_config.json asks for dither={settings['dither']}: random noise.")
        unknown = sorted(set(given) - set(cls.__dataclass_fields__))
        if unknown:
            listed = ", ".join(f"{name}={given[name]!r}" for name in unknown)
            raise InputError(f"preprocessor_config.json asks for {listed[:400]}, which edgeformer does not compute.")
        missing = [name for name in list(cls.__dataclass_fields__)[:5] if name not in given]
        if missing:
            raise InputError(
                f"preprocessor_config.json does not say {', '.join(missing)}, which log-mel features need; export an "
                "old bundle again."
            )
        if given.get("padding_side", "right") not in ("left", "right"):
            raise InputError(f"preprocessor_config.json gives padding_side as {given['padding_side']!r}.")
        return cls(**given)

    @property
    def samples(self) -> int:
        """Samples of one window."""
        return int(self.chunk_length * self.sampling_rate)

    def features(self, samples: Array) -> F32:
        """float32 [feature_size, samples / hop_length] of one window, padded or cut.

        Power spectrum over a Hann window, mel filters, log10 with a floor 8 below the loudest, scaled to about
        [-1, 1]: Radford et al. 2022, https://arxiv.org/abs/2212.04356, section 2.2.
        """
        cut = np.asarray(samples, np.float64)[: self.samples]
        room = self.samples - len(cut)
        sides = (0, room) if self.padding_side == "right" else (room, 0)
        wave = np.pad(cut, sides, constant_values=self.padding_value)
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
    """[count, bins]: triangles of equal area, equally spaced on the Slaney mel scale from 0 to 8 kHz."""
    edges = _hertz(np.linspace(0.0, _mel(8000.0), count + 2))
    places = np.linspace(0, rate / 2, bins)
    rise = (places[None] - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    fall = (edges[2:, None] - places[None]) / (edges[2:] - edges[1:-1])[:, None]
    area = (2.0 / (edges[2:] - edges[:-2]))[:, None]
    filters: Array = np.maximum(0.0, np.minimum(rise, fall)) * area
    return filters


_LINEAR = 200.0 / 3  # hertz for each mel below 1 kHz
_STEP = np.log(6.4) / 27.0  # logarithm of the ratio of two mels above 1 kHz


def _mel(hertz: float) -> float:
    return hertz / _LINEAR if hertz < 1000 else 15.0 + float(np.log(hertz / 1000.0)) / _STEP


def _hertz(mel: Array) -> Array:
    high: Array = np.where(mel < 15, mel * _LINEAR, 1000.0 * np.exp(_STEP * (mel - 15.0)))
    return high
