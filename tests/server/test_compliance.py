"""Other people's judges: the suites of llm-comply (Open Responses, OpenAI's chat, Anthropic's messages; with their
OpenAPI documents), and the official client's types, strictly, on each event of a stream of responses."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import httpx
import pytest
from support import responses_events, serving, tiny

CASES = {
    "open-responses": "openresponses.json",
    "openai-chat": "openai_chat.json",
    "anthropic": "anthropic.json",
}
IMAGES = ("image-input", "chat-image-input", "anth-image-input")  # this model reads text: 400 is right


@pytest.fixture(scope="module")
def ending(tmp_path_factory):
    """The tiny decoder with tool calls, made to close strings at once and to end each text by itself."""
    import edgeformer
    from edgeformer.bundle.write import seal

    folder = tmp_path_factory.mktemp("ending")
    long = tiny.write_lm(folder / "long", seed=1, positions=2048)  # a case asks for 1024 tokens
    bundle = serving.with_template(long, folder / "ending", serving.CALLS)
    (quote,) = edgeformer.load(bundle, threads=1).tokenizer.encode('"')
    path = bundle / "generation_config.json"
    more = {"max_new_tokens": 200, "forced_eos_token_id": 2, "sequence_bias": [[[quote], 60.0]]}
    path.write_text(json.dumps(json.loads(path.read_text()) | more))
    manifest = json.loads((bundle / "edgeformer.json").read_text())
    del manifest["files"]
    seal(bundle, manifest)
    return bundle


@pytest.fixture(scope="module")
def url(ending, served):
    with serving.running([f"ending={ending}", f"reasons={served['reasons']}"]) as one:
        yield one.url


def suites():
    """(format, id) of each case; none where the package is missing."""
    try:
        from llm_comply.tests import get_tests
    except ImportError:
        return [("open-responses", "none")]
    return [(form, case.id) for form in CASES for case in get_tests(form)]


@pytest.mark.filterwarnings("ignore:jsonschema.RefResolver")
@pytest.mark.parametrize(("form", "name"), suites())
def test_a_case_of_the_suite_passes(url, form, name):
    serving.require("llm_comply", "pip install '.[reference]'")
    import llm_comply
    from llm_comply.config import ComplianceConfig
    from llm_comply.result import TestStatus
    from llm_comply.runner import TestRunner
    from llm_comply.schema import SpecLoader
    from llm_comply.tests import get_tests

    (case,) = [one for one in get_tests(form) if one.id == name]
    spec = SpecLoader(str(Path(llm_comply.__file__).parent / "specs" / CASES[form]))
    config = ComplianceConfig(base_url=url + "/v1", api_key="none", model="ending")
    found = TestRunner(config, [case], spec).run_one(case)
    if name in IMAGES:
        assert found.status is TestStatus.FAILED and "HTTP 400" in found.errors[0]
    elif found.status is TestStatus.SKIPPED:
        pytest.skip(found.errors[0])  # the suite's own reason
    else:
        assert found.status is TestStatus.PASSED, found.errors


# ------------------------------------------------------------------------------------------- streams, strictly

TOOL = {
    "type": "function",
    "name": "paint",
    "description": "Paints.",
    "parameters": {
        "type": "object",
        "properties": {"color": {"enum": ["red", "blue"]}},
        "required": ["color"],
        "additionalProperties": False,
    },
    "strict": True,
}
STREAMS = {
    "text": {"model": "ending", "input": "hello"},
    "cut": {"model": "ending", "input": "hello", "max_output_tokens": 3},
    "logprobs": {
        "model": "ending",
        "input": "hello",
        "include": ["message.output_text.logprobs"],
        "top_logprobs": 2,
        "max_output_tokens": 5,
    },
    "call": {"model": "ending", "input": "hello", "tools": [TOOL], "tool_choice": "required"},
    "one call": {
        "model": "ending",
        "input": "hello",
        "tools": [TOOL],
        "tool_choice": {"type": "function", "name": "paint"},
        "parallel_tool_calls": False,
    },
    "json": {
        "model": "ending",
        "input": "hello",
        "text": {"format": {"type": "json_schema", "name": "a", "schema": TOOL["parameters"], "strict": True}},
    },
    "reasoning": {"model": "reasons", "input": "hello", "max_output_tokens": 40},
}


def stream(url, body):
    """(name, data) of each event."""
    found = httpx.post(url + "/v1/responses", json=body | {"stream": True}, timeout=60)
    assert found.status_code == 200, found.text
    return responses_events.parsed(found.text)


@pytest.mark.parametrize("name", STREAMS)
def test_a_stream_is_what_the_official_types_say(url, name):
    events = stream(url, STREAMS[name])
    responses_events.check(events)
    whole = httpx.post(url + "/v1/responses", json=STREAMS[name], timeout=60).json()
    responses_events.check_response(whole)
    kinds = {item["type"] for item in events[-1][1]["response"]["output"]}
    assert kinds == {"call": {"function_call"}, "one call": {"function_call"}, "reasoning": {"reasoning"}}.get(
        name, {"message"}
    )


def without(number):
    return lambda events: events.pop(number)


def changed(place, **fields):
    return lambda events: events[place][1].update(fields)


def within(place, *path, value):
    def change(events):
        found = events[place][1]
        for key in path[:-1]:
            found = found[key]
        if value is None:
            del found[path[-1]]
        else:
            found[path[-1]] = value

    return change


PLANTED = {
    "an unknown field": changed(3, extra=1),
    "an unknown field within": within(2, "item", "foo", value=1),
    "a missing field": within(0, "response", "tools", value=None),
    "a wrong type": within(-1, "response", "created_at", value="now"),
    "a number twice": changed(4, sequence_number=3),
    "a number left out": without(4),
    "another item's id": changed(4, item_id="msg_other"),
    "another place": changed(4, output_index=1),
    "a delta that the text lacks": changed(4, delta="different"),
    "no end of the item": lambda events: events.pop(-2) and events[-1][1].update(sequence_number=len(events) - 1),
    "two ends": lambda events: events.append(
        (events[-1][0], {**copy.deepcopy(events[-1][1]), "sequence_number": len(events)})
    ),
    "a name that is not the type": lambda events: events.__setitem__(3, ("response.other", events[3][1])),
    "the end says another text": within(-1, "response", "output", 0, "content", 0, "text", value="else"),
    "another response": within(-1, "response", "id", value="resp_other"),
    "whole, and still running": within(-1, "response", "status", value="in_progress"),
    "no usage": within(-1, "response", "usage", value=None),
}


@pytest.fixture(scope="module")
def right(url):
    return stream(url, STREAMS["text"])


@pytest.mark.parametrize("name", PLANTED)
def test_a_wrong_stream_is_refused(right, name):
    events = copy.deepcopy(right)
    responses_events.check(events)
    PLANTED[name](events)
    with pytest.raises(AssertionError):
        responses_events.check(events)
