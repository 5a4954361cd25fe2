"""The Responses API through the official client: answers are those of `Model.generate`, streamed or not."""

from __future__ import annotations

import json

import httpx
import jsonschema
import pytest

CHAT = [{"role": "user", "content": "What is the time?"}]
GREEDY = {"model": "lm", "input": "What is the time?", "max_output_tokens": 12}
SCHEMA = {
    "type": "object",
    "properties": {"color": {"enum": ["red", "blue"]}, "coats": {"enum": [1, 2]}},
    "required": ["color", "coats"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "name": "paint", "description": "Paints.", "parameters": SCHEMA, "strict": True}
CALLING = {
    "model": "calls",
    "input": CHAT,
    "tools": [TOOL],
    "tool_choice": "required",
    "parallel_tool_calls": False,
    "max_output_tokens": 200,
}
TEXT = ["response.output_item.added", "response.content_part.added"]
TEXT_END = ["response.output_text.done", "response.content_part.done", "response.output_item.done"]


def streamed(client, **arguments):
    """(events, the response in the last one)."""
    events = list(client.responses.create(**arguments, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    return events, events[-1].response


def without_delta(events):
    return [event.type for event in events if not event.type.endswith(".delta")]


def plain(items):
    """Items without their ids, which differ between answers."""
    return [{k: v for k, v in one.model_dump().items() if k not in ("id", "call_id")} for one in items]


def test_an_answer_is_that_of_generate(client, model):
    found = client.responses.create(**GREEDY)
    assert found.output_text == model.generate(CHAT, max_new_tokens=12).text
    assert (found.object, found.status, found.model) == ("response", "incomplete", "lm")
    assert found.incomplete_details.reason == "max_output_tokens"
    assert [(item.type, item.status) for item in found.output] == [("message", "incomplete")]
    assert found.usage.input_tokens == len(model.encode_prompt(CHAT))
    assert found.usage.output_tokens == 12
    assert found.usage.total_tokens == found.usage.input_tokens + 12
    assert (found.temperature, found.max_output_tokens, found.store) == (0.0, 12, False)


def test_a_stream_has_the_official_order_and_the_same_response(client):
    whole = client.responses.create(**GREEDY)
    events, found = streamed(client, **GREEDY)
    assert plain(found.output) == plain(whole.output)
    assert found.usage.output_tokens == whole.usage.output_tokens
    head = ["response.created", "response.in_progress"]
    assert without_delta(events) == [*head, *TEXT, *TEXT_END, "response.incomplete"]
    assert events[0].response.status == "in_progress" and events[0].response.output == []
    deltas = [event for event in events if event.type == "response.output_text.delta"]
    assert "".join(event.delta for event in deltas) == found.output_text
    (item,) = found.output
    assert {event.item_id for event in deltas} == {item.id}
    with client.responses.stream(**GREEDY) as stream:  # the client's own assembly
        assert "".join(event.delta for event in stream if event.type == "response.output_text.delta") == (
            whole.output_text
        )


@pytest.mark.parametrize("fields", [{"temperature": 0.0}, {"temperature": 50.0, "top_p": 1e-9}])
def test_one_candidate_is_the_greedy_one(client, model, fields):
    found = client.responses.create(**GREEDY, **fields)
    assert found.output_text == model.generate(CHAT, max_new_tokens=12).text
    assert (found.temperature, found.top_p) == (fields["temperature"], fields.get("top_p", 1.0))


def test_a_high_temperature_changes_answers(client):
    assert len({client.responses.create(**GREEDY, temperature=50.0).output_text for _ in range(3)}) > 1


def test_instructions_and_items_are_one_conversation(client, model):
    items = [
        {"role": "developer", "content": "Be kind."},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "What is"}]},
        {
            "type": "message",
            "role": "assistant",
            "id": "msg_1",
            "status": "completed",
            "content": [{"type": "output_text", "text": "Noon.", "annotations": []}],
        },
        {"role": "user", "content": "And now?"},
    ]
    same = [
        {"role": "system", "content": "Be short.\nBe kind."},
        {"role": "user", "content": "What is"},
        {"role": "assistant", "content": "Noon."},
        {"role": "user", "content": "And now?"},
    ]
    found = client.responses.create(model="lm", input=items, instructions="Be short.", max_output_tokens=12)
    assert found.output_text == model.generate(same, max_new_tokens=12).text
    assert found.instructions == "Be short."
    assert found.usage.input_tokens == len(model.encode_prompt(same))


