"""Texts that tokens cut in their middle: as stop texts, in the arguments of calls, and in several choices."""

from __future__ import annotations

import json

import pytest

HELLO = [{"role": "user", "content": "hello"}]
UNICODE = "Größe 😀 naïve 日本語 end"


@pytest.mark.parametrize("stop", ["😀", "ö", "本", "語 e", "ïve 日"])
def test_a_stop_text_whose_bytes_are_several_tokens_ends_an_answer_before_it(client, stop):
    asked = {"model": "lm", "messages": HELLO, "stop": [stop], "max_tokens": 100, "extra_body": {"choices": [UNICODE]}}
    whole = client.chat.completions.create(**asked)
    assert whole.choices[0].message.content == UNICODE.split(stop)[0]
    chunks = client.chat.completions.create(**asked, stream=True)
    assert "".join(one.choices[0].delta.content or "" for one in chunks) == UNICODE.split(stop)[0]


def test_tool_arguments_keep_what_json_escapes_and_what_is_not_ascii(server):
    text = UNICODE + ' " \\ \n \u2028'
    schema = {"type": "object", "properties": {"text": {"enum": [text]}}, "required": ["text"],
              "additionalProperties": False}  # fmt: skip
    tool = {"type": "function", "function": {"name": "say", "parameters": schema}}
    asked = {"model": "calls", "messages": HELLO, "tools": [tool], "tool_choice": "required", "max_tokens": 200,
             "parallel_tool_calls": False}  # fmt: skip
    with server.client() as client:
        found = client.chat.completions.create(**asked).choices[0].message.tool_calls[0].function.arguments
        chunks = client.chat.completions.create(**asked, stream=True)
        deltas = [call for one in chunks for call in one.choices[0].delta.tool_calls or []]
    assert json.loads(found) == {"text": text} and "".join(one.function.arguments for one in deltas) == found


def test_several_streamed_choices_are_those_of_one_piece_with_their_log_probabilities(client):
    asked = {"model": "lm", "messages": HELLO, "n": 3, "seed": 7, "temperature": 1.0, "logprobs": True,
             "top_logprobs": 2, "max_tokens": 12}  # fmt: skip
    whole = client.chat.completions.create(**asked).choices
    texts, logprobs = [""] * 3, [[], [], []]
    for chunk in client.chat.completions.create(**asked, stream=True):
        for one in chunk.choices:
            texts[one.index] += one.delta.content or ""
            logprobs[one.index] += (one.logprobs and one.logprobs.content) or []
    assert texts == [one.message.content for one in whole] and len(set(texts)) > 1
    assert logprobs == [one.logprobs.content for one in whole]
