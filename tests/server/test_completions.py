"""Completions through the official client."""

from __future__ import annotations

import pytest

PROMPT = "The quick brown"
GREEDY = {"model": "lm", "prompt": PROMPT, "max_tokens": 10}


def test_a_completion_is_that_of_generate(client, model):
    found = client.completions.create(**GREEDY)
    assert found.choices[0].text == model.generate(PROMPT, max_new_tokens=10).text
    assert found.choices[0].finish_reason == "length"
    assert found.usage.prompt_tokens == len(model.encode_prompt(PROMPT))


def test_token_ids_are_a_prompt(client, model):
    ids = model.encode_prompt(PROMPT)
    texts = [
        client.completions.create(**GREEDY | {"prompt": prompt}).choices[0].text for prompt in (ids, [ids], PROMPT)
    ]
    assert len(set(texts)) == 1


def test_several_prompts_with_several_answers_are_in_order(client, model):
    prompts = [PROMPT, "hello world"]
    sampled = {"n": 2, "temperature": 1.0, "seed": 1}
    found = client.completions.create(**GREEDY | {"prompt": prompts}, **sampled)
    expected = [one.text for prompt in prompts for one in model.generate(prompt, max_new_tokens=10, top_k=0, **sampled)]
    assert [choice.text for choice in found.choices] == expected
    assert [choice.index for choice in found.choices] == [0, 1, 2, 3]
    texts = dict.fromkeys(range(4), "")
    for chunk in client.completions.create(**GREEDY | {"prompt": prompts}, **sampled, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert list(texts.values()) == expected


def test_a_stream_ends_with_its_usage(client):
    chunks = list(client.completions.create(**GREEDY, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 10
    assert chunks[-2].choices[0].finish_reason == "length"


@pytest.mark.parametrize("stream", [False, True])
def test_echo_shows_the_prompt(client, model, stream):
    found = client.completions.create(**GREEDY, echo=True, stream=stream)
    text = "".join(chunk.choices[0].text for chunk in found) if stream else found.choices[0].text
    assert text == PROMPT + model.generate(PROMPT, max_new_tokens=10).text


def test_logprobs_of_prompt_and_answer_are_those_of_generate(client, model):
    found = client.completions.create(**GREEDY, echo=True, logprobs=1).choices[0]
    expected = model.generate(PROMPT, max_new_tokens=10, logprobs=1, prompt_logprobs=1)
    tokens = [*expected.prompt_logprobs, *expected.logprobs]
    assert found.logprobs.tokens == [one.text for one in tokens]
    assert found.logprobs.token_logprobs[0] is None
    assert found.logprobs.token_logprobs[1:] == pytest.approx([one.logprob for one in tokens[1:]])
    for text, offset in zip(found.logprobs.tokens, found.logprobs.text_offset, strict=True):
        assert "�" in text or found.text[offset:].startswith(text)


def test_streamed_logprobs_are_the_same(client):
    whole = client.completions.create(**GREEDY, logprobs=0).choices[0].logprobs
    parts = [
        chunk.choices[0].logprobs
        for chunk in client.completions.create(**GREEDY, logprobs=0, stream=True)
        if chunk.choices and chunk.choices[0].logprobs
    ]
    assert [token for part in parts for token in part.tokens] == whole.tokens
    assert [offset for part in parts for offset in part.text_offset] == whole.text_offset


def test_the_default_length_is_that_of_the_api(client):
    found = client.completions.create(model="lm", prompt=PROMPT, extra_body={"ignore_eos": True})
    assert found.usage.completion_tokens == 16


def test_a_prompt_that_fails_ends_the_others(server, client, slow, monkeypatch):
    import openai
    from support.serving import wait_for

    from edgeformer.decoding.sequence import Sequence
    from edgeformer.errors import EdgeformerError

    accept, others = Sequence.accept, set()

    def fail(self, logits, likeliest):
        if len(self.request.prompt) == 1:
            raise EdgeformerError("planted")
        others.add(self)
        accept(self, logits, likeliest)

    monkeypatch.setattr(Sequence, "accept", fail)
    with pytest.raises(openai.InternalServerError, match="planted"):
        client.completions.create(
            model="lm", prompt=[[5, 6], [7]], max_tokens=200, extra_body={"ignore_eos": True, "speculation": "off"}
        )
    wait_for(lambda: server.scheduler("lm").running == 0)
    assert [one.reason for one in others] == ["cancel"]
