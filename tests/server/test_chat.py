"""Chat completions through the official client: the answers are those of `Model.generate`, streamed or not."""

from __future__ import annotations

import json

import jsonschema
import pytest
from support.serving import wait_for

CHAT = [{"role": "user", "content": "What is the time?"}]
GREEDY = {"model": "lm", "messages": CHAT, "max_tokens": 12}
TOOL = {
    "type": "function",
    "function": {
        "name": "paint",
        "description": "Paints.",
        "parameters": {
            "type": "object",
            "properties": {"color": {"enum": ["red", "blue"]}, "coats": {"enum": [1, 2]}},
            "required": ["color", "coats"],
            "additionalProperties": False,
        },
    },
}


def streamed(client, **arguments):
    """(chunks, text of each choice, finish reasons)."""
    chunks = list(client.chat.completions.create(**arguments, stream=True))
    texts, ends = {}, {}
    for chunk in chunks:
        for choice in chunk.choices:
            assert choice.index not in ends, "a choice went on after its end"
            texts[choice.index] = texts.get(choice.index, "") + (choice.delta.content or "")
            if choice.finish_reason:
                ends[choice.index] = choice.finish_reason
    return chunks, texts, ends


def test_an_answer_is_that_of_generate(client, model):
    found = client.chat.completions.create(**GREEDY)
    expected = model.generate(CHAT, max_new_tokens=12)
    assert found.choices[0].message.content == expected.text
    assert found.choices[0].message.role == "assistant"
    assert found.choices[0].finish_reason == "length"
    assert found.usage.prompt_tokens == len(model.encode_prompt(CHAT))
    assert found.usage.completion_tokens == 12
    assert found.usage.total_tokens == found.usage.prompt_tokens + 12
    assert found.timings["predicted_n"] == 12


def test_a_stream_has_the_same_text(client, model):
    chunks, texts, ends = streamed(client, **GREEDY)
    assert texts == {0: model.generate(CHAT, max_new_tokens=12).text}
    assert ends == {0: "length"}
    assert chunks[0].choices[0].delta.role == "assistant"
    assert len({chunk.id for chunk in chunks}) == 1
    assert all(chunk.usage is None for chunk in chunks)
    assert chunks[-1].timings["predicted_n"] == 12


def test_a_stream_with_usage_ends_with_it(client):
    chunks, _, _ = streamed(client, **GREEDY, stream_options={"include_usage": True})
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 12
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_several_answers_have_their_own_index_and_seed(client, model):
    sampled = GREEDY | {"n": 3, "temperature": 1.0, "seed": 5}
    found = client.chat.completions.create(**sampled)
    expected = [one.text for one in model.generate(CHAT, max_new_tokens=12, n=3, temperature=1.0, seed=5, top_k=0)]
    assert [choice.message.content for choice in found.choices] == expected
    assert [choice.index for choice in found.choices] == [0, 1, 2]
    assert found.usage.completion_tokens == 36
    _, texts, ends = streamed(client, **sampled)
    assert texts == dict(enumerate(expected))
    assert ends == dict.fromkeys(range(3), "length")


@pytest.mark.parametrize(
    ("fields", "ours"),
    [
        ({"frequency_penalty": 1.5, "presence_penalty": 0.5}, {"frequency_penalty": 1.5, "presence_penalty": 0.5}),
        ({"logit_bias": {"40": 100}}, {"logit_bias": {40: 100}}),
        ({"temperature": 3.0, "top_p": 0.9, "seed": 3}, {"temperature": 3.0, "top_p": 0.9, "seed": 3, "top_k": 0}),
        (
            {"temperature": 4.0, "seed": 3, "extra_body": {"top_k": 4, "min_p": 0.1, "repeat_penalty": 1.3}},
            {"temperature": 4.0, "seed": 3, "top_k": 4, "min_p": 0.1, "repetition_penalty": 1.3},
        ),
        ({"extra_body": {"grammar": 'root ::= "yes" | "no"'}}, {"grammar": 'root ::= "yes" | "no"'}),
        ({"extra_body": {"regex": "[a-c]{5}"}}, {"regex": "[a-c]{5}"}),
        ({"extra_body": {"choices": ["left", "right"]}}, {"choices": ["left", "right"]}),
        ({"extra_body": {"ignore_eos": True, "speculation": "off"}}, {"ignore_eos": True}),
    ],
)
def test_fields_mean_what_the_arguments_of_generate_mean(client, model, fields, ours):
    found = client.chat.completions.create(**GREEDY, **fields)
    expected = model.generate(CHAT, max_new_tokens=12, **ours)
    assert found.choices[0].message.content == expected.text
    plain = model.generate(CHAT, max_new_tokens=12)
    assert "ignore_eos" in ours or expected.text != plain.text  # the field changes something


def test_a_stop_text_ends_and_is_not_shown(client, model):
    whole = model.generate(CHAT, max_new_tokens=12).text
    stop = whole[4:7]
    for stops in (stop, [stop, "never"]):
        found = client.chat.completions.create(**GREEDY, stop=stops)
        assert found.choices[0].message.content == whole[: whole.index(stop)]
        assert found.choices[0].finish_reason == "stop"
    _, texts, ends = streamed(client, **GREEDY, stop=stop)
    assert (texts, ends) == ({0: whole[: whole.index(stop)]}, {0: "stop"})


def test_without_a_limit_an_answer_fills_the_context(client, model):
    found = client.chat.completions.create(model="lm", messages=CHAT, extra_body={"ignore_eos": True})
    context = model.info["context"]
    assert found.usage.total_tokens in (context, context + 1)
    assert found.choices[0].finish_reason == "length"


