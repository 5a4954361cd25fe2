"""The Messages API through Anthropic's official client: answers are those of `Model.generate`, streamed or not."""

from __future__ import annotations

import json

import httpx
import jsonschema
import pytest

anthropic = pytest.importorskip("anthropic")

CHAT = [{"role": "user", "content": "What is the time?"}]
GREEDY = {"model": "lm", "messages": CHAT, "max_tokens": 12}
SCHEMA = {
    "type": "object",
    "properties": {"color": {"enum": ["red", "blue"]}, "coats": {"enum": [1, 2]}},
    "required": ["color", "coats"],
    "additionalProperties": False,
}
TOOL = {"name": "paint", "description": "Paints.", "input_schema": SCHEMA}
OPENAI_TOOL = {"type": "function", "function": {"name": "paint", "description": "Paints.", "parameters": SCHEMA}}
CALLING = {
    "model": "calls",
    "messages": CHAT,
    "tools": [TOOL],
    "tool_choice": {"type": "any", "disable_parallel_tool_use": True},
    "max_tokens": 200,
}


@pytest.fixture
def claude(server):
    with anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0, timeout=60) as one:
        yield one


def streamed(client, **arguments):
    """(types of the events in their order, the message that the client makes of them)."""
    with client.messages.stream(**arguments) as stream:
        types = [event.type for event in stream]
        return types, stream.get_final_message()


def raw_events(server, **body):
    """(name, data) of each event as sent."""
    text = httpx.post(server.url + "/v1/messages", json=body | {"stream": True}, timeout=60).text
    found = []
    for block in text.split("\n\n"):
        lines = dict(line.split(": ", 1) for line in block.splitlines() if not line.startswith(":"))
        if lines:
            found.append((lines["event"], json.loads(lines["data"])))
    return found


def test_an_answer_is_that_of_generate(claude, model):
    found = claude.messages.create(**GREEDY)
    assert (found.type, found.role, found.model) == ("message", "assistant", "lm")
    assert [block.type for block in found.content] == ["text"]
    assert found.content[0].text == model.generate(CHAT, max_new_tokens=12).text
    assert (found.stop_reason, found.stop_sequence) == ("max_tokens", None)
    usage = found.usage
    assert usage.input_tokens + usage.cache_read_input_tokens == len(model.encode_prompt(CHAT))
    assert usage.output_tokens == 12


def test_a_stream_has_the_official_order_and_the_same_message(server, claude):
    whole = claude.messages.create(**GREEDY)
    _, message = streamed(claude, **GREEDY)
    assert [block.text for block in message.content] == [block.text for block in whole.content]
    assert message.stop_reason == whole.stop_reason
    assert message.usage.output_tokens == 12
    events = raw_events(server, **GREEDY)
    names = [name for name, _ in events]
    assert all(data["type"] == name for name, data in events)
    deltas = names[2:-3]
    assert names[:2] == ["message_start", "content_block_start"]
    assert deltas and set(deltas) == {"content_block_delta"}
    assert names[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert events[0][1]["message"]["content"] == [] and events[0][1]["message"]["stop_reason"] is None


@pytest.mark.parametrize(
    "fields", [{"temperature": 0}, {"temperature": 50, "top_k": 1}, {"temperature": 50, "top_p": 1e-9}]
)
def test_one_candidate_is_the_greedy_one(claude, model, fields):
    found = claude.messages.create(**GREEDY, extra_body=fields)
    assert found.content[0].text == model.generate(CHAT, max_new_tokens=12).text


def test_a_high_temperature_changes_answers(claude):
    answers = [claude.messages.create(**GREEDY, extra_body={"temperature": 50}).content for _ in "123"]
    assert len({"".join(block.text for block in blocks) for blocks in answers}) > 1  # one may end at once


def test_system_and_blocks_and_neighbours_are_one_conversation(claude, model):
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "What is"}, {"type": "text", "text": "the time?"}]},
        {"role": "user", "content": "Say it."},
        {"role": "assistant", "content": [{"type": "text", "text": "Noon."}]},
        {"role": "user", "content": "And now?"},
    ]
    same = [
        {"role": "system", "content": "Be short.\nBe kind."},
        {"role": "user", "content": "What is\nthe time?\nSay it."},
        {"role": "assistant", "content": "Noon."},
        {"role": "user", "content": "And now?"},
    ]
    system = [
        {"type": "text", "text": one, "cache_control": {"type": "ephemeral"}} for one in ("Be short.", "Be kind.")
    ]
    found = claude.messages.create(model="lm", messages=messages, system=system, max_tokens=12)
    assert found.content[0].text == model.generate(same, max_new_tokens=12).text
    counted = claude.messages.count_tokens(model="lm", messages=messages, system=system)
    assert counted.input_tokens == len(model.encode_prompt(same))