@pytest.mark.parametrize("name", ["calls", "lm"])  # "lm" has a template without calls
@pytest.mark.parametrize("choice", ["required", {"type": "function", "name": "paint"}])
def test_a_forced_call_is_an_item(client, name, choice):
    arguments = CALLING | {"model": name, "tool_choice": choice}
    whole = client.responses.create(**arguments)
    events, last = streamed(client, **arguments)
    for found in (whole, last):
        assert found.status == "completed"
        (item,) = found.output
        assert (item.type, item.name, item.status) == ("function_call", "paint", "completed")
        assert item.call_id
        jsonschema.validate(json.loads(item.arguments), SCHEMA)
    assert plain(last.output) == plain(whole.output)
    assert [event.type for event in events[2:-1]] == [
        "response.output_item.added",
        "response.function_call_arguments.delta",
        "response.function_call_arguments.done",
        "response.output_item.done",
    ]
    assert events[2].item.arguments == ""
    assert events[3].delta == events[4].arguments == last.output[0].arguments


def test_a_conversation_goes_on_after_a_call(client):
    (item,) = client.responses.create(**CALLING).output
    result = {"type": "function_call_output", "call_id": item.call_id, "output": "done"}
    function = {"name": item.name, "arguments": item.arguments}
    same = [
        *CHAT,
        {"role": "assistant", "tool_calls": [{"id": item.call_id, "type": "function", "function": function}]},
        {"role": "tool", "tool_call_id": item.call_id, "content": "done"},
    ]
    tool = {"type": "function", "function": {k: v for k, v in TOOL.items() if k != "type"}}
    theirs = client.chat.completions.create(
        model="calls", messages=same, tools=[tool], tool_choice="none", max_tokens=4
    )
    for sent in (
        item.model_dump(exclude_none=True),
        dict(function) | {"type": "function_call", "call_id": item.call_id},
    ):
        found = client.responses.create(
            model="calls", input=[*CHAT, sent, result], tools=[TOOL], tool_choice="none", max_output_tokens=4
        )
        assert found.usage.input_tokens == theirs.usage.prompt_tokens
        assert found.output_text == theirs.choices[0].message.content


def test_reasoning_is_an_item_of_its_own(client):
    arguments = {"model": "reasons", "input": CHAT, "max_output_tokens": 8}
    whole = client.responses.create(**arguments)
    (item,) = whole.output  # the prompt opens reasoning, which does not end
    assert (item.type, item.summary) == ("reasoning", [])
    assert item.content[0].text
    assert whole.output_text == ""
    assert whole.usage.output_tokens_details.reasoning_tokens > 0
    events, last = streamed(client, **arguments)
    assert plain(last.output) == plain(whole.output)
    deltas = [event.delta for event in events if event.type == "response.reasoning_text.delta"]
    assert "".join(deltas) == item.content[0].text
    sent = [*CHAT, item.model_dump(exclude_none=True), *CHAT]
    assert client.responses.create(model="reasons", input=sent, max_output_tokens=2).usage.output_tokens == 2


def test_a_schema_is_obeyed(client):
    form = {"format": {"type": "json_schema", "name": "paint", "schema": SCHEMA, "strict": True}}
    found = client.responses.create(model="lm", input=CHAT, text=form, max_output_tokens=100)
    jsonschema.validate(json.loads(found.output_text), SCHEMA)
    assert found.status == "completed"
    assert found.text.format.name == "paint"
    found = client.responses.create(
        model="lm", input=CHAT, text={"format": {"type": "json_object"}}, max_output_tokens=9
    )
    assert found.output_text.startswith("{")


