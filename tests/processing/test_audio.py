"""Recordings in every form that recorders write are read right or refused; features are those of transformers."""

from __future__ import annotations

import builtins
import json
import struct

import numpy as np
import pytest
import scipy.io.wavfile
import scipy.signal
import soundfile
import transformers as tf

from bench.sources import sound as sweep
from edgeformer.errors import ExportError, InputError
from edgeformer.export.sources.hub.processors import log_mel_settings, sound_settings
from edgeformer.processing.audio import LogMel, read_wav, resample

RATE = 16000
TONE = (0.7 * np.sin(2 * np.pi * 440 * np.arange(4000) / RATE)).astype(np.float32)
PCM = {1: "PCM_U8", 2: "PCM_16", 3: "PCM_24", 4: "PCM_32"}
GUID = bytes.fromhex("000000001000800000aa00389b71")


@pytest.fixture
def without(monkeypatch):
    """`without("soxr")`: as if that package were not installed."""

    def hide(*names):
        real = builtins.__import__

        def find(name, *rest):
            if name in names:
                raise ImportError(name)
            return real(name, *rest)

        monkeypatch.setattr(builtins, "__import__", find)

    return hide


def chunk(name, data):
    return name + struct.pack("<I", len(data)) + data + b"\0" * (len(data) % 2)


def riff(*chunks):
    body = b"WAVE" + b"".join(chunks)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def fmt(tag, bits, channels=1):
    width = channels * bits // 8
    return chunk(b"fmt ", struct.pack("<HHIIHH", tag, channels, RATE, RATE * width, width, bits))


def coded(samples, width):
    """Little-endian PCM bytes of samples in [-1, 1)."""
    top = 2 ** (8 * width - 1)
    whole = np.clip(np.rint(samples.astype(np.float64) * top), -top, top - 1).astype("<i8") + (128 if width == 1 else 0)
    return whole.view(np.uint8).reshape(-1, 8)[:, :width].tobytes()


# --------------------------------------------------------------------------------------------------------------- forms

# The largest step of each form between values in [-1, 1]; coding errs by half of it. mu-law and A-law have 16 steps in
# the upper half of their range. float32 holds 24 bits, so wider forms end there.
STEPS = {"PCM_U8": 2**-7, "PCM_16": 2**-15, "PCM_24": 2**-23, "PCM_32": 2**-23, "FLOAT": 2**-24, "DOUBLE": 2**-24}
STEPS |= {"ULAW": 2**-5, "ALAW": 2**-5}


