"""Several windows and recordings at once: the transcripts of one window at a time, lazily, in order, with progress."""

from __future__ import annotations

import json
import wave

import numpy as np
import pytest
from support import tiny

torch = pytest.importorskip("torch", reason="the toolchain needs torch")

import transformers as tf

from edgeformer.errors import InputError
from edgeformer.export.options import ExportOptions
from edgeformer.export.pipeline import export
from edgeformer.model import load
from edgeformer.tasks import speech
from edgeformer.tasks.seq2seq import EncoderDecoder

RATE = 16000  # samples of a window: it is one second long
LANGUAGES = {
    f"<|{name}|>": 60 + 3 * number
    for number, name in enumerate(["de", "en", "fr", "it", "ja", "ko", "nl", "pl", "sv", "zh"])
}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    """A random Whisper of windows of one second that knows ten languages."""
    folder = tmp_path_factory.mktemp("speech")
    source = folder / "source"
    source.mkdir()
    torch.manual_seed(0)
    audio = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "num_mel_bins": 40, "max_source_positions": 50}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    quiet = {"begin_suppress_tokens": None, "suppress_tokens": None, "max_target_positions": 32, "init_std": 0.4}
    size = tiny.tokenizer(source)
    whisper = tf.WhisperForConditionalGeneration(tf.WhisperConfig(vocab_size=size, **audio, **heads, **tokens, **quiet))
    with torch.no_grad():
        whisper.model.decoder.layers[0].encoder_attn.out_proj.weight *= 8  # so that what is said depends on the sound
    whisper.eval().save_pretrained(source)
    tf.WhisperFeatureExtractor(feature_size=40, chunk_length=1).save_pretrained(source)
    settings = {"lang_to_id": LANGUAGES, "task_to_id": {"transcribe": 50, "translate": 51}, "eos_token_id": 2}
    (source / "generation_config.json").write_text(json.dumps({**settings, "decoder_start_token_id": 1}))
    export(ExportOptions(source=str(source), output=folder / "bundle", quantize="none"))
    return folder / "bundle"


@pytest.fixture(scope="module", params=["native", "cpu"])
def model(request, bundle):
    return load(bundle, request.param, threads=1)


