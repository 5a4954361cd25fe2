"""Checks streams of the Responses API against the official client's types, strictly, and against the documented order.

https://platform.openai.com/docs/api-reference/responses-streaming
"""

from __future__ import annotations

import functools
import json
import types
import typing

import pydantic
from openai.types.responses import Response, ResponseStreamEvent

DONE = "[DONE]"
# Fields that the documentation has and that the client's types do not name.
BESIDE = {
    "Response": {"presence_penalty", "frequency_penalty", "store"},
    "Logprob": {"bytes"},  # required by Open Responses
    "LogprobTopLogprob": {"bytes"},
}
ENDS = {"response.completed": "completed", "response.incomplete": "incomplete", "response.failed": "failed"}


def parsed(text):
    """(name, data) of each event; the last block is [DONE]."""
    blocks = [block for block in text.split("\n\n") if block and not block.startswith(":")]
    assert blocks.pop() == f"data: {DONE}", text[-2000:]
    found = []
    for block in blocks:
        lines = dict(line.split(": ", 1) for line in block.splitlines())
        assert list(lines) == ["event", "data"]
        found.append((lines["event"], json.loads(lines["data"])))
    return found


# ------------------------------------------------------------------------------------------------------------ the types


def unknown_fields(given, kind, place=""):
    """Paths of members that the type `kind` does not name. Of a union the member that fits best counts."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Annotated:
        return unknown_fields(given, inner[0], place)
    if origin in (typing.Union, types.UnionType):
        fitting = [one for one in inner if _fits(given, one)]
        assert fitting, f"{place}: {given!r} is none of {inner}"
        return min((unknown_fields(given, one, place) for one in fitting), key=len)
    if origin is list and isinstance(given, list):
        return [path for i, one in enumerate(given) for path in unknown_fields(one, inner[0], f"{place}[{i}]")]
    if isinstance(kind, type) and issubclass(kind, pydantic.BaseModel) and isinstance(given, dict):
        names = {field.alias or name: field.annotation for name, field in kind.model_fields.items()}
        allowed = BESIDE.get(kind.__name__, set())
        found = [f"{place}.{name}" for name in given if name not in names and name not in allowed]
        for name, annotation in names.items():
            if name in given:
                found += unknown_fields(given[name], annotation, f"{place}.{name}")
        return found
    return []


def _fits(given, kind):
    try:
        _adapter(kind).validate_python(given, strict=False)
    except pydantic.ValidationError:
        return False
    return True


@functools.cache
def _adapter(kind):
    return pydantic.TypeAdapter(kind)


def _check_type(given, kind):
    _validate(given, kind)
    assert not (unknown := unknown_fields(given, kind)), unknown


def _validate(given, kind):
    try:
        _adapter(kind).validate_json(json.dumps(given), strict=True)
    except pydantic.ValidationError as error:
        raise AssertionError(str(error)) from error


def check_response(given):
    """Raises AssertionError: it is no whole response."""
    _check_type(given, Response)
    assert given["status"] in ENDS.values()
    assert all(item["status"] in ("completed", "incomplete") for item in given["output"] if "status" in item)
    assert given.get("usage"), "a whole response has usage"
    assert given["usage"]["total_tokens"] == given["usage"]["input_tokens"] + given["usage"]["output_tokens"]
    assert (given["incomplete_details"] is not None) == (given["status"] == "incomplete")


# ------------------------------------------------------------------------------------------------------------ the order


def check(events):
    """Raises AssertionError: an event is not of its type, or they are not in the documented order."""
    kinds = [name for name, _ in events]
    assert kinds[:2] == ["response.created", "response.in_progress"]
    assert kinds[-1] in ENDS and not ENDS.keys() & set(kinds[:-1])
    for number, (name, data) in enumerate(events):
        _check_type(data, _event_type(name))
        assert data["type"] == name
        assert data["sequence_number"] == number
    items = _Items()
    for name, data in events[2:-1]:
        items.take(name, data)
    assert items.open is None, f"{items.open} has no end"
    last = events[-1][1]["response"]
    for name, data in (*events[:2], events[-1]):
        assert data["response"]["id"] == last["id"]
        if name in ("response.created", "response.in_progress"):
            assert (data["response"]["status"], data["response"]["output"]) == ("in_progress", [])
    assert last["status"] == ENDS[kinds[-1]]
    assert last["output"] == items.whole
    check_response(last)


@functools.cache
def _event_type(name):
    for kind in typing.get_args(typing.get_args(ResponseStreamEvent)[0]):
        if name in typing.get_args(kind.model_fields["type"].annotation):
            return kind
    raise AssertionError(f"there is no event {name}")


class _Items:
    """The items that the events build."""

    def __init__(self):
        self.whole, self.open, self.part, self.text, self.is_done = [], None, None, "", False

    def take(self, name, data):
        step = name.removeprefix("response.")
        if step == "output_item.added":
            assert self.open is None and data["item"]["status"] == "in_progress"
            assert not data["item"].get("content") and not data["item"].get("arguments")
            assert data["output_index"] == len(self.whole)
            assert data["item"]["id"] not in [item["id"] for item in self.whole]
            self.open, self.text, self.is_done, self.part = data["item"], "", False, None
            return
        assert self.open is not None and data["output_index"] == len(self.whole)
        if step == "output_item.done":
            self._done(data["item"])
            return
        assert data["item_id"] == self.open["id"]
        if step == "content_part.added":
            assert self.part is None and data["part"]["text"] == ""
            self.part = data["content_index"]
        elif step == "content_part.done":
            assert self.is_done and self.part == data["content_index"] and data["part"]["text"] == self.text
            self.part = None
        else:
            self._content(step, data)

    def _content(self, step, data):
        """Of a message, of reasoning or of a call."""
        what, _, end = step.rpartition(".")
        kind = {"output_text": "message", "reasoning_text": "reasoning", "function_call_arguments": "function_call"}
        assert kind[what] == self.open["type"] and not self.is_done
        if what != "function_call_arguments":
            assert data["content_index"] == self.part
        if end == "delta":
            self.text += data["delta"]
        else:
            assert end == "done" and data["arguments" if what == "function_call_arguments" else "text"] == self.text
            self.is_done = True

    def _done(self, item):
        assert self.is_done and self.part is None
        assert (item["id"], item["type"]) == (self.open["id"], self.open["type"])
        said = item["arguments"] if item["type"] == "function_call" else item["content"][0]["text"]
        assert said == self.text and item["status"] in ("completed", "incomplete")
        self.whole.append(item)
        self.open = None