@pytest.mark.parametrize("subtype", STEPS)
@pytest.mark.parametrize("container", ["WAV", "WAVEX", "RF64"])
@pytest.mark.parametrize("channels", [1, 2, 6])
def test_every_form_of_wav_is_read(subtype, container, channels, tmp_path):
    parts = np.stack([TONE * (1 - 0.1 * index) for index in range(channels)], 1)
    soundfile.write(tmp_path / "sound.wav", parts, RATE, subtype=subtype, format=container)
    found = read_wav(tmp_path / "sound.wav", RATE)
    # One step, as writers round down or to the nearest; 2**-22: sums of six channels in float32.
    assert found.dtype == np.float32 and found.shape == TONE.shape
    assert np.abs(found - parts.mean(1)).max() <= STEPS[subtype] + 2**-22


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int32, np.float32, np.float64])
def test_wav_files_of_another_writer_are_read(dtype, tmp_path):
    top = 1.0 if np.issubdtype(dtype, np.floating) else float(np.iinfo(dtype).max // 2 + 1 if dtype == np.uint8 else 0)
    if np.issubdtype(dtype, np.signedinteger):
        top = float(np.iinfo(dtype).max)
    values = TONE.astype(np.float64) * (127 if dtype == np.uint8 else top) + (128 if dtype == np.uint8 else 0)
    whole = values if np.issubdtype(dtype, np.floating) else np.rint(values)
    scipy.io.wavfile.write(tmp_path / "sound.wav", RATE, whole.astype(dtype))
    step = 2**-6 if dtype == np.uint8 else 2**-14  # 127 and 32767 of 128 and 32768 are another full scale
    assert np.abs(read_wav(tmp_path / "sound.wav", RATE) - TONE).max() <= step


@pytest.mark.parametrize("width", PCM)
def test_plain_pcm_needs_no_extra(width, tmp_path, without):
    soundfile.write(tmp_path / "sound.wav", np.stack([TONE, TONE * 0.5], 1), RATE, subtype=PCM[width])
    expected = read_wav(tmp_path / "sound.wav", RATE)
    without("soundfile", "soxr")
    assert np.abs(read_wav(tmp_path / "sound.wav", RATE) - expected).max() <= 2**-24
    with pytest.raises(
        InputError, match=r"sound.wav: .* 16,000 samples a second, the model takes 8,000.*pip install '?soxr"
    ):
        read_wav(tmp_path / "sound.wav", 8000)


@pytest.mark.parametrize(
    ("name", "subtype"), [("a.wav", "FLOAT"), ("a.wav", "ULAW"), ("a.flac", None), ("a.ogg", None)]
)
def test_other_forms_without_soundfile_are_refused_with_what_to_install(name, subtype, tmp_path, without):
    soundfile.write(tmp_path / name, TONE, RATE, subtype=subtype)
    without("soundfile")
    with pytest.raises(InputError, match=r"pip install '?soundfile"):
        read_wav(tmp_path / name, RATE)


@pytest.mark.parametrize(
    ("name", "subtype", "bound"),
    # Lossy coders are asked for 26 dB at least: the error's root mean square is a twentieth of the tone's.
    [
        *(
            ("a.flac", "PCM_16", 2**-15),
            ("a.flac", "PCM_24", 2**-23),
            ("a.ogg", "VORBIS", None),
            ("a.ogg", "OPUS", None),
        ),
        *(("a.mp3", "MPEG_LAYER_III", None), ("a.aiff", "PCM_16", 2**-15), ("a.au", "PCM_16", 2**-15)),
    ],
)
def test_compressed_recordings_are_read(name, subtype, bound, tmp_path):
    tone = np.tile(TONE, 4)
    soundfile.write(tmp_path / name, tone, RATE, subtype=subtype)
    found = read_wav(tmp_path / name, RATE)
    if bound is not None:
        assert np.abs(found - tone).max() <= bound
        return
    assert abs(len(found) - len(tone)) <= 1152 * 3  # whole MP3 frames and the coder's delay
    inner = found[4000:12000].astype(np.float64)
    basis = np.exp(2j * np.pi * 440 * np.arange(len(inner)) / RATE)  # phase does not matter
    wanted = 2 * np.real(np.mean(inner * basis.conj()) * basis)
    assert np.sqrt(np.mean((inner - wanted) ** 2)) < 0.05 * np.sqrt(np.mean(tone**2))
    assert np.abs(wanted).max() == pytest.approx(0.7, rel=0.05)


@pytest.mark.parametrize("width", PCM)
def test_chunks_of_any_kind_and_odd_length_may_stand_before_and_behind(width, tmp_path):
    extra = chunk(b"LIST", b"INFOabc")  # of odd length: a byte of padding follows
    guid = struct.pack("<HHI", 22, 8 * width, 4) + struct.pack("<H", 1) + GUID
    extensible = chunk(b"fmt ", fmt(0xFFFE, 8 * width)[8:] + guid)
    for head in (fmt(1, 8 * width), extensible):
        content = riff(extra, head, chunk(b"bext", b"x" * 33), chunk(b"data", coded(TONE, width)), extra)
        (tmp_path / "sound.wav").write_bytes(content)
        assert np.abs(read_wav(tmp_path / "sound.wav", RATE) - TONE).max() <= 2.0 ** (1 - 8 * width) + 2**-24


@pytest.mark.parametrize("promised", [0xFFFFFFFF, 0x7FFFF000, 0x7FFFFFFF])
def test_a_file_from_a_pipe_is_read_to_its_end(promised, tmp_path):
    content = riff(fmt(1, 16), chunk(b"data", coded(TONE, 2)))
    place = content.index(b"data") + 4
    (tmp_path / "pipe.wav").write_bytes(content[:place] + struct.pack("<I", promised) + content[place + 4 :])
    found = read_wav(tmp_path / "pipe.wav", RATE)
    assert np.abs(found - TONE).max() <= 2**-15


def test_a_file_that_is_cut_short_is_refused(tmp_path):
    whole = riff(fmt(1, 16), chunk(b"data", coded(TONE, 2)))
    path = tmp_path / "cut.wav"
    for cut in (0, 3, 11, 20, 40, 44, 1001, len(whole) - 2):
        path.write_bytes(whole[:cut])
        with pytest.raises(InputError, match=r"^[^ ]*cut\.wav (is cut short|cannot be read as|holds no samples)"):
            read_wav(path, RATE)
    soundfile.write(path, TONE, RATE, format="RF64")
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(InputError, match=r"cut\.wav is cut short: it holds .* its header says 8,000"):
        read_wav(path, RATE)
    soundfile.write(tmp_path / "cut.flac", np.random.default_rng(0).uniform(-1, 1, 40000), RATE)
    content = (tmp_path / "cut.flac").read_bytes()
    (tmp_path / "cut.flac").write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=r"cut\.flac"):
        read_wav(tmp_path / "cut.flac", RATE)


