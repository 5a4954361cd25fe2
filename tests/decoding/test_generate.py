"""The token loop: compared with a loop without a cache; stop strings, end tokens, sessions and streams."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import numpy_helper
from support import tiny

import edgeformer
from edgeformer.decoding.session import Session
from edgeformer.decoding.stop import StopFilter
from edgeformer.errors import EdgeformerError, InputError
from edgeformer.model import load


@pytest.fixture(scope="module")
def model(lm):
    return load(lm, "cpu", threads=1)


def _plain_greedy(model, ids, count):
    """`count` greedy ids after `ids`, computed without a cache: every step runs the whole sequence again."""
    ids, new = list(ids), []
    for _ in range(count):
        new.append(int(model.logits(ids)[-1].argmax()))
        ids.append(new[-1])
    return new


PROMPT = [5, 17, 90, 200, 31, 8, 44, 101]


@pytest.mark.parametrize("bundle", ["float", "q8", "float16", "plain"])
def test_greedy_tokens_equal_those_of_a_loop_without_a_cache(bundles, bundle):
    model = load(bundles / bundle, "cpu", threads=1)
    result = model.generate(PROMPT, max_new_tokens=24, ignore_eos=True)
    assert result.ids == _plain_greedy(model, PROMPT, 24)
    assert result.finish_reason == "length"
    assert result.timings.new_tokens == 24
    assert result.timings.prompt_tokens == 8


@pytest.mark.parametrize("chunk", [1, 3, 7, 8, 512])
def test_a_prompt_in_chunks_gives_the_same_tokens(model, chunk):
    expected = model.generate(PROMPT, max_new_tokens=12, ignore_eos=True).ids
    with model.scheduler(1, token_budget=chunk) as scheduler:
        assert scheduler.add(PROMPT, max_new_tokens=12, ignore_eos=True).result().ids == expected


def test_text_ids_arrays_and_chats_are_prompts(model):
    text = "hello world"
    ids = model.tokenizer.encode(text)
    expected = model.generate(text, max_new_tokens=5).ids
    assert model.generate(ids, max_new_tokens=5).ids == expected
    assert model.generate(np.array(ids, np.int32), max_new_tokens=5).ids == expected
    chat = [{"role": "user", "content": text}]
    wrapped = "<|im_start|>user\nhello world<|im_end|>\n<|im_start|>assistant\n"
    assert model.generate(chat, max_new_tokens=5).ids == model.generate(wrapped, max_new_tokens=5).ids


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ([1.5], "expected text, a list of token ids"),
        ([True], "expected text"),
        (3, "is int"),
        (b"bytes", "is bytes"),
        (None, "is NoneType"),
        (np.zeros((1, 2), int), "is ndarray"),
        (np.zeros(2), "is ndarray"),
        ([5, -1], "token id -1, the model knows 0 to"),
        ([5, 10**6], "token id 1000000"),
        ([2**70], "token id|expected a list"),
        ([5] * 257, r"has 257 tokens, the limit is 256 \(max_position_embeddings"),
    ],
)
def test_wrong_prompts_are_refused(model, prompt, expected):
    with pytest.raises(InputError, match=expected):
        model.generate(prompt)


@pytest.mark.parametrize("bad", [0, -1, 1.5, True, "3"])
def test_a_wrong_max_new_tokens_is_refused(model, bad):
    with pytest.raises(InputError, match="max_new_tokens is"):
        model.generate([5], max_new_tokens=bad)


def test_an_empty_prompt_becomes_the_bos_token(model, lm, copy_of, reseal):
    assert model.generate("", max_new_tokens=4).ids == model.generate([1], max_new_tokens=4).ids
    nameless = copy_of(lm)
    (nameless / "generation_config.json").write_text("{}")
    reseal(nameless)
    with pytest.raises(InputError, match="The prompt is empty"):
        load(nameless, "cpu", threads=1).generate([])


# ----------------------------------------------------------------------------------------------------------- the end


def _with_eos(bundle, reseal, eos):
    import json

    (bundle / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    reseal(bundle)
    return load(bundle, "cpu", threads=1)


@pytest.mark.parametrize("form", [int, lambda i: [299, i]])
def test_an_eos_token_ends_and_is_not_in_the_text(model, lm, copy_of, reseal, form):
    free = model.generate(PROMPT, max_new_tokens=10, ignore_eos=True)
    end = free.ids[4]
    ended = _with_eos(copy_of(lm), reseal, form(end))
    result = ended.generate(PROMPT, max_new_tokens=10)
    first = free.ids.index(end)
    assert result.ids == free.ids[: first + 1]
    assert result.finish_reason == "eos"
    assert result.text == model.tokenizer.decode(free.ids[:first])
    assert ended.generate(PROMPT, max_new_tokens=10, ignore_eos=True).ids == free.ids


def test_a_full_context_ends_with_the_reason_context(model):
    full = [5] * tiny.POSITIONS
    result = model.generate(full, max_new_tokens=50, ignore_eos=True)
    assert (len(result.ids), result.finish_reason) == (1, "context")
    result = model.generate(full[:-3], max_new_tokens=50, ignore_eos=True)
    assert (len(result.ids), result.finish_reason) == (4, "context")
    result = model.generate(full[:-3], max_new_tokens=4, ignore_eos=True)
    assert (len(result.ids), result.finish_reason) == (4, "length")


def test_a_stop_string_is_never_shown_wherever_token_boundaries_are(model):
    free = model.generate("hello", max_new_tokens=40, ignore_eos=True, temperature=1.5, seed=3)
    text = free.text
    assert len(text) > 20
    for start in range(3, len(text) - 6, 3):
        for length in (1, 2, 5):
            stop = text[start : start + length]
            stream = model.stream(
                "hello", max_new_tokens=40, ignore_eos=True, temperature=1.5, seed=3, stop=[stop, "§§"]
            )
            shown = "".join(piece.text for piece in stream)
            assert shown == text[: text.index(stop)]
            assert stream.result.finish_reason == "stop"
            assert stream.result.text == shown
            assert stream.result.ids == free.ids[: len(stream.result.ids)]


def test_the_start_of_a_stop_string_is_shown_if_the_rest_does_not_follow(model):
    free = model.generate("hello", max_new_tokens=30, ignore_eos=True, temperature=1.5, seed=4)
    never = free.text[-3:] + "§"  # its start is buffered, then shown at the end
    kept = model.generate("hello", max_new_tokens=30, ignore_eos=True, temperature=1.5, seed=4, stop=never)
    assert (kept.text, kept.finish_reason) == (free.text, "length")


@pytest.mark.parametrize(
    ("stops", "pieces", "expected"),
    [
        (["END"], ["abcE", "N", "Dxyz"], "abc"),
        (["END"], ["abcE", "N", "xyz"], "abcENxyz"),
        (["aab"], ["aa", "aa", "b"], "aa"),
        (["bc", "abcd"], ["ab", "cd"], "a"),
        (["abcd", "bc"], ["abcd"], "a"),
        ([], ["abc"], "abc"),
        (["x"], ["", "x"], ""),
    ],
)
def test_the_stop_filter(stops, pieces, expected):
    stop = StopFilter(stops)
    assert "".join(map(stop.push, pieces)) + ("" if stop.found() else stop.flush()) == expected


def test_the_stop_filter_against_a_plain_search():
    rng = np.random.default_rng(0)
    for _ in range(2000):
        text = "".join(rng.choice(list("ab"), 12))
        stops = ["".join(rng.choice(list("ab"), rng.integers(1, 5))) for _ in range(2)]
        cuts = np.sort(rng.integers(0, 13, 4))
        stop = StopFilter(stops)
        pieces = [stop.push(text[a:b]) for a, b in zip([0, *cuts], [*cuts, 12], strict=True)]
        shown = "".join(pieces) + ("" if stop.found() else stop.flush())
        ends = [(text.find(one) + len(one), text.find(one)) for one in stops if one in text]
        assert shown == (text[: min(ends)[1]] if ends else text)


@pytest.mark.parametrize("stop", [("",), (3,), "", 3])
def test_wrong_stop_strings_are_refused(model, stop):
    with pytest.raises(InputError, match="stop_strings is"):
        model.generate([5], stop=stop)


def test_stop_strings_need_a_tokenizer(bundles):
    plain = load(bundles / "plain", "cpu", threads=1)
    with pytest.raises(InputError, match="has no tokenizer"):
        plain.generate([5], stop=["x"])
    with pytest.raises(InputError, match="has no tokenizer"):
        plain.generate("text")
    assert plain.generate([5], max_new_tokens=3).text == ""


def test_nan_logits_raise_and_the_message_names_the_step(tmp_path):
    def spoil(proto):
        for tensor in proto.graph.initializer:
            if tensor.name == "cos":
                values = numpy_helper.to_array(tensor).copy()
                values[10:] = np.nan  # positions 0 to 9 stay valid
                tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))

    tiny.write_lm(tmp_path / "nan", with_reference=False, change=spoil)
    model = load(tmp_path / "nan", "cpu", threads=1)
    pieces = []
    with pytest.raises(EdgeformerError, match="Step 3 of the generation, after 11 tokens: The logits hold NaN"):
        pieces.extend(model.stream(PROMPT, max_new_tokens=10, ignore_eos=True))
    assert len(pieces) == 3


def test_the_seed_alone_determines_the_tokens(model):
    def answer(seed):
        return model.generate("hi", max_new_tokens=20, temperature=50.0, seed=seed, ignore_eos=True).ids

    assert answer(1) == answer(1)
    assert answer(1) != answer(2)
    assert answer(None) != answer(None)


# ---------------------------------------------------------------------------------------------------------- streams


def test_the_pieces_of_a_stream_join_to_the_result(model):
    stream = model.stream("hello", max_new_tokens=30, ignore_eos=True, temperature=1.0, seed=0)
    pieces = list(stream)
    assert [piece.id for piece in pieces] == stream.result.ids
    assert "".join(piece.text for piece in pieces) == stream.result.text
    assert [piece.finish_reason for piece in pieces] == [None] * 29 + ["length"]
    assert list(stream) == []
    assert stream.result.ids == model.generate("hello", max_new_tokens=30, ignore_eos=True, temperature=1.0, seed=0).ids


@pytest.mark.parametrize("seed", range(5))
def test_a_stream_of_invalid_utf8_equals_the_decoded_ids(model, seed):
    result = model.generate("é", max_new_tokens=100, ignore_eos=True, temperature=3.0, seed=seed)
    assert result.text == model.tokenizer.decode(result.ids)


def test_the_result_raises_before_the_end(model):
    stream = model.stream("hello", max_new_tokens=5, ignore_eos=True)
    next(stream)
    with pytest.raises(InputError, match="has not ended"):
        _ = stream.result


def test_a_session_continues_after_a_stream_is_closed_early(model):
    session = model.session()
    whole = model.generate(PROMPT, max_new_tokens=12, ignore_eos=True).ids
    stream = model.stream(PROMPT, max_new_tokens=12, ignore_eos=True, session=session)
    for _ in range(4):
        next(stream)
    stream.close()
    assert session.state.length == len(session.ids) >= len(PROMPT)
    again = model.generate([*PROMPT, *whole[:3]], max_new_tokens=9, ignore_eos=True, session=session)
    assert again.ids == whole[3:]
    assert again.timings.reused_tokens == len(PROMPT) + 2


# --------------------------------------------------------------------------------------------------------- sessions


def test_a_session_runs_only_new_tokens_and_gives_the_same_ids(model):
    session = model.session()
    first = model.generate(PROMPT, max_new_tokens=6, ignore_eos=True, session=session)
    longer = [*PROMPT, *first.ids, 9, 10, 11]
    fresh = model.generate(longer, max_new_tokens=6, ignore_eos=True)
    second = model.generate(longer, max_new_tokens=6, ignore_eos=True, session=session)
    assert second.ids == fresh.ids
    # The last new token was never run, so only its cache entry is missing.
    assert second.timings.reused_tokens == len(PROMPT) + 5
    assert fresh.timings.reused_tokens == 0


def test_a_session_reuses_the_common_prefix_only(model):
    session = model.session()
    model.generate(PROMPT, max_new_tokens=6, ignore_eos=True, session=session)
    other = [*PROMPT[:4], 77, 78]
    result = model.generate(other, max_new_tokens=6, ignore_eos=True, session=session)
    assert result.timings.reused_tokens == 4
    assert result.ids == model.generate(other, max_new_tokens=6, ignore_eos=True).ids
    same = model.generate(other, max_new_tokens=6, ignore_eos=True, session=session)
    assert same.timings.reused_tokens == len(other) - 1  # the last token runs again for its logits
    assert same.ids == result.ids
    session.reset()
    assert session.state.length == 0
    assert model.generate(other, max_new_tokens=1, session=session).timings.reused_tokens == 0


def test_a_session_recovers_if_ids_and_state_differ_in_length(model):
    session = model.session()
    model.generate(PROMPT, max_new_tokens=6, ignore_eos=True, session=session)
    session.ids.pop()  # as after Ctrl-C between engine.forward and the append to ids
    expected = model.generate(PROMPT, max_new_tokens=6, ignore_eos=True).ids
    assert model.generate(PROMPT, max_new_tokens=6, ignore_eos=True, session=session).ids == expected


def test_two_interleaved_streams_of_one_model_are_independent(model):
    first = model.stream(PROMPT, max_new_tokens=10, ignore_eos=True)
    second = model.stream([9, 8, 7], max_new_tokens=10, ignore_eos=True)
    mixed = [(next(first).id, next(second).id) for _ in range(10)]
    assert [a for a, _ in mixed] == model.generate(PROMPT, max_new_tokens=10, ignore_eos=True).ids
    assert [b for _, b in mixed] == model.generate([9, 8, 7], max_new_tokens=10, ignore_eos=True).ids


def test_a_model_without_a_cache_generates_the_same_ids(model, tmp_path):
    """As from an export that found no causal attention: every step runs the whole sequence again."""
    cached_ids = model.generate(PROMPT, max_new_tokens=6, ignore_eos=True).ids

    def drop_cache(proto):
        graph = proto.graph
        for node in graph.node:
            if node.op_type == "Attention":
                del node.input[4:]
                del node.output[1:]
        for ports in (graph.input, graph.output):
            kept = [port for port in ports if not port.name.startswith(("past_key_values.", "present."))]
            del ports[:]
            ports.extend(kept)

    tiny.write_lm(tmp_path / "uncached", with_reference=False, change=drop_cache)
    uncached = load(tmp_path / "uncached", "cpu", threads=1)
    session = uncached.session()
    assert uncached.generate(PROMPT, max_new_tokens=6, ignore_eos=True, session=session).ids == cached_ids
    assert session.state.length == 0
    np.testing.assert_allclose(uncached.logits(PROMPT), model.logits(PROMPT), atol=1e-4)


def test_timings_are_consistent(model):
    timings = model.generate(PROMPT, max_new_tokens=10, ignore_eos=True).timings
    assert timings.decode_tokens_per_second == pytest.approx(9 / timings.decode_seconds)
    assert timings.prompt_tokens_per_second == pytest.approx(8 / timings.prompt_seconds)
    assert timings.first_token_seconds >= timings.prompt_seconds > 0
    assert "10 new tokens at" in str(timings)
    single = model.generate(PROMPT, max_new_tokens=1).timings
    assert single.decode_tokens_per_second == 0
    assert "new tokens" not in str(single)


def test_a_result_prints_as_its_text(model):
    result = model.generate("hello", max_new_tokens=3)
    assert str(result) == result.text
    assert isinstance(result, edgeformer.Result)
    assert isinstance(model.session(), Session)