def test_logprobs_are_those_of_generate_in_both_forms(client, model):
    expected = model.generate(CHAT, max_new_tokens=12, logprobs=2).logprobs
    whole = client.chat.completions.create(**GREEDY, logprobs=True, top_logprobs=2).choices[0].logprobs.content
    chunks, _, _ = streamed(client, **GREEDY, logprobs=True, top_logprobs=2)
    pieces = [one for chunk in chunks for choice in chunk.choices if choice.logprobs for one in choice.logprobs.content]
    for found in (whole, pieces):
        assert [one.token for one in found] == [one.text for one in expected]
        assert [bytes(one.bytes) for one in found] == [one.bytes for one in expected]
        assert [one.logprob for one in found] == pytest.approx([one.logprob for one in expected])
        assert all(len(one.top_logprobs) == 2 for one in found)


def test_a_repeated_beginning_is_cached(client):
    long = [{"role": "user", "content": "the lazy dog jumps over " * 10}]
    for cached in (False, True):
        found = client.chat.completions.create(model="lm", messages=long, max_tokens=2)
        assert (found.usage.prompt_tokens_details.cached_tokens >= 100) == cached
    assert found.timings["cache_n"] == found.usage.prompt_tokens_details.cached_tokens


def test_content_parts_are_joined(client):
    parts = [{"type": "text", "text": "What is"}, {"type": "text", "text": "the time?"}]
    found = client.chat.completions.create(**GREEDY | {"messages": [{"role": "user", "content": parts}]})
    same = client.chat.completions.create(**GREEDY | {"messages": [{"role": "user", "content": "What is\nthe time?"}]})
    assert found.choices[0].message.content == same.choices[0].message.content


def test_a_json_schema_is_obeyed(client):
    schema = TOOL["function"]["parameters"]
    form = {"type": "json_schema", "json_schema": {"name": "paint", "schema": schema, "strict": True}}
    found = client.chat.completions.create(model="lm", messages=CHAT, response_format=form, max_tokens=100)
    jsonschema.validate(json.loads(found.choices[0].message.content), schema)
    assert found.choices[0].finish_reason == "stop"


def test_a_json_object_begins_as_one(client):
    form = {"type": "json_object"}
    found = client.chat.completions.create(model="lm", messages=CHAT, response_format=form, max_tokens=20)
    assert found.choices[0].message.content.startswith("{")


@pytest.mark.parametrize("name", ["calls", "lm"])  # "lm" has a template without calls
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "paint"}}])
def test_a_forced_call_comes_in_both_forms(client, name, choice):
    arguments = {"model": name, "messages": CHAT, "tools": [TOOL], "tool_choice": choice, "max_tokens": 200}
    arguments["parallel_tool_calls"] = False
    found = client.chat.completions.create(**arguments).choices[0]
    assert found.finish_reason == "tool_calls"
    assert found.message.content is None
    (call,) = found.message.tool_calls
    assert call.type == "function" and call.function.name == "paint"
    jsonschema.validate(json.loads(call.function.arguments), TOOL["function"]["parameters"])

    chunks, texts, ends = streamed(client, **arguments)
    deltas = [one for chunk in chunks for each in chunk.choices for one in each.delta.tool_calls or ()]
    assert [one.index for one in deltas] == [0]
    assert deltas[0].id and deltas[0].type == "function"
    assert deltas[0].function.name == "paint"
    assert deltas[0].function.arguments == call.function.arguments
    assert (texts, ends) == ({0: ""}, {0: "tool_calls"})


def test_a_conversation_goes_on_after_a_call(client):
    arguments = {"model": "calls", "messages": CHAT, "tools": [TOOL], "tool_choice": "required", "max_tokens": 200}
    message = client.chat.completions.create(**arguments, parallel_tool_calls=False).choices[0].message
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "done"}
    for sent in (message.model_dump(), message.model_dump(exclude_none=True)):
        found = client.chat.completions.create(
            model="calls", messages=[*CHAT, sent, result], tools=[TOOL], tool_choice="none", max_tokens=4
        )
        assert found.choices[0].finish_reason == "length"
        assert found.choices[0].message.tool_calls is None


def test_reasoning_is_apart_from_content(client):
    arguments = {"model": "reasons", "messages": CHAT, "max_tokens": 8}
    message = client.chat.completions.create(**arguments).choices[0].message
    assert message.reasoning_content and not message.content  # the prompt opens reasoning, which does not end
    chunks = list(client.chat.completions.create(**arguments, stream=True))
    deltas = [choice.delta for chunk in chunks for choice in chunk.choices]
    assert "".join(getattr(one, "reasoning_content", None) or "" for one in deltas) == message.reasoning_content
    assert not any(one.content for one in deltas)


def test_the_async_client_works_too(server):
    import asyncio

    import openai

    async def talk():
        async with openai.AsyncOpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client:
            stream = await client.chat.completions.create(**GREEDY, stream=True)
            return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    async def together():
        return await asyncio.gather(*(talk() for _ in range(12)))

    assert len(set(asyncio.run(together()))) == 1


def test_streams_that_run_together_join_tokens_and_keep_their_text(server, model):
    from concurrent.futures import ThreadPoolExecutor

    def talk(number):
        with server.client() as client:
            messages = [{"role": "user", "content": f"Number {number}"}]
            more = {"max_tokens": 150, "extra_body": {"ignore_eos": True, "speculation": "off"}}
            chunks, texts, _ = streamed(client, model="lm", messages=messages, **more)
            return texts[0] == model.generate(messages, max_new_tokens=150, ignore_eos=True).text, len(chunks)

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(talk, range(8)))
    assert all(same for same, _ in found)
    assert sum(count for _, count in found) < 8 * 100
    wait_for(lambda: server.loaded("lm").streams == 0)
