"""Every field of the official request types is decided: followed, or refused by its name. A new one fails here."""

from __future__ import annotations

import io
import typing
from dataclasses import dataclass, field

import httpx
import pytest
from support import speech

anthropic = pytest.importorskip("anthropic")

from anthropic.types import message_count_tokens_params as count_tokens
from anthropic.types import message_create_params as messages
from openai.types import completion_create_params as completions
from openai.types import embedding_create_params as embeddings
from openai.types.audio import transcription_create_params as transcriptions
from openai.types.audio import translation_create_params as translations
from openai.types.chat import completion_create_params as chat
from openai.types.responses import response_create_params as responses

CHAT = [{"role": "user", "content": "hello"}]
TOOL = {"type": "function", "function": {"name": "paint", "parameters": {"type": "object", "properties": {}}}}
OWN_TOOL = {"type": "function", "name": "paint", "parameters": {"type": "object", "properties": {}}, "strict": True}
CLAUDE_TOOL = {"name": "paint", "input_schema": {"type": "object", "properties": {}}}
SCHEMA = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}


@dataclass(frozen=True)
class Route:
    """`body` is enough for an answer. followed, refused: field -> a value, with what it needs beside it, that asks for
    something. taken: fields that nothing depends on."""

    path: str
    types: tuple[type, ...]
    body: dict
    followed: dict
    taken: dict = field(default_factory=dict)
    refused: dict = field(default_factory=dict)

    @property
    def decided(self):
        return {*self.body, *self.followed, *self.taken, *self.refused}


def with_others(name, value):
    """The fields of an example: `value`, or of a tuple the value and other fields."""
    return {name: value[0], **value[1]} if isinstance(value, tuple) else {name: value}


ROUTES = {
    "chat": Route(
        "/v1/chat/completions",
        (chat.CompletionCreateParamsNonStreaming, chat.CompletionCreateParamsStreaming),
        {"model": "lm", "messages": CHAT, "max_tokens": 4},
        {
            "frequency_penalty": 0.5,
            "logit_bias": {"40": -100},
            "logprobs": True,
            "max_completion_tokens": (3, {"max_tokens": None}),
            "n": 2,
            "parallel_tool_calls": (False, {"tools": [TOOL], "tool_choice": "required", "max_tokens": 200}),
            "presence_penalty": 0.5,
            "reasoning_effort": ("high", {"model": "effort"}),
            "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}},
            "seed": 3,
            "stop": ["x"],
            "stream": True,
            "stream_options": ({"include_usage": True}, {"stream": True}),
            "temperature": 0.5,
            "tool_choice": ("required", {"tools": [TOOL], "max_tokens": 200}),
            "tools": ([TOOL], {"tool_choice": "none"}),
            "top_logprobs": (2, {"logprobs": True}),
            "top_p": 0.5,
        },
        {"prompt_cache_key": "a", "safety_identifier": "a", "user": "a"},
        {
            "audio": {"voice": "alloy", "format": "wav"},
            "function_call": "auto",
            "functions": [{"name": "f"}],
            "metadata": {"a": "b"},
            "modalities": ["audio"],
            "moderation": {"model": "omni-moderation-latest"},
            "prediction": {"type": "content", "content": "a"},
            "prompt_cache_options": {"mode": "explicit"},
            "prompt_cache_retention": "24h",
            "service_tier": "flex",
            "store": True,
            "verbosity": "low",
            "web_search_options": {},
        },
    ),
    "completions": Route(
        "/v1/completions",
        (completions.CompletionCreateParamsNonStreaming, completions.CompletionCreateParamsStreaming),
        {"model": "lm", "prompt": "hello", "max_tokens": 4},
        {
            "best_of": (2, {"n": 2}),
            "echo": True,
            "frequency_penalty": 0.5,
            "logit_bias": {"40": -100},
            "logprobs": 2,
            "n": 2,
            "presence_penalty": 0.5,
            "seed": 3,
            "stop": "x",
            "stream": True,
            "stream_options": ({"include_usage": True}, {"stream": True}),
            "temperature": 0.5,
            "top_p": 0.5,
        },
        {"user": "a"},
        {"suffix": "end"},
    ),
    "embeddings": Route(
        "/v1/embeddings",
        (embeddings.EmbeddingCreateParams,),
        {"model": "encoder", "input": "hello"},
        {"dimensions": 4, "encoding_format": "base64"},
        {"user": "a"},
    ),
    "responses": Route(
        "/v1/responses",
        (responses.ResponseCreateParamsNonStreaming, responses.ResponseCreateParamsStreaming),
        {"model": "lm", "input": "hello", "max_output_tokens": 4},
        {
            "include": ["message.output_text.logprobs"],
            "instructions": "Be kind.",
            "metadata": {"a": "b"},
            "parallel_tool_calls": (
                False, {"tools": [OWN_TOOL], "tool_choice": "required", "max_output_tokens": 200}
            ),
            "reasoning": ({"effort": "high", "summary": "auto"}, {"model": "effort"}),
            "stream": True,
            "stream_options": ({"include_obfuscation": False}, {"stream": True}),
            "temperature": 0.5,
            "text": {"format": {"type": "json_schema", "name": "a", "schema": SCHEMA}},
            "tool_choice": ("required", {"tools": [OWN_TOOL], "max_output_tokens": 200}),
            "tools": ([OWN_TOOL], {"tool_choice": "none"}),
            "top_logprobs": (2, {"include": ["message.output_text.logprobs"]}),
            "top_p": 0.5,
        },
        {"prompt_cache_key": "a", "safety_identifier": "a", "user": "a"},
        {
            "access_programs": ["a"],
            "background": True,
            "background_options": {"a": 1},
            "context_management": [{"type": "compaction"}],
            "conversation": "conv_1",
            "image": {"a": 1},
            "max_tool_calls": 3,
            "moderation": {"model": "omni-moderation-latest"},
            "previous_response_id": "resp_1",
            "prompt": {"id": "pmpt_1"},
            "prompt_cache_options": {"mode": "explicit"},
            "prompt_cache_retention": "24h",
            "service_tier": "flex",
            "store": True,
            "truncation": "auto",
        },
    ),
    "messages": Route(
        "/v1/messages",
        (messages.MessageCreateParamsNonStreaming, messages.MessageCreateParamsStreaming),
        {"model": "lm", "messages": CHAT, "max_tokens": 4},
        {
            "output_config": ({"effort": "high"}, {"model": "effort"}),
            "stop_sequences": ["x"],
            "stream": True,
            "system": [{"type": "text", "text": "Be kind."}],
            "thinking": ({"type": "disabled"}, {"model": "effort"}),
            "tool_choice": ({"type": "any"}, {"tools": [CLAUDE_TOOL], "max_tokens": 200}),
            "tools": ([CLAUDE_TOOL], {"tool_choice": {"type": "none"}}),
        },
        {"cache_control": {"type": "ephemeral"}, "metadata": {"user_id": "a"}},
        {
            "container": "c_1",
            "diagnostics": {"a": 1},
            "inference_geo": "eu",
            "service_tier": "priority",
            "speed": "fast",
            "user_profile_id": "p_1",
            "workspace_id": "w_1",
        },
    ),
    "count_tokens": Route(
        "/v1/messages/count_tokens",
        (count_tokens.MessageCountTokensParams,),
        {"model": "lm", "messages": CHAT},
        {
            "output_config": ({"effort": "high"}, {"model": "effort"}),
            "system": "Be kind.",
            "thinking": ({"type": "disabled"}, {"model": "effort"}),
            "tool_choice": ({"type": "auto"}, {"model": "calls", "tools": [CLAUDE_TOOL]}),
            "tools": ([CLAUDE_TOOL], {"model": "calls"}),
        },
        {"cache_control": {"type": "ephemeral"}},
        {"speed": "fast", "user_profile_id": "p_1", "workspace_id": "w_1"},
    ),
    "transcriptions": Route(
        "/v1/audio/transcriptions",
        (
            transcriptions.TranscriptionCreateParamsNonStreaming,
            transcriptions.TranscriptionCreateParamsStreaming,
        ),
        {"model": "lm", "file": speech.wav(speech.recording(0, 1))},
        {
            "include": ["logprobs"],
            "language": "de",
            "prompt": "a",
            "response_format": "srt",
            "stream": "true",
            "temperature": "0.5",
            "timestamp_granularities": (["segment"], {"response_format": "verbose_json"}),
        },
        {},
        {
            "chunking_strategy": "auto",
            "keywords": ["a"],
            "known_speaker_names": ["a"],
            "known_speaker_references": ["a"],
            "languages": ["a"],
        },
    ),
    "translations": Route(
        "/v1/audio/translations",
        (translations.TranslationCreateParams,),
        {"model": "lm", "file": speech.wav(speech.recording(0, 1))},
        {"prompt": "a", "response_format": "text", "temperature": "0.5"},
    ),
}  # fmt: skip


