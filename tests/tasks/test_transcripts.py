"""Times, prompts, log probabilities and streams of transcripts: transformers' rules, and one text in all forms."""

from __future__ import annotations

import json

import numpy as np
import pytest
from support import speech

torch = pytest.importorskip("torch", reason="the toolchain needs torch")

import transformers as tf

from edgeformer.errors import InputError
from edgeformer.model import load
from edgeformer.processing.audio import LogMel
from edgeformer.tasks.timestamps import TimeTokens, spans

RECORDINGS = [speech.recording(number, windows) for number, windows in enumerate([1, 3, 2])]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(bundle, the model of transformers)"""
    return speech.write_whisper(tmp_path_factory.mktemp("transcripts"))


@pytest.fixture(scope="module")
def model(made):
    return load(made[0], "native", threads=1)


def rules_of_transformers(times, prompt_length):
    config = tf.GenerationConfig(
        no_timestamps_token_id=times.first - 1, eos_token_id=next(iter(times.eos)), bos_token_id=0
    )
    config.max_initial_timestamp_index = times.latest_first
    return tf.WhisperTimeStampLogitsProcessor(config, begin_index=prompt_length)


@pytest.mark.parametrize("latest", [None, 3])
def test_the_rules_of_times_are_those_of_transformers(latest):
    vocab, first, eos = 60, 40, 38  # the end token stands right before "no times", as transformers takes for granted
    times = TimeTokens(first, 0.02, frozenset({eos}), latest)
    ours, theirs = times.rules(3), rules_of_transformers(times, 3)
    rng = np.random.default_rng(0)
    forced = 0
    for _ in range(400):
        ids = [1, 2, 3]
        for _ in range(12):
            scores = (rng.standard_normal(vocab) * rng.choice([0.5, 4])).astype(np.float32)
            found = ours(np.array(ids), scores.copy())
            expected = theirs(torch.tensor([ids]), torch.tensor(scores)[None])[0].numpy()
            assert np.array_equal(np.isneginf(found), np.isneginf(expected)), ids
            kept = ~np.isneginf(found)
            assert np.array_equal(found[kept], expected[kept])
            forced += not kept[: first - 1].any()
            ids.append(int(rng.choice(np.flatnonzero(kept))))
            if ids[-1] == eos:
                break
    assert forced > 400


def test_a_rule_that_is_broken_is_seen():
    times = TimeTokens(40, 0.02, frozenset({38}))
    scores = np.zeros(60, np.float32)
    found = times.rules(0)(np.array([44, 7, 50]), scores.copy())
    assert np.isneginf(found[40:50]).all() and not np.isneginf(found[50:]).any()  # never back


def test_spans_have_the_times_of_their_tokens():
    times = TimeTokens(100, 0.5, frozenset())
    found = spans([100, 7, 8, 102, 102, 9, 104, 5], times, 10.0)
    assert [(one.start, one.end, one.places) for one in found] == [(0, 1, [1, 2]), (1, 2, [5]), (2, 10, [7])]
    assert [(one.start, one.end) for one in spans([100, 7, 140], times, 3.0)] == [(0, 3)]  # no time is after the end
    assert [(one.start, one.end, one.places) for one in spans([3, 4], None, 2.5)] == [(0, 2.5, [0, 1])]
    assert spans([], times, 1.0) == spans([100, 101], times, 1.0) == []


def generated(made, samples, begin, new_tokens, *, has_times):
    """What transformers' greedy search gives for one window after the tokens `begin`, without the end."""
    bundle, whisper = made
    settings = tf.GenerationConfig.from_pretrained(bundle)
    front = LogMel.of(tf.WhisperFeatureExtractor.from_pretrained(bundle).to_dict())
    rules = [tf.SuppressTokensLogitsProcessor(settings.suppress_tokens, device="cpu")]
    if has_times:
        rules.append(tf.WhisperTimeStampLogitsProcessor(settings, begin_index=len(begin)))
    found = tf.GenerationMixin.generate(
        whisper,
        input_features=torch.from_numpy(front.features(samples))[None],
        decoder_input_ids=torch.tensor([begin]),
        generation_config=tf.GenerationConfig(eos_token_id=settings.eos_token_id, pad_token_id=0),
        logits_processor=tf.LogitsProcessorList(rules),
        max_new_tokens=new_tokens,
        do_sample=False,
    )
    return [token for token in found[0, len(begin) :].tolist() if token != settings.eos_token_id]


def numbers(model):
    """Special text -> token."""
    return model.tokenizer.special_texts


