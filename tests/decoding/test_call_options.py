"""Constraints, tools and the prefix cache as arguments of `generate` and `load`."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

from edgeformer.errors import InputError
from edgeformer.model import load

CHAT = [{"role": "user", "content": "hello"}]
TOOL = {
    "type": "function",
    "function": {
        "name": "look",
        "description": "Looks.",
        "parameters": {
            "type": "object",
            "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 99}},
            "required": ["n"],
            "additionalProperties": False,
        },
    },
}


@pytest.fixture(scope="module", params=["native", "cpu"])
def model(request, bundles):
    return load(bundles / "float", request.param, threads=1)


@pytest.mark.parametrize("prompt", ["hello", CHAT, [5, 17]], ids=["text", "chat", "ids"])
@pytest.mark.parametrize("sampled", [{}, {"temperature": 1.0, "seed": 3}], ids=["greedy", "sampled"])
def test_an_answer_follows_its_constraint(model, prompt, sampled):
    schema = TOOL["function"]["parameters"]
    limits = {"max_new_tokens": 80, **sampled}
    found = json.loads(model.generate(prompt, json_schema=schema, **limits).text)
    assert 0 <= found["n"] <= 99
    wrapped = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    assert set(json.loads(model.generate(prompt, response_format=wrapped, **limits).text)) == {"n"}
    assert re.fullmatch("[ab]{3,5}!", model.generate(prompt, regex="[ab]{3,5}!", **limits).text)
    assert model.generate(prompt, choices=["yes", "no"], **limits).text in ("yes", "no")
    assert model.generate(prompt, grammar='root ::= "x" [0-9] "y"', **limits).text[::2] == "xy"


def test_a_call_that_must_come_comes_without_a_template_that_shows_calls(model):
    result = model.generate(CHAT, tools=[TOOL], tool_choice="required", max_new_tokens=120)
    (call,) = result.tool_calls
    assert call.name == "look"
    assert 0 <= call.json()["n"] <= 99
    assert (result.content, result.finish_reason) == ("", "stop")
    pieces = list(model.stream(CHAT, tools=[TOOL], tool_choice="look", max_new_tokens=120))
    streamed = [part.call for piece in pieces for part in piece.parts if part.call is not None]
    assert [(one.name, one.arguments) for one in streamed] == [(call.name, call.arguments)]


def test_tool_choice_none_leaves_the_text_as_it_is(model):
    result = model.generate(CHAT, tools=[TOOL], tool_choice="none", max_new_tokens=5)
    assert (result.tool_calls, result.content) == ([], result.text)


@pytest.mark.parametrize(
    ("prompt", "arguments", "message"),
    [
        (CHAT, {"tools": [TOOL]}, "'auto' needs a chat template that shows tool calls"),
        ("hello", {"tools": [TOOL]}, "Tools are for a chat"),
        (CHAT, {"tool_choice": "required"}, "there are no tools"),
        (CHAT, {"tools": [TOOL], "tool_choice": "hear"}, "the tools are: look"),
        (CHAT, {"tools": [TOOL], "tool_choice": "required", "regex": "a"}, "leave out one of them"),
        ("hello", {"regex": "a", "choices": ["b"]}, "one constraint at most"),
        ("hello", {"json_schema": {"uniqueItems": True}}, "uniqueItems"),
        ("hello", {"regex": "(a"}, "regular expression is refused"),
        ("hello", {"grammar": "start: missing"}, "grammar is refused"),
        ("hello", {"regex": "a", "num_beams": 2}, "A beam search has no constraints"),
        ("hello", {"logprobs": 1, "num_beams": 2}, "A beam search has no constraints, tools or logprobs"),
        ("hello", {"speculation": "lookup", "num_beams": 2}, "A beam search has no drafts"),
        ("hello", {"speculation": "fast"}, "speculation is 'fast', expected"),
        ("hello", {"logprobs": 21}, "logprobs is 21, expected"),
    ],
)
def test_wrong_arguments_are_refused(model, prompt, arguments, message):
    with pytest.raises(InputError, match=message):
        model.generate(prompt, **arguments)


def test_a_constraint_needs_a_tokenizer(bundles):
    with pytest.raises(InputError, match="this bundle has no tokenizer"):
        load(bundles / "plain", "native", threads=1).generate([5], regex="a")


# ----------------------------------------------------------------------------------------------------- the prefix cache

LONG = [int(i) for i in np.random.default_rng(5).integers(3, 299, 150)]


def _second(model):
    model.generate(LONG, max_new_tokens=2, ignore_eos=True)
    return model.generate([*LONG[:140], 7, 8], max_new_tokens=2, ignore_eos=True).cached_tokens


@pytest.mark.parametrize(
    ("engine", "asked", "cached"),
    [
        ("native", None, 128),
        ("native", True, 128),
        ("native", False, 0),
        ("native", 0, 0),
        ("native", 10**6, 128),
        ("native", 10, 0),  # bytes: less than a chunk
        ("cpu", None, 0),
        ("cpu", True, 128),
    ],
)
def test_a_beginning_is_kept_as_asked(bundles, engine, asked, cached):
    assert _second(load(bundles / "float", engine, threads=1, prefix_cache=asked)) == cached


def test_another_model_finds_what_a_folder_keeps(bundles, tmp_path):
    first = load(bundles / "float", "native", threads=1, prefix_cache=tmp_path / "kept")
    expected = first.generate(LONG, max_new_tokens=4, ignore_eos=True)
    from edgeformer import disk_cache

    disk_cache.finish()
    second = load(bundles / "float", "native", threads=1, prefix_cache=str(tmp_path / "kept"))
    found = second.generate(LONG, max_new_tokens=4, ignore_eos=True)
    assert (found.cached_tokens, found.ids) == (128, expected.ids)


@pytest.mark.parametrize(
    ("engine", "asked", "message"),
    [
        ("native", -1, "expected a number of bytes"),
        ("native", 1.5, "expected True, False, a number of bytes"),
        ("cpu", "folder", "needs engine='native'"),
    ],
)
def test_a_wrong_prefix_cache_is_refused(bundles, engine, asked, message):
    with pytest.raises(InputError, match=message):
        load(bundles / "float", engine, threads=1, prefix_cache=asked)
