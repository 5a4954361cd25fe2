"""Tools of a request: their definitions, the choice among them, and Python functions as tools."""

from __future__ import annotations

from typing import Literal

import pytest
from support.tool_templates import STOP, TOOLS, WEATHER

from edgeformer.decoding.tools.callables import schema_of
from edgeformer.decoding.tools.definitions import ToolChoice, ToolRequest, tools_of
from edgeformer.errors import InputError


def test_tools_in_all_three_shapes():
    def stop() -> None:
        """Stops."""

    wrapped, bare, function = tools_of([{"type": "function", "function": WEATHER}, {**WEATHER, "name": "other"}, stop])
    assert (wrapped.name, bare.name, function.name) == ("get_weather", "other", "stop")
    assert wrapped.parameters == bare.parameters == WEATHER["parameters"]
    assert wrapped.definition == {"type": "function", "function": WEATHER}
    assert function.definition["function"]["description"] == "Stops."
    assert tools_of(None) == ()


@pytest.mark.parametrize(("tools", "told"), [
    ("get", "expected a list"), ([7], "Tool 0 is 7"), ([{"type": "web_search"}], "'web_search', expected 'function'"),
    ([{"name": "a b"}], "the name 'a b', expected 1 to 64 letters"), ([{"name": ""}], "expected 1 to 64"),
    ([{"name": "a" * 65}], "expected 1 to 64"), ([{"description": "x"}], "the name None"),
    ([STOP, STOP], "2 tools have the name 'stop'"), ([{"name": "f", "parameters": []}], "JSON schema of an object"),
    ([{"name": "f", "parameters": {"type": "array"}}], "JSON schema of an object"),
    ([{"name": "f", "parameters": {"properties": []}}], "expected a mapping"),
    ([{"name": "f", "description": 1}], "expected a text"), ([{"type": "function", "function": "f"}], "with a 'name'"),
])  # fmt: skip
def test_malformed_tools_are_refused(tools, told):
    with pytest.raises(InputError, match=told):
        tools_of(tools)


@pytest.mark.parametrize(("given", "mode", "name"), [
    (None, "auto", None), ("auto", "auto", None), ("none", "none", None), ("required", "required", None),
    ("stop", "named", "stop"), ({"type": "function", "function": {"name": "stop"}}, "named", "stop"),
    ({"type": "function", "name": "stop"}, "named", "stop"),
])  # fmt: skip
def test_choices(given, mode, name):
    assert ToolChoice.of(given, tools_of(TOOLS)) == ToolChoice(mode, name)


@pytest.mark.parametrize(("given", "told"), [
    ("any", "'any'; the tools are: get_weather, stop, get"), ({"type": "allowed_tools"}, "expected 'auto'"),
    ({"function": {}}, "expected 'auto'"), ({"type": "function", "function": {"name": "x"}}, "'x'.*; the tools are"),
])  # fmt: skip
def test_malformed_choices_are_refused(given, told):
    with pytest.raises(InputError, match=told):
        ToolChoice.of(given, tools_of(TOOLS))


def test_required_needs_tools_and_no_tools_mean_none():
    with pytest.raises(InputError, match="there are no tools"):
        ToolRequest.of(None, "required")
    assert ToolRequest.of(None).choice.mode == "none"
    request = ToolRequest.of(TOOLS, "stop")
    assert [tool.name for tool in request.callable_tools] == ["stop"]
    assert [one["function"]["name"] for one in request.definitions] == ["get_weather", "stop", "get"]


def documented(
    city: str, days: int, scale: float = 1.0, unit: Literal["C", "F"] = "C", names: list[str] | None = None,
    table: dict[str, int] | None = None, mixed: int | str = 0, flag: bool = True,
):  # fmt: skip
    """The weather of a city.

    Args:
        city: The name of the city,
            in any language.
        days: How many days.
        scale: A factor.
        unit: The unit.
        names: More names.
        table: Numbers by name.
        mixed: One of two.
        flag: A switch (choices: [true, false])

    Returns:
        A text.
    """


def test_python_functions_have_the_schema_of_transformers():
    tf = pytest.importorskip("transformers.utils")
    theirs = tf.get_json_schema(documented)
    ours = schema_of(documented)
    theirs["function"].pop("return", None)
    assert ours == theirs


def test_python_functions_that_cannot_be_described():
    def no_document(x: int): ...

    def no_hint(x):
        """X."""

    def odd(x: bytes):
        """X."""

    def many(*x: int):
        """X."""

    for function, told in (
        (no_document, "no docstring"),
        (no_hint, "no type hint"),
        (odd, "bytes"),
        (many, "need names"),
    ):
        with pytest.raises(InputError, match=told):
            tools_of([function])