@pytest.mark.parametrize("number", range(4))
def test_text_and_times_are_those_of_transformers(made, model, number):
    samples, known = speech.recording(20 + number, 1), numbers(model)
    begin = [1, known["<|en|>"], known["<|transcribe|>"]]
    first = known["<|0.00|>"]
    ids = generated(made, samples, begin, 30, has_times=True)
    found = model.transcribe(samples, language="en", timestamps=True, max_new_tokens=30)
    assert found.ids == [token for token in ids if token < first]
    times = [min((token - first) * 0.02, found.seconds) for token in ids if token >= first]
    edges = [edge for one in found.segments for edge in (one.start, one.end)]
    assert times and found.segments
    assert set(np.round(edges, 4)) <= {*np.round(times, 4), round(found.seconds, 4)}


def test_segments_are_the_text_in_pieces(model):
    found = model.transcribe(RECORDINGS[1], timestamps=True, logprobs=True)
    assert found.seconds == pytest.approx(len(RECORDINGS[1]) / speech.RATE)
    assert [token for one in found.segments for token in one.ids] == found.ids
    assert {one.window for one in found.segments} <= {0, 1, 2}
    for one in found.segments:
        assert one.window <= one.start <= one.end <= min(one.window + 1, found.seconds) + 1e-9
        assert one.avg_logprob <= 0 and 0 <= one.silence <= 1
    assert len(found.logprobs) == len(found.ids)
    assert found.segments[0].avg_logprob == pytest.approx(
        np.mean([one.logprob for one in found.logprobs[: len(found.segments[0].ids)]])
    )
    assert model.transcribe(RECORDINGS[1]).segments == []


def test_a_model_without_times_has_a_segment_a_window(made, tmp_path, copy_of, reseal):
    copy = copy_of(made[0])
    settings = copy / "generation_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "no_timestamps_token_id": None}))
    reseal(copy)
    found = load(copy, "native", threads=1).transcribe(RECORDINGS[1], timestamps=True)
    assert [(one.start, one.end) for one in found.segments] == [(0, 1), (1, 2), (2, pytest.approx(found.seconds))]


@pytest.mark.parametrize("more", [{}, {"logprobs": True}, {"prompt": "The quick fox"}, {"temperature": 1.0, "seed": 3}])
@pytest.mark.parametrize("samples", RECORDINGS)
def test_a_stream_has_the_text_of_the_whole(model, samples, more):
    whole = model.transcribe(samples, **more)
    stream = model.transcribe_stream(samples, **more)
    returned = []

    def read():
        returned.append((yield from stream))

    pieces = list(read())
    assert returned == [whole]
    assert "".join(piece.text for piece in pieces) == whole.text
    assert len(pieces) > 1
    assert [one for piece in pieces for one in piece.logprobs] == (whole.logprobs or [])


def test_a_prompt_stands_before_each_window(made, model):
    samples, known = RECORDINGS[0], numbers(model)
    earlier = [known["<|startofprev|>"], *model.tokenizer.encode(" the lazy dog")]
    begin = [*earlier, 1, known["<|de|>"], known["<|transcribe|>"], known["<|notimestamps|>"]]
    found = model.transcribe(samples, prompt="the lazy dog\n", language="de", max_new_tokens=20)
    assert found.ids == generated(made, samples, begin, 20, has_times=False)
    assert found.ids != model.transcribe(samples, language="de", max_new_tokens=20).ids
    long = model.transcribe(samples, prompt="fox " * 500 + "the lazy dog", max_new_tokens=8)  # its end is taken
    assert long.ids != found.ids[:8]


def test_what_a_model_cannot_do_is_refused(made, model, copy_of, reseal):
    copy = copy_of(made[0])
    settings = copy / "generation_config.json"
    without = {"prev_sot_token_id": None, "lang_to_id": None}
    settings.write_text(json.dumps(json.loads(settings.read_text()) | without))
    reseal(copy)
    poor = load(copy, "native", threads=1)
    with pytest.raises(InputError, match=r"^prompt is for models with a token for earlier text"):
        poor.transcribe(RECORDINGS[0], prompt="a")
    with pytest.raises(InputError, match=r"task is 'translate', but this model has no tokens for tasks"):
        poor.transcribe(RECORDINGS[0], task="translate")
    with pytest.raises(InputError, match="timestamps belong to a whole transcript"):
        model.transcribe_stream(RECORDINGS[0], timestamps=True)


def test_what_on_step_raises_ends_the_work(model):
    class Enough(Exception):
        pass

    steps = []

    def stop():
        steps.append(1)
        if len(steps) == 5:
            raise Enough

    with pytest.raises(Enough):
        model.transcribe(RECORDINGS, on_step=stop)
    assert len(steps) == 5
    steps.clear()
    with pytest.raises(Enough):
        list(model.transcribe_stream(RECORDINGS[1], on_step=stop))
    assert len(steps) == 5
    assert model.transcribe(RECORDINGS[0]).text  # and nothing is left behind