def test_logprobs_are_those_of_generate(client, model):
    expected = model.generate(CHAT, max_new_tokens=12, logprobs=2).logprobs
    arguments = GREEDY | {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
    whole = client.responses.create(**arguments)
    events, _ = streamed(client, **arguments)
    pieces = [one for event in events if event.type == "response.output_text.delta" for one in event.logprobs]
    for found in (whole.output[0].content[0].logprobs, pieces):
        assert [one.token for one in found] == [one.text for one in expected]
        assert [one.logprob for one in found] == pytest.approx([one.logprob for one in expected])
        assert all(len(one.top_logprobs) == 2 for one in found)


def test_a_repeated_beginning_is_cached(client):
    long = "one lazy dog sits below its quick fox " * 10
    first, second = (client.responses.create(model="lm", input=long, max_output_tokens=2).usage for _ in range(2))
    assert first.input_tokens == second.input_tokens
    assert first.input_tokens_details.cached_tokens < 128 <= second.input_tokens_details.cached_tokens


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"max_tokens": 3}, "max_tokens"),
        ({"input": None}, "input"),
        ({"input": []}, "input"),
        ({"input": [{"role": "king", "content": "a"}]}, "input[0].role"),
        ({"input": [{"role": "user", "content": "a", "foo": 1}]}, "input[0].foo"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input[0].type"),
        ({"input": [*CHAT, {"type": "reasoning", "id": "r", "summary": [{"text": "x"}]}]}, "input[1].summary"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "http://h/"}]}]},
            "input[0].content[0].type",
        ),
        ({"input": [{"role": "user", "content": [{"type": "input_text"}]}]}, "input[0].content[0].text"),
        ({"input": [{"type": "function_call", "name": "f", "arguments": "{}"}]}, "input[0].call_id"),
        ({"store": True}, "store"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"conversation": "c"}, "conversation"),
        ({"background": True}, "background"),
        ({"truncation": "auto"}, "truncation"),
        ({"temperature": -1}, "temperature"),
        ({"top_p": 2}, "top_p"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"include": ["file_search_call.results"]}, "include[0]"),
        ({"reasoning": {"effort": "low"}}, "reasoning.effort"),
        ({"text": {"verbosity": "low"}}, "text.verbosity"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema"),
        ({"text": {"format": {"type": "text", "name": "x"}}}, "text.format.name"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [TOOL | {"defer_loading": True}]}, "tools[0].defer_loading"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": []}}, "tool_choice"),
        ({"stream_options": {"include_obfuscation": False}}, "stream_options"),
        ({"service_tier": "flex"}, "service_tier"),
        ({"max_tool_calls": 3}, "max_tool_calls"),
        ({"prompt": {"id": "p"}}, "prompt"),
        ({"seed": 3}, "seed"),
    ],
)
def test_a_wrong_field_is_refused_by_name(server, change, param):
    body = {name: value for name, value in (GREEDY | change).items() if value is not None}
    found = httpx.post(server.url + "/v1/responses", json=body)
    assert found.status_code == 400, found.text
    assert found.json()["error"]["type"] == "invalid_request_error"
    error = found.json()["error"]
    assert error["param"] == param or (error["param"] is None and param in error["message"]), error


@pytest.mark.parametrize(
    "change",
    [
        {"store": False, "background": False, "truncation": "disabled", "service_tier": "auto"},
        {"user": "me", "safety_identifier": "x", "prompt_cache_key": "y", "metadata": {"a": "b"}},
        {"reasoning": {"effort": None}, "text": {"format": {"type": "text"}, "verbosity": "medium"}, "tools": []},
    ],
)
def test_a_field_that_asks_for_nothing_is_taken(server, change):
    found = httpx.post(server.url + "/v1/responses", json=GREEDY | change)
    assert found.status_code == 200, found.text
    assert found.json()["metadata"] == change.get("metadata", {})


def test_a_failure_within_a_stream_is_its_last_event(client, monkeypatch):
    from edgeformer.server.responses_items import Output

    def broken(self, status):
        if self.is_open:
            raise RuntimeError("secret detail")
        return []

    monkeypatch.setattr(Output, "close", broken)
    events, last = streamed(client, **GREEDY)
    assert events[-1].type == "response.failed"
    assert (last.status, last.error.code) == ("failed", "server_error")
    assert "secret" not in last.error.message


def test_a_stream_ends_with_done(server):
    text = httpx.post(server.url + "/v1/responses", json=GREEDY | {"stream": True}).text
    assert text.endswith("data: [DONE]\n\n")
    names = [line.removeprefix("event: ") for line in text.splitlines() if line.startswith("event: ")]
    data = [json.loads(line.removeprefix("data: ")) for line in text.splitlines() if line.startswith("data: {")]
    assert names == [one["type"] for one in data]