def test_a_stop_sequence_is_named_and_not_shown(claude, model):
    whole = model.generate(CHAT, max_new_tokens=12).text
    stop = whole[4:7]
    arguments = GREEDY | {"stop_sequences": ["never", stop]}
    for found in (claude.messages.create(**arguments), streamed(claude, **arguments)[1]):
        assert "".join(block.text for block in found.content) == whole[: whole.index(stop)]
        assert (found.stop_reason, found.stop_sequence) == ("stop_sequence", stop)


@pytest.mark.parametrize("name", ["calls", "lm"])  # "lm" has a template without calls
@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "paint"}])
def test_a_forced_call_is_a_block(claude, name, choice):
    arguments = CALLING | {"model": name, "tool_choice": choice | {"disable_parallel_tool_use": True}}
    whole = claude.messages.create(**arguments)
    types, message = streamed(claude, **arguments)
    for found in (whole, message):
        assert found.stop_reason == "tool_use"
        (block,) = found.content
        assert (block.type, block.name) == ("tool_use", "paint")
        assert block.id
        jsonschema.validate(block.input, SCHEMA)
    assert message.content[0].input == whole.content[0].input
    assert "input_json" in types


def test_a_conversation_goes_on_after_a_call(claude, server):
    called = claude.messages.create(**CALLING)
    result = {"type": "tool_result", "tool_use_id": called.content[0].id}
    for content in ("done", [{"type": "text", "text": "done"}]):
        messages = [
            *CHAT,
            {"role": "assistant", "content": called.content},
            {"role": "user", "content": [result | {"content": content}, {"type": "text", "text": "Go on."}]},
        ]
        more = {"model": "calls", "messages": messages, "tools": [TOOL], "tool_choice": {"type": "none"}}
        found = claude.messages.create(**more, max_tokens=4)
        assert found.stop_reason == "max_tokens"
        usage = found.usage
        counted = claude.messages.count_tokens(**more).input_tokens
        assert counted == usage.input_tokens + usage.cache_read_input_tokens
        arguments = json.dumps(called.content[0].input, separators=(",", ":"))
        function = {"name": "paint", "arguments": arguments}
        call = {"id": called.content[0].id, "type": "function", "function": function}
        same = [
            *CHAT,
            {"role": "assistant", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": call["id"], "content": "done"},
            {"role": "user", "content": "Go on."},
        ]
        with server.client() as openai:
            theirs = openai.chat.completions.create(
                model="calls", messages=same, tools=[OPENAI_TOOL], tool_choice="none", max_tokens=4
            )
        assert theirs.usage.prompt_tokens == counted
        assert theirs.choices[0].message.content == found.content[0].text


def test_a_failed_tool_says_so_in_the_prompt(claude):
    def counted(**more):
        result = {"type": "tool_result", "tool_use_id": "a", "content": "x", **more}
        call = {"type": "tool_use", "id": "a", "name": "paint", "input": {}}
        messages = [*CHAT, {"role": "assistant", "content": [call]}, {"role": "user", "content": [result]}]
        return claude.messages.count_tokens(model="calls", messages=messages, tools=[TOOL]).input_tokens

    assert counted(is_error=True) > counted(is_error=False) == counted()


def test_reasoning_is_a_block_of_its_own(claude, server):
    arguments = {"model": "reasons", "messages": CHAT, "max_tokens": 8}
    whole = claude.messages.create(**arguments)
    (block,) = whole.content  # the prompt opens reasoning, which does not end
    assert block.type == "thinking" and block.thinking
    _, message = streamed(claude, **arguments)
    assert message.content[0].thinking == block.thinking
    kinds = [data["delta"]["type"] for name, data in raw_events(server, **arguments) if name == "content_block_delta"]
    assert set(kinds[:-1]) == {"thinking_delta"} and kinds[-1] == "signature_delta"
    messages = [*CHAT, {"role": "assistant", "content": whole.content}, *CHAT]
    assert claude.messages.create(model="reasons", messages=messages, max_tokens=2).usage.output_tokens == 2


def test_a_schema_is_obeyed(claude):
    form = {"format": {"type": "json_schema", "schema": SCHEMA}}
    found = claude.messages.create(model="lm", messages=CHAT, max_tokens=100, output_config=form)
    jsonschema.validate(json.loads(found.content[0].text), SCHEMA)
    assert found.stop_reason == "end_turn"


def test_a_repeated_beginning_is_read_from_the_cache(claude):
    long = [{"role": "user", "content": "my quick fox jumps over a log " * 10}]
    counted = claude.messages.count_tokens(model="lm", messages=long).input_tokens
    first, second = (claude.messages.create(model="lm", messages=long, max_tokens=2).usage for _ in range(2))
    assert first.cache_read_input_tokens < 128 <= second.cache_read_input_tokens
    for usage in (first, second):
        assert usage.input_tokens + usage.cache_read_input_tokens == counted


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"max_token": 3}, "max_token"),
        ({"max_tokens": None}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": [*CHAT, {"role": "assistant", "content": "It is"}]}, "messages"),
        ({"messages": [{"role": "user", "content": "a", "foo": 1}]}, "messages[0].foo"),
        ({"messages": [{"role": "king", "content": "a"}]}, "messages[0].role"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "source": {"type": "url", "url": "x"}}]}]},
            "messages[0].content[0]",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "thinking", "thinking": "x"}]}]},
            "messages[0].content[0]",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "x", "citations": [{}]}]}]},
            "messages[0].content[0].citations",
        ),
        ({"system": 5}, "system"),
        ({"temperature": -1}, "temperature"),
        ({"top_p": 2}, "top_p"),
        ({"stop_sequences": [""]}, "stop_sequences"),
        ({"stop_sequences": "a"}, "stop_sequences"),
        ({"model": "reasons", "thinking": {"type": "disabled"}}, "thinking.type"),
        ({"thinking": {"type": "between_tools"}}, "thinking.type"),
        ({"thinking": {"type": "enabled", "budget_tokens": 5}}, "thinking.budget_tokens"),
        ({"thinking": {"type": "adaptive", "display": "omitted"}}, "thinking.display"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0]"),
        ({"tools": [TOOL | {"defer_loading": True}]}, "tools[0].defer_loading"),
        ({"tools": [TOOL | {"name": "a b"}]}, "a b"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "tool"}}, "tool_choice.name"),
        ({"tools": [TOOL], "tool_choice": {"type": "tool", "name": "x"}}, "tool_choice"),
        ({"output_config": {"effort": "low"}}, "output_config.effort"),
        ({"service_tier": "fast"}, "service_tier"),
        ({"container": "x"}, "container"),
        ({"mcp_servers": [{"type": "url", "url": "http://h/"}]}, "mcp_servers"),
        ({"context_management": {"edits": [{"type": "clear_tool_uses_20250919"}]}}, "context_management"),
        ({"speed": "fast"}, "speed"),
        ({"metadata": {"user": "x"}}, "metadata.user"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_wrong_field_is_refused_by_name(server, change, name, stream):
    body = {key: value for key, value in (GREEDY | {"stream": stream} | change).items() if value is not None}
    found = httpx.post(server.url + "/v1/messages", json=body)
    assert found.status_code == 400, found.text
    error = found.json()
    assert set(error) == {"type", "error", "request_id"}
    assert error["type"] == "error"
    assert error["error"]["type"] == "invalid_request_error"
    assert name in error["error"]["message"]
    assert error["request_id"] == found.headers["request-id"]


@pytest.mark.parametrize(
    "change",
    [
        {"metadata": {"user_id": "me"}, "service_tier": "auto"},
        {"thinking": {"type": "adaptive"}},
        {"thinking": {"type": "disabled"}},
        {"thinking": {"type": "enabled", "budget_tokens": 11}},
        {"cache_control": {"type": "ephemeral", "ttl": "1h"}, "stop_sequences": []},
        {"model": "calls", "tools": [TOOL | {"type": "custom", "cache_control": {"type": "ephemeral"}}]},
    ],
)
def test_a_field_that_asks_for_nothing_is_taken(server, change):
    found = httpx.post(server.url + "/v1/messages", json=GREEDY | change)
    assert found.status_code == 200, found.text


def test_errors_are_those_of_the_official_client(claude, server):
    with pytest.raises(anthropic.NotFoundError) as caught:
        claude.messages.create(**GREEDY | {"model": "gpt-9"})
    assert caught.value.body["error"]["type"] == "not_found_error"
    assert caught.value.request_id
    with pytest.raises(anthropic.BadRequestError, match="1024"):
        claude.messages.create(**GREEDY | {"messages": [{"role": "user", "content": "hello " * 3000}]})
    assert httpx.get(server.url + "/v1/messages").json()["type"] == "error"


def test_a_missing_key_is_an_authentication_error(served):
    from support import serving

    with serving.running([f"lm={served['lm']}"], {"api_key": "secret"}) as one:
        for key, refused in (("wrong", True), ("secret", False)):
            with anthropic.Anthropic(base_url=one.url, api_key=key, max_retries=0) as client:
                if refused:
                    with pytest.raises(anthropic.AuthenticationError) as caught:
                        client.messages.create(**GREEDY)
                    assert caught.value.body["error"]["type"] == "authentication_error"
                else:
                    assert client.messages.create(**GREEDY).usage.output_tokens == 12


def test_a_failure_within_a_stream_is_its_last_event(server, monkeypatch):
    from edgeformer.server.messages import Blocks

    def broken(self):
        raise RuntimeError("secret detail")

    monkeypatch.setattr(Blocks, "close", lambda self: broken(self) if self._is_open else [])
    events = raw_events(server, **GREEDY)
    assert [name for name, _ in events[:2]] == ["message_start", "content_block_start"]
    name, data = events[-1]
    assert (name, data["type"], data["error"]["type"]) == ("error", "error", "api_error")
    assert "secret" not in str(data)