def test_what_is_no_recording_is_refused(tmp_path):
    path = tmp_path / "bad.wav"
    samples = TONE.copy()
    samples[7] = np.nan
    soundfile.write(path, samples, RATE, subtype="FLOAT")
    with pytest.raises(InputError, match="no numbers"):
        read_wav(path, RATE)
    soundfile.write(path, np.zeros(0, np.float32), RATE)
    with pytest.raises(InputError, match="no samples"):
        read_wav(path, RATE)
    path.write_text("this is a text, and no recording at all")
    with pytest.raises(InputError, match=r"bad\.wav cannot be read"):
        read_wav(path, RATE)
    for nothing in (tmp_path / "nothing.wav", tmp_path, "zero\0byte.wav"):
        with pytest.raises(InputError, match="cannot be read"):
            read_wav(nothing, RATE)


# --------------------------------------------------------------------------------------------------------------- rates


@pytest.mark.parametrize("rate", [8000, 11025, 22050, 44100, 48000, 96000])
def test_another_rate_is_changed_as_scipy_changes_it(rate, tmp_path):
    time = np.arange(rate // 2) / rate
    tone = (0.5 * np.sin(2 * np.pi * 1000 * time)).astype(np.float32)
    soundfile.write(tmp_path / "tone.wav", tone, rate, subtype="FLOAT")
    found = read_wav(tmp_path / "tone.wav", RATE)
    assert abs(len(found) - len(tone) * RATE / rate) <= 1
    expected = 0.5 * np.sin(2 * np.pi * 1000 * np.arange(len(found)) / RATE)
    inner = slice(400, -400)  # 25 ms at each end see the silence outside
    # soxr's HQ is specified for 20 bits; the rest is its passband ripple and float32.
    assert np.abs(found - expected)[inner].max() < 1e-4
    other = scipy.signal.resample_poly(tone.astype(np.float64), RATE, rate)
    length = min(len(other), len(found))
    assert np.abs(found[:length] - other[:length])[inner].max() < 2e-3  # scipy's filter is short: 0.2 % ripple
    spectrum = np.abs(np.fft.rfft(found * np.hanning(len(found))))
    assert abs(spectrum.argmax() * RATE / len(found) - 1000) < 2 * RATE / len(found)


def test_what_does_not_fit_the_rate_does_not_fold_back():
    high = np.sin(2 * np.pi * 9500 * np.arange(44100) / 44100).astype(np.float32)
    assert np.abs(resample(high, 44100, RATE))[400:-400].max() < 1e-3


# ------------------------------------------------------------------------------------------------------------ features

BASE = {"feature_extractor_type": "WhisperFeatureExtractor", "feature_size": 40, "chunk_length": 2}


def settings_of(settings, name="preprocessor_config.json"):
    """What the export writes to the bundle of a model with these features."""
    front = tf.WhisperFeatureExtractor(**settings)
    shape = (front.feature_size, front.nb_max_frames)
    read = lambda file: json.dumps(settings).encode() if file == name else None  # noqa: E731
    return json.loads(log_mel_settings(read, shape)["preprocessor_config.json"])


@pytest.mark.parametrize(
    "changed",
    [
        {"feature_size": 80},
        {"sampling_rate": 8000},
        {"sampling_rate": 22050, "hop_length": 441, "n_fft": 882},
        {"hop_length": 200},
        {"n_fft": 512},
        {"chunk_length": 1},
        {"padding_value": 0.25},
        {"padding_side": "left"},
        {"return_attention_mask": True},
        {"do_normalize": True},
        {"anything": 3},
    ],
    ids=str,
)
def test_settings_give_the_features_of_transformers(changed):
    given = BASE | changed
    extractor, front = tf.WhisperFeatureExtractor(**given), LogMel.of(settings_of(given))
    rng = np.random.default_rng(1)
    for seconds in (0.3, 1.0, 2.5):
        samples = (rng.standard_normal(int(seconds * front.sampling_rate)) * 0.1).astype(np.float32)
        outputs = extractor(samples, sampling_rate=front.sampling_rate, return_tensors="np")
        # Noise leaves no bin empty, so float32 transforms err by 1e-6 of each bin, and log10 of that is as small; but
        # padding is silent up to its edge, where bins come down to the floor: see _prove_sound.
        assert np.abs(front.features(samples) - outputs["input_features"][0]).max() < 2e-3


@pytest.mark.parametrize(
    ("named", "settings"),
    [
        ("dither=0.1", BASE | {"dither": 0.1}),
        ("num_mel_bins=80", {"feature_extractor_type": "Speech2TextFeatureExtractor"}),
        (
            "does not say hop_length, n_fft, chunk_length, which log-mel",
            {"feature_extractor_type": "Wav2Vec2FeatureExtractor"},
        ),
        ("NoSuchExtractor", {"feature_extractor_type": "NoSuchExtractor"}),
        ("top_db|frequency_max", {"feature_extractor_type": "ClapFeatureExtractor"}),
    ],
)
def test_features_that_the_runtime_does_not_compute_are_refused_by_name(named, settings):
    read = lambda file: json.dumps(settings).encode() if file == "preprocessor_config.json" else None  # noqa: E731
    with pytest.raises(ExportError, match=named):
        log_mel_settings(read, (80, 3000))


def test_features_of_another_size_than_the_models_are_refused():
    read = lambda file: json.dumps(BASE).encode() if file == "preprocessor_config.json" else None  # noqa: E731
    with pytest.raises(ExportError, match=r"gives \[40, 200\], the model takes \[80, 3000\]"):
        log_mel_settings(read, (80, 3000))


def test_an_extractor_that_does_more_than_its_settings_say_is_refused(monkeypatch):
    plain = tf.WhisperFeatureExtractor.__call__

    def louder(self, samples, **more):
        return plain(self, samples * np.linspace(1, 3, len(samples), dtype=np.float32), **more)

    monkeypatch.setattr(tf.WhisperFeatureExtractor, "__call__", louder)
    with pytest.raises(ExportError, match="WhisperFeatureExtractor does not do what its settings say"):
        settings_of(BASE)


def test_a_feature_extractor_in_a_nested_config_is_found():
    nested = {
        "feature_extractor": {"feature_extractor_type": "Wav2Vec2FeatureExtractor", "return_attention_mask": True}
    }
    read = lambda file: json.dumps(nested).encode() if file == "processor_config.json" else None  # noqa: E731
    assert json.loads(sound_settings(read)["preprocessor_config.json"])["return_attention_mask"] is True
    assert sound_settings(lambda _: None) == {}


@pytest.mark.parametrize("name", ["feature_size", "sampling_rate", "hop_length", "n_fft", "chunk_length"])
def test_a_setting_that_a_bundle_leaves_out_is_no_default(name):
    settings = settings_of(BASE)
    assert LogMel.of(settings)
    del settings[name]
    with pytest.raises(InputError, match=name):
        LogMel.of(settings)


def test_the_sweep_tries_every_setting_of_the_feature_extractors():
    known = {*tf.WhisperFeatureExtractor().to_dict(), "dither"} - {"feature_extractor_type"}
    assert known <= {setting.partition(" ")[0] for setting in sweep.settings()}
