"""Errors have OpenAI's body and status, and name the field; nothing is dropped silently."""

from __future__ import annotations

import httpx
import pytest

MESSAGES = [{"role": "user", "content": "hello"}]
CHAT = {"model": "lm", "messages": MESSAGES, "max_tokens": 2}
COMPLETION = {"model": "lm", "prompt": "hello", "max_tokens": 2}


def refused(server, path, status=400, **more):
    found = httpx.post(server.url + path, **more)
    assert found.status_code == status, found.text
    error = found.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    return error


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"max_token": 3}, "max_token"),
        ({"messages": None}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": "a", "foo": 1}]}, "messages[0].foo"),
        ({"messages": [{"role": "king", "content": "a"}]}, "messages[0].role"),
        ({"messages": [{"content": "a"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, None),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://h/"}}]}]},
            "messages[0].content[0].type",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0]"),
        ({"messages": [*MESSAGES, {"role": "assistant", "content": "a", "audio": {"id": "x"}}]}, "messages[1].audio"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": -1}, "temperature"),
        ({"top_p": 2}, "top_p"),
        ({"n": 0}, "n"),
        ({"n": 1.5}, "n"),
        ({"n": 100}, None),  # more than run at once
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens"),
        ({"frequency_penalty": 9}, "frequency_penalty"),
        ({"logit_bias": {"99999": 1}}, "logit_bias"),
        ({"logit_bias": {"cat": 1}}, "logit_bias"),
        ({"logprobs": True, "top_logprobs": 21}, "logprobs"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"seed": -1}, "seed"),
        ({"stop": ""}, "stop"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation"),
        ({"stream": True, "stream_options": {"foo": True}}, "stream_options.foo"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"function_call": "auto"}, "function_call"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"audio": {"voice": "alloy", "format": "wav"}}, "audio"),
        ({"store": True}, "store"),
        ({"metadata": {"a": "b"}}, "metadata"),
        ({"prediction": {"type": "content", "content": "a"}}, "prediction"),
        ({"reasoning_effort": "low"}, "reasoning_effort"),
        ({"service_tier": "flex"}, "service_tier"),
        ({"verbosity": "low"}, "verbosity"),
        ({"web_search_options": {}}, "web_search_options"),
        ({"cache_prompt": False}, "cache_prompt"),
        ({"response_format": {"type": "poem"}}, "response_format"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, None),
        ({"tools": [{"type": "web_search"}]}, None),
        ({"grammar": "nonsense("}, None),
        ({"grammar": 'root ::= "a"', "regex": "b"}, None),
        ({"json_schema": {"type": "object", "unevaluatedItems": 3}}, None),
    ],
)
def test_a_wrong_field_is_refused_by_name(server, change, param):
    body = {name: value for name, value in (CHAT | change).items() if value is not None}
    error = refused(server, "/v1/chat/completions", json=body)
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "change",
    [
        {"user": "me", "safety_identifier": "x", "prompt_cache_key": "y"},
        {"modalities": ["text"], "store": False, "metadata": {}, "service_tier": "auto"},
        {"logit_bias": {}, "stop": None, "n": None, "tools": None, "response_format": {"type": "text"}},
        {"messages": [{"role": "developer", "content": "Be short."}, *MESSAGES]},
        {"messages": [{"role": "user", "content": "a", "tool_call_id": None, "tool_calls": None}]},
        {"cache_prompt": True, "stream_options": None, "parallel_tool_calls": True},
    ],
)
def test_a_field_that_asks_for_nothing_is_taken(server, change):
    found = httpx.post(server.url + "/v1/chat/completions", json=CHAT | change)
    assert found.status_code == 200, found.text


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ["a", [1]]}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": [99999]}, None),
        ({"suffix": "end"}, "suffix"),
        ({"best_of": 3}, "best_of"),
        ({"logprobs": 99}, "logprobs"),
        ({"echo": True, "stream": True, "logprobs": 1}, "echo"),
        ({"messages": []}, "messages"),
        ({"prompt": ["a"] * 100}, "prompt"),
    ],
)
def test_a_wrong_completion_is_refused_by_name(server, change, param):
    body = {name: value for name, value in (COMPLETION | change).items() if value is not None}
    assert refused(server, "/v1/completions", json=body)["param"] == param


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_beyond_the_context_says_so(server, stream):
    error = refused(server, "/v1/completions", json=COMPLETION | {"prompt": "hello " * 3000, "stream": stream})
    assert error["code"] == "context_length_exceeded"
    assert "1024" in error["message"]


def test_an_unknown_model_is_404(server):
    error = refused(server, "/v1/chat/completions", 404, json=CHAT | {"model": "gpt-9"})
    assert (error["code"], error["param"]) == ("model_not_found", "model")
    assert httpx.get(server.url + "/v1/models/gpt-9").status_code == 404


def test_a_missing_model_is_required_where_there_are_several(server):
    assert refused(server, "/v1/chat/completions", json={"messages": MESSAGES})["param"] == "model"


def test_an_encoder_does_not_chat(server):
    assert refused(server, "/v1/chat/completions", json=CHAT | {"model": "encoder"})["param"] == "model"


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"null", b'"a"', b"\xff\xfe", b'{"model": "lm"} x', b"[" * 100_000, b'{"a":' * 50_000]
)
def test_a_body_that_is_no_request_is_400(server, content):
    refused(server, "/v1/chat/completions", content=content, headers={"Content-Type": "application/json"})


def test_a_deep_schema_is_refused_or_obeyed_and_never_crashes(server):
    schema: dict = {"type": "integer"}
    for _ in range(300):
        schema = {"type": "array", "items": schema}
    found = httpx.post(server.url + "/v1/chat/completions", json=CHAT | {"json_schema": schema}, timeout=60)
    assert found.status_code in (200, 400), found.text


@pytest.mark.parametrize("stream", [False, True])
def test_a_grammar_that_is_found_too_large_while_it_is_followed_is_the_clients_error(server, stream):
    schema = {"type": "string", "pattern": "^(a?){500}a{500}$"}  # the states of its automaton are too many
    error = refused(server, "/v1/chat/completions", json=CHAT | {"json_schema": schema, "stream": stream})
    assert "too large" in error["message"] and error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("path", "meant"),
    [
        ("/chat/completions", "/v1/chat/completions"),
        ("/v1/chat/completions/", "/v1/chat/completions"),
        ("/tokenize/", "/tokenize"),
        ("/chat/completions/", "/v1/chat/completions"),
    ],
)
def test_a_path_that_is_nearly_right_is_told_the_right_one(server, path, meant):
    """Not by a redirect: that would lead to whatever the Host header says."""
    assert f"there is {meant}." in refused(server, path, 404, json={})["message"]


def test_unknown_paths_and_methods(server):
    assert refused(server, "/v2/chat", 404, json={})["code"] == "not_found"
    assert refused(server, "/v1/models", 405, json={})["code"] == "method_not_allowed"


def test_a_defect_tells_the_client_nothing(server, monkeypatch):
    def broken(self, most):
        raise RuntimeError("secret detail")

    from edgeformer.server.chat_types import ChatRequest

    monkeypatch.setattr(ChatRequest, "conversation", broken)
    error = refused(server, "/v1/chat/completions", 500, json=CHAT)
    assert "secret" not in str(error) and error["type"] == "server_error"