def recording(number, windows):
    """Tones and noise, another one in each window; the last window is not full."""
    rng = np.random.default_rng(number)
    time = np.arange(RATE) / RATE
    parts = [np.sin(time * rng.uniform(500, 20000)) * rng.uniform(0.1, 0.5) for _ in range(windows)]
    samples = np.concatenate(parts) + rng.standard_normal(windows * RATE) * rng.uniform(0.001, 0.2)
    return samples[: len(samples) - RATE // 3].astype(np.float32)


RECORDINGS = [recording(number, windows) for number, windows in enumerate([3, 1, 11, 2, 1, 5])]


@pytest.mark.parametrize("more", [{}, {"num_beams": 3}, {"task": "translate", "language": "de"}])
def test_together_they_say_what_each_window_says_alone(model, more):
    found = model.transcribe(RECORDINGS, max_new_tokens=9, **more)
    for samples, transcript in zip(RECORDINGS, found, strict=True):
        first = model.transcribe(samples[:RATE], max_new_tokens=9, **more)
        assert transcript.language == first.language
        given = {**more, "language": first.language}  # that of the recording, not of the window
        starts = range(0, len(samples), RATE)
        alone = [model.transcribe(samples[at : at + RATE], max_new_tokens=9, **given).ids for at in starts]
        assert transcript.ids == [token for ids in alone for token in ids]
        assert transcript.text == model.tokenizer.decode(transcript.ids).strip()
        assert model.transcribe(samples, max_new_tokens=9, **more) == transcript
    assert len({tuple(transcript.ids) for transcript in found}) == len(found)
    assert len({transcript.language for transcript in found}) > 1 or "language" in more


def test_a_language_is_heard_once_a_recording(model, monkeypatch):
    heard, likeliest = [], EncoderDecoder.likeliest
    monkeypatch.setattr(EncoderDecoder, "likeliest", lambda *args: heard.append(1) or likeliest(*args))
    model.transcribe(RECORDINGS, max_new_tokens=2)
    assert len(heard) == len(RECORDINGS)
    model.transcribe(RECORDINGS, max_new_tokens=2, language="fr")
    assert len(heard) == len(RECORDINGS)


def test_recordings_are_read_and_encoded_when_they_can_begin(model, monkeypatch):
    taken, encoded, encode = [], [], EncoderDecoder.encode
    monkeypatch.setattr(EncoderDecoder, "encode", lambda *args: encoded.append(1) or encode(*args))

    def audios():
        for samples in RECORDINGS * 3:
            taken.append(1)
            yield samples

    for number, _ in enumerate(model.transcribe_each(audios(), max_new_tokens=4), 1):
        done = sum(-(-len(samples) // RATE) for samples in (RECORDINGS * 3)[:number])
        assert (
            len(encoded) <= done + 11 + speech.MAX_WINDOWS + 2
        )  # a recording behind may have ended before: 11 windows
    assert number == len(taken) == 18
    each = model.transcribe_each(audios(), max_new_tokens=4)
    next(each)
    each.close()
    assert len(taken) < 18 + 4


def test_few_windows_run_at_once_where_memory_is_short(model, monkeypatch):
    most, forward = [], type(model.engine).forward
    monkeypatch.setattr(type(model.engine), "forward", lambda self, b: most.append(len(b)) or forward(self, b))
    expected = model.transcribe(RECORDINGS, max_new_tokens=4)
    assert max(most) == speech.MAX_WINDOWS
    for free, together in ((1000, 1), (None, speech.MAX_WINDOWS)):
        most.clear()
        monkeypatch.setattr(speech, "available_memory", lambda free=free: free)
        assert model.transcribe(RECORDINGS, max_new_tokens=4) == expected
        assert max(most) == together
    monkeypatch.setattr(speech, "available_memory", lambda: 1000)
    assert len(model.transcribe(RECORDINGS[:1], max_new_tokens=4, num_beams=5)) == 1


def test_progress_is_told_window_by_window(model, capsys):
    seen = []
    model.transcribe(RECORDINGS, max_new_tokens=2, show_progress=lambda *counts: seen.append(counts))
    assert [done for done, _ in seen] == list(range(1, 24))
    assert seen[-1] == (23, 23) and all(done <= total for done, total in seen)
    model.transcribe(RECORDINGS[:1], max_new_tokens=2, show_progress=True)
    assert "3/3" in capsys.readouterr().err
    model.transcribe(RECORDINGS[:1], max_new_tokens=2, show_progress=None)
    assert capsys.readouterr().err == "", "stderr is no terminal"


def test_a_recording_that_fails_does_not_stop_the_others(model, tmp_path):
    wrong = [RECORDINGS[0], tmp_path / "none.wav", RECORDINGS[1], np.full(10, np.nan, np.float32), RECORDINGS[2]]
    first, missing, second, noise, third = model.transcribe_each(wrong, max_new_tokens=3)
    assert [first, second, third] == model.transcribe(RECORDINGS[:3], max_new_tokens=3)
    assert isinstance(missing, InputError) and "none.wav" in str(missing)
    assert isinstance(noise, InputError) and "NaN" in str(noise)
    with pytest.raises(InputError, match=r"none\.wav") as caught:
        model.transcribe(wrong)
    assert caught.value.__notes__ == ["This was recording 1 of 5."]
    assert model.transcribe([]) == []
    with pytest.raises(InputError, match="language is 'xx'; the model knows de, en, fr, it"):
        model.transcribe(RECORDINGS[0], language="xx")
    with pytest.raises(InputError, match=r"has no argument top_p; it has language, task"):
        model.transcribe(RECORDINGS[0], top_p=1)
    with pytest.raises(InputError, match="show_progress is 3"):
        model.transcribe(RECORDINGS[0], show_progress=3)


def test_the_command_goes_on_behind_a_file_that_fails(edgeformer, bundle, tmp_path):
    files = [tmp_path / name for name in ("a.wav", "none.wav", "b.wav")]
    for file, samples in zip(files[::2], RECORDINGS, strict=False):
        with wave.open(str(file), "wb") as out:
            out.setparams((1, 2, RATE, 0, "NONE", "NONE"))
            out.writeframes((samples * 20000).astype("<i2").tobytes())
    code, out, err = edgeformer("transcribe", bundle, *files, "-e", "cpu", "--json")
    expected = load(bundle, "cpu").transcribe(files[::2])
    lines = [json.loads(line) for line in out.splitlines()]
    assert [(line["file"], line["ids"], line["language"]) for line in lines] == [
        (str(file), one.ids, one.language) for file, one in zip(files[::2], expected, strict=True)
    ]
    assert code == 2
    assert err.startswith("error: ") and "none.wav" in err and err.count("\n") == 1


NAN = float("nan")
NO_SOUND = {
    "None": None, "a number": 5, "bytes": b"RIFF", "a dict": {}, "rank 0": np.float32(1), "rank 2": np.zeros((2, 9)),
    "no samples": np.zeros(0, np.float32), "NaN": np.full(99, np.nan, np.float32), "texts": np.array(["x"]),
    "complex": np.zeros(99, np.complex64), "objects": np.array([None]), "infinite": np.full(99, np.inf, np.float32),
    "a missing file": "none.wav", "a folder": "/", "an empty name": "", "a NUL in the name": "a\0b",
}  # fmt: skip
WRONG = {
    "language": ("xx", 5), "task": ("sing", 5), "prompt": (5, b"x"), "timestamps": ("yes", 5),
    "logprobs": ("x", 5), "temperature": (-1, NAN, "x"), "seed": (-1, 1.5, "x"), "num_beams": (0, -1, 1.5),
    "max_new_tokens": (-1, 1.5, "x"), "show_progress": (3, "yes"), "on_step": (5, "x"),
}  # fmt: skip


@pytest.mark.parametrize("case", NO_SOUND)
def test_what_is_no_recording_is_refused(model, case):
    with pytest.raises(InputError, match=r".{20}"):
        model.transcribe(NO_SOUND[case], max_new_tokens=1)
    with pytest.raises(InputError, match=r".{20}"):
        list(model.transcribe_stream(NO_SOUND[case], max_new_tokens=1))


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in WRONG.items() for value in values], ids=lambda v: repr(v)[:20]
)
def test_an_option_out_of_its_range_is_refused_by_name(model, name, value):
    with pytest.raises(InputError, match=name):
        model.transcribe(RECORDINGS[1], **{"max_new_tokens": 1, name: value})