def undecided(hints, route):
    """Fields of the official type that the table does not name, and names of the table that are no fields."""
    return set(hints) ^ route.decided


def fields_of(route):
    return {name for kind in route.types for name in typing.get_type_hints(kind)}


@pytest.mark.parametrize("name", ROUTES)
def test_every_official_field_is_decided(name):
    assert not undecided(fields_of(ROUTES[name]), ROUTES[name])


def test_a_new_field_is_seen():
    route = ROUTES["chat"]
    assert undecided(fields_of(route) | {"brand_new"}, route) == {"brand_new"}
    assert undecided(fields_of(route) - {"seed"}, route) == {"seed"}


def ask(server, route, more):
    body = {name: value for name, value in (route.body | more).items() if value is not None}
    if "file" not in body:
        return httpx.post(server.url + route.path, json=body, timeout=60)
    files = {"file": ("a.wav", io.BytesIO(body.pop("file")))}
    data = {f"{key}[]" if isinstance(value, list) else key: value for key, value in body.items()}
    return httpx.post(server.url + route.path, files=files, data=data, timeout=60)


def cases(*parts):
    return [
        pytest.param(name, key, value, id=f"{name}-{key}")
        for name, route in ROUTES.items()
        for part in parts
        for key, value in getattr(route, part).items()
    ]


@pytest.mark.parametrize(("name", "key", "value"), cases("followed", "taken"))
def test_what_is_followed_gets_an_answer(server, name, key, value):
    route = ROUTES[name]
    found = ask(server, route, with_others(key, value))
    if route.path.startswith("/v1/audio"):  # tests/server/test_audio.py has a model for them
        assert found.status_code == 400 and found.json()["error"]["param"] == "model", found.text
        return
    assert found.status_code == 200, found.text
    assert '"error":{' not in found.text  # an event of a stream


@pytest.mark.parametrize(("name", "key", "value"), cases("refused"))
def test_what_is_refused_is_named(server, name, key, value):
    route = ROUTES[name]
    found = ask(server, route, {key: value})
    assert found.status_code == 400, found.text
    error = found.json()["error"]
    if "messages" in route.path and "chat" not in route.path:
        assert error["type"] == "invalid_request_error" and error["message"].startswith(key)
    else:
        assert (error["param"], error["code"]) == (key, "unsupported_parameter")
        assert error["message"].startswith(f"{key} is not supported: ")
