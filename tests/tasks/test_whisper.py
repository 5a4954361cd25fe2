"""Speech: log-mel features equal transformers; a small Whisper, trained here on digits spoken by espeak-ng."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import wave

import numpy as np
import pytest
import torch
import transformers as tf

import edgeformer
from edgeformer.errors import InputError
from edgeformer.processing.audio import LogMel, read_wav, resample

RATE = 16000


@pytest.mark.parametrize(("bins", "seconds"), [(80, 30), (128, 30), (40, 2)])
def test_log_mel_features_equal_transformers(bins, seconds):
    extractor = tf.WhisperFeatureExtractor(feature_size=bins, chunk_length=seconds)
    front = LogMel.of(extractor.to_dict())
    rng = np.random.default_rng(0)
    for samples in (
        (rng.standard_normal(RATE * seconds // 2) * 0.1).astype(np.float32),  # shorter than the window
        np.sin(np.arange(RATE * seconds + 999) * 0.05).astype(np.float32),  # longer
        np.zeros(100, np.float32),
    ):
        # Compare with its numpy path. Its torch path, in float32, differs by 5e-5 if a pure tone leaves bins empty.
        window = np.pad(samples, (0, max(0, RATE * seconds - len(samples))))[: RATE * seconds]
        expected = extractor._np_extract_fbank_features(window[None], "cpu")[0]
        through_torch = extractor(samples, sampling_rate=RATE, return_tensors="np")["input_features"][0]
        assert np.abs(through_torch - expected).max() < 1e-4
        found = front.features(samples)
        assert found.shape == expected.shape and found.dtype == np.float32
        assert np.abs(found - expected).max() < 1e-5


@pytest.mark.parametrize("rate", [8000, 22050, 44100])
def test_resampling_keeps_low_tones_and_removes_those_above_half_the_rate(rate):
    time = np.arange(rate) / rate
    tone = np.sin(2 * np.pi * 1000 * time).astype(np.float32)
    found = resample(tone, rate, RATE)
    expected = np.sin(2 * np.pi * 1000 * np.arange(RATE) / RATE)
    assert len(found) == RATE
    assert np.abs(found - expected)[200:-200].max() < 2e-3
    if rate > RATE:
        high = np.sin(2 * np.pi * (RATE / 2 + 1500) * time).astype(np.float32)
        assert np.abs(resample(high, rate, RATE))[200:-200].max() < 0.02, "the tone aliases"


@pytest.mark.parametrize(("width", "step"), [(1, 2**-7), (2, 2**-15), (3, 2**-23), (4, 2**-23)])
def test_wav_files_of_every_width_are_read(width, step, tmp_path):
    left = np.linspace(-0.9, 0.9, 500)
    scaled = np.rint(np.stack([left, left * 0.5], 1) * (2 ** (8 * width - 1) - 1)).astype(np.int64)
    data = (scaled + (128 if width == 1 else 0)).astype("<i8").view(np.uint8).reshape(-1, 8)[:, :width].tobytes()
    with wave.open(str(tmp_path / "sound.wav"), "wb") as file:
        file.setparams((2, width, RATE, 0, "NONE", "NONE"))
        file.writeframes(data)
    found = read_wav(tmp_path / "sound.wav", RATE)
    assert np.abs(found - left * 0.75).max() < 2 * step + 1e-6
    (tmp_path / "no.wav").write_bytes(b"RIFF")
    with pytest.raises(InputError, match="cannot be read"):
        read_wav(tmp_path / "no.wav", RATE)


# ------------------------------------------------------------------------------------------------- a trained recogniser

WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
PAD, END, START = 0, 1, 2
FIRST = 3  # the token of "zero"
SECONDS = 2
STEPS = 350


def spoken(word: str, voice: str, speed: int, pitch: int, folder) -> np.ndarray:
    """The samples of a spoken word, without the silence around it."""
    path = folder / "word.wav"
    command = ["espeak-ng", "-v", voice, "-s", str(speed), "-p", str(pitch), "-w", str(path), word]
    subprocess.run(command, check=True, capture_output=True)
    samples = read_wav(path, RATE)
    loud = np.flatnonzero(np.abs(samples) > 0.02)
    return samples[loud[0] : loud[-1] + 1]


def clip(rng: random.Random, voices: list[list[np.ndarray]]) -> tuple[np.ndarray, list[int]]:
    """(samples of one or two words by one speaker, with silence and noise; the digits)"""
    digits = [rng.randrange(10) for _ in range(rng.choice([1, 2]))]
    speaker, parts = rng.choice(voices), []
    for digit in digits:
        parts += [np.zeros(rng.randrange(500, 2500), np.float32), speaker[digit]]
    samples = np.concatenate(parts)[: RATE * SECONDS]
    if rng.random() < 0.5:  # silence up to the full length
        samples = np.pad(samples, (0, RATE * SECONDS - len(samples)))
    noise = np.random.default_rng(rng.randrange(1 << 30)).standard_normal(len(samples)) * 0.003
    return (samples * rng.uniform(0.6, 1.2) + noise).astype(np.float32), digits


@pytest.fixture(scope="module")
def speech(tmp_path_factory):
    """(voices for training, other voices for the test); a voice is a list of the samples of ten words."""
    if shutil.which("espeak-ng") is None:
        message = "espeak-ng is not installed (apt install espeak-ng)"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    folder = tmp_path_factory.mktemp("speech")
    settings = [("en", speed, pitch) for speed in (140, 165, 190) for pitch in (35, 50, 65)]
    training = [[spoken(word, *setting, folder) for word in WORDS] for setting in settings]
    test = [[spoken(word, *setting, folder) for word in WORDS] for setting in (("en", 150, 43), ("en", 178, 58))]
    return training, test


def tokenizer() -> tf.PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {token: number for number, token in enumerate(["<pad>", "</s>", "<s>", *WORDS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return tf.PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", bos_token="<s>")


@pytest.fixture(scope="module")
def recogniser(speech, tmp_path_factory):
    """(folder, model, extractor) of a tiny Whisper trained on spoken digits, in about 40 s on one core."""
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    extractor = tf.WhisperFeatureExtractor(feature_size=40, chunk_length=SECONDS)
    sizes = {"d_model": 64, "encoder_layers": 2, "decoder_layers": 1, "num_mel_bins": 40, "max_source_positions": 100}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128}
    tokens = {"pad_token_id": PAD, "bos_token_id": START, "eos_token_id": END, "decoder_start_token_id": START}
    plain = {
        "begin_suppress_tokens": None,
        "suppress_tokens": None,
        "max_target_positions": 16,
        "dropout": 0.0,
        "init_std": 0.1,
    }
    config = tf.WhisperConfig(vocab_size=FIRST + 10, **sizes, **heads, **tokens, **plain)
    model = tf.WhisperForConditionalGeneration(config)
    rng, front, steps, rate = random.Random(0), LogMel.of(extractor.to_dict()), STEPS, 3e-3
    clips = [clip(rng, speech[0]) for _ in range(640)]
    features = torch.from_numpy(np.stack([front.features(samples) for samples, _ in clips]))
    labels = torch.tensor([([FIRST + digit for digit in digits] + [END, -100])[:3] for _, digits in clips])
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    for _ in range(steps):
        rows = torch.randint(0, len(clips), (16,))
        loss = model(input_features=features[rows], labels=labels[rows]).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    torch.set_num_threads(threads)
    folder = tmp_path_factory.mktemp("digits") / "folder"
    model.eval().save_pretrained(folder)
    extractor.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder, model, extractor


@pytest.fixture(scope="module")
def exported(recogniser, tmp_path_factory, exported_once):
    """`exported(scheme)`: the bundle of the recogniser, exported once. Do not change it."""
    return exported_once(recogniser[0], tmp_path_factory.mktemp("exported"))


@pytest.mark.parametrize("scheme", ["none", "q8"])
def test_a_tiny_whisper_learns_digits_and_its_bundle_gives_the_same_transcripts(scheme, recogniser, exported, speech):
    _, model, extractor = recogniser
    engines = [edgeformer.load(exported(scheme), engine) for engine in ("cpu", "native")]
    assert all(loaded.bundle.manifest["task"] == "automatic-speech-recognition" for loaded in engines)
    rng, right, same = random.Random(7), [0, 0], [0, 0]
    tests = [clip(rng, speech[1]) for _ in range(40)]
    for samples, digits in tests:
        features = extractor(samples, sampling_rate=RATE, return_tensors="pt").input_features
        expected = model.generate(input_features=features, max_new_tokens=6, do_sample=False)[0].tolist()
        for index, loaded in enumerate(engines):
            found = loaded.transcribe(samples)
            right[index] += found.text == " ".join(WORDS[digit] for digit in digits)
            same[index] += found.ids == [token for token in expected if token >= FIRST]
    assert min(right) >= 36, f"{right} of 40 recordings of voices never heard are right on {engines}"
    assert min(same) >= (40 if scheme == "none" else 38), f"{same} of 40 transcripts are PyTorch's on {engines}"


@pytest.mark.parametrize("engine", ["cpu", "native"])
def test_files_and_long_recordings_are_transcribed(engine, exported, speech, tmp_path):
    model = edgeformer.load(exported("none"), engine)
    quiet = np.zeros(1000, np.float32)

    def window(*digits):
        samples = np.concatenate([part for digit in digits for part in (quiet, speech[0][4][digit])])
        return np.pad(samples, (0, RATE * SECONDS - len(samples)))

    rng = np.random.default_rng(0)
    samples = np.concatenate([window(3, 1), window(7), window(5, 8)])
    samples += (rng.standard_normal(len(samples)) * 0.003).astype(np.float32)
    with wave.open(str(tmp_path / "long.wav"), "wb") as file:
        file.setparams((1, 2, RATE, 0, "NONE", "NONE"))
        file.writeframes((samples.clip(-1, 1) * 32767).astype("<i2").tobytes())
    assert model.transcribe(tmp_path / "long.wav").text == "three one seven five eight"
    assert str(model.transcribe(samples, num_beams=3)) == "three one seven five eight"
    with pytest.raises(InputError, match="no tokens for languages"):
        model.transcribe(samples, language="en")
    with pytest.raises(InputError, match="expected float samples"):
        model.transcribe(np.zeros((2, 100), np.float32))
    with pytest.raises(InputError, match="cannot be read"):
        model.transcribe(tmp_path / "nothing.wav")
