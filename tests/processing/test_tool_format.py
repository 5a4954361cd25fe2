"""Formats of tool calls, learned from chat templates: what is read is what was rendered."""

from __future__ import annotations

import functools
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.tool_templates import TEMPLATES, UNKNOWN, tagged, tokenizer

from edgeformer.errors import EdgeformerError
from edgeformer.processing.tool_format import LITERAL, TEXT, NamedCall, ObjectCall, PairCall
from edgeformer.processing.tool_learning import learn_answer_format, read_all
from edgeformer.processing.tool_reading import CallReader, Known
from edgeformer.processing.tool_values import MoreText, NotACall, Reader, literal

USER = {"role": "user", "content": "What?"}
SCHEMA = {
    "type": "object",
    "properties": {
        "text": {"type": "string"},
        "whole": {"type": "integer"},
        "real": {"type": ["number", "null"]},
        "yes": {"type": "boolean"},
        "list": {"type": "array"},
        "object": {"type": "object"},
    },
}
KNOWN = Known({"find": SCHEMA, "get_weather-2": SCHEMA, "x": SCHEMA})
JSON_KEYS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=8)
# Formats without quotes or escapes cannot hold every text: the template writes what cannot be told from its end.
PLAIN = st.text(st.characters(codec="utf-8", exclude_characters="<>|'\"\\\0", exclude_categories=["Cc"]), max_size=12)
NAMES = st.from_regex(r"[A-Za-z_][A-Za-z0-9_]{0,6}", fullmatch=True).filter(
    lambda one: one.lower() not in ("true", "false", "null", "none")
)


@functools.cache
def learned(name: str):
    return learn_answer_format(tokenizer(TEMPLATES[name]))


def values(texts, keys):
    numbers = st.integers(-(10**20), 10**20) | st.floats(allow_nan=False, allow_infinity=False)
    scalars = st.none() | st.booleans() | numbers | texts
    return st.recursive(scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3),
                        max_leaves=6)  # fmt: skip


def arguments(form):
    exact = isinstance(form.call, PairCall) and "raw" in form.call.string_style
    literal_style = getattr(form.call, "style", "") == LITERAL or isinstance(form.call, PairCall)
    texts = PLAIN if exact else st.text(st.characters(codec="utf-8"), max_size=12)
    keys = NAMES if literal_style else JSON_KEYS
    inner = values(PLAIN if literal_style else texts, keys)
    return st.fixed_dictionaries(
        {},
        optional={
            "text": texts, "whole": st.integers(), "real": st.none() | st.floats(allow_nan=False, allow_infinity=False),
            "yes": st.booleans(), "list": st.lists(inner, max_size=3), "object": st.dictionaries(keys, inner, max_size=3),
        },
    )  # fmt: skip


def rendered(name: str, calls, content="") -> str:
    """What the template writes for an answer with calls, up to the end of the turn."""
    tokens, form = tokenizer(TEMPLATES[name]), learned(name)
    as_text = form.tools.arguments_as_text
    entries = [
        {"id": f"abcdefgh{index}", "type": "function", "function": {
            "name": call, "arguments": json.dumps(given, ensure_ascii=False) if as_text else given}}
        for index, (call, given) in enumerate(calls)
    ]  # fmt: skip
    text = tokens.render_chat([USER, {"role": "assistant", "content": content, "tool_calls": entries}], False)
    start = len(tokens.render_chat([USER], False))
    text = text[start:].removesuffix("<|end|>\n").removesuffix("</s>")
    # The first call; an argument may have the same characters later.
    return text[text.index(form.tools.before if form.tools.before.strip() else form_start(form.tools, calls)) :]


def same(one, other) -> bool:
    """Equal as JSON: True is not 1, and 1.0 not 1."""
    return json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)


def test_the_formats_are_what_a_reader_of_the_template_sees():
    first = learned("tags around each JSON call").tools
    assert (first.before, first.between, first.after) == (
        "<tool_call>\n", "\n</tool_call>\n<tool_call>\n", "\n</tool_call>")  # fmt: skip
    assert isinstance(first.call, ObjectCall) and (first.call.name_key, first.call.arguments_key) == (
        "name",
        "arguments",
    )
    named = learned("nested tokens, a code fence, arguments as text").tools
    assert named.call == NamedCall("\n```json\n") and named.arguments_as_text
    assert named.between == "\n```<｜call▁end｜>\n<｜call▁begin｜>function<｜sep｜>"
    pairs = learned("Python calls in tokens, plain quotes").tools.call
    assert (pairs.middle, pairs.assign, pairs.join, pairs.quotes) == ("(", "=", ", ", ("'", "'"))
    assert learned("a bare object, one call").tools.between is None
    assert learned("own quotes, sorted keys").tools.sorts and not first.sorts


@pytest.mark.parametrize("name", TEMPLATES)
def test_reasoning_is_learned_where_the_template_shows_it(name):
    texts = {
        "tags, with reasoning": ("<think>", "</think>"),
        "key and value tags, with reasoning": ("<think>", "</think>"),
        "invoke tags, the prompt opens reasoning": ("<think>", "</think>"),
        "a list on lines, numbered, after a plan": ("<|START_THINKING|>", "<|END_THINKING|>"),
    }
    found = learned(name).reasoning
    assert texts.get(name) == (None if found is None else (found.open, found.close))
    if found is not None:
        prompt = tokenizer(TEMPLATES[name]).render_chat([USER])
        assert found.is_open(prompt) == ("prompt opens" in name)


def test_reasoning_that_only_the_prompt_shows():
    strips = (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content.split('</think>')[-1] }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}"
    )
    found = learn_answer_format(tokenizer(strips)).reasoning
    assert (found.open, found.close) == ("<think>", "</think>")
    assert learn_answer_format(tokenizer(strips.replace("</think>", "</thought>"))).reasoning is None


@pytest.mark.parametrize("name", UNKNOWN)
def test_a_template_that_shows_no_calls_says_why(name):
    template, why = UNKNOWN[name]
    found = learn_answer_format(tokenizer(template))
    assert found.tools is None
    assert why in found.why_no_tools


def test_no_template_and_one_that_loses_values_say_why():
    assert "no chat template" in learn_answer_format(tokenizer(None)).why_no_tools
    lossy = tagged("", "<call>{{ f.name }} {{ f.arguments | tojson | upper }}</call>", "", "")
    found = learn_answer_format(tokenizer(lossy))
    assert found.tools is None and found.why_no_tools
    # It reads back plain values, and loses quotes: only the check finds that.
    lossy = tagged("", "<call>{{ f.name }} {{ f.arguments | tojson | replace('\\\\\"', '') }}</call>", "", "")
    assert "read back" in learn_answer_format(tokenizer(lossy)).why_no_tools


@pytest.mark.parametrize("name", TEMPLATES)
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])
@given(data=st.data())
def test_a_rendered_call_is_read_back(name, data):
    form = learned(name).tools
    count = data.draw(st.integers(1, 3 if form.between is not None else 1))
    calls = [(data.draw(st.sampled_from(sorted(KNOWN.schemas))), data.draw(arguments(form))) for _ in range(count)]
    body = rendered(name, calls)
    assert same(read_all(CallReader(form, KNOWN), body), calls), body


def form_start(form, calls):
    return calls[0][0] if not isinstance(form.call, ObjectCall) else form.call.parts[0]


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_cut_text_asks_for_more_until_it_is_whole(name):
    form = learned(name).tools
    call = ("find", {"text": "it's 5", "whole": 12, "yes": True, "list": [1, "a"]})
    call = call if "'" not in getattr(form.call, "quotes", ("",))[0] else ("find", {**call[1], "text": "its 5"})
    body = rendered(name, [call])
    reader = CallReader(form, KNOWN)
    for end in range(len(body)):
        try:
            found = reader.read(body[:end], 0)
        except MoreText:
            continue
        assert not form.after.strip() or body[end:].strip() == "", body[:end]
        assert same([found.name, json.loads(found.arguments)], call)
    found = reader.read(body, 0, final=True)
    assert same([found.name, json.loads(found.arguments)], call)


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("place", [0.2, 0.5, 0.8])
def test_a_damaged_call_is_none(name, place):
    """A character that no format has there is refused at once, or changes the call."""
    form = learned(name).tools
    call = ("find", {"whole": 12, "yes": True})
    body = rendered(name, [call])
    at = int(len(body) * place)
    damaged = body[:at] + "\0" + body[at:]
    try:
        found = read_all(CallReader(form, KNOWN), damaged)
    except NotACall:
        return
    ignored = TEXT in getattr(form.call, "parts", ())  # a number of the call, as text, which nobody reads
    assert not same(found, [call]) or (ignored and place == 0.2)


@pytest.mark.parametrize(("text", "strict", "value"), [
    ("{'a': True, 'b': None}", False, {"a": True, "b": None}), ("[1, -2.5e3]", True, [1, -2500.0]),
    ("'it\\'s\\n\\x41'", False, "it's\nA"), ('"\\u00e9\\/"', True, "é/"), ('"a\nb"', True, "a\nb"), ("[]", True, []),
    ("{a: 1}", False, {"a": 1}), ("true", True, True), ("False", False, False),
])  # fmt: skip
def test_values(text, strict, value):
    assert Reader(text, True, strict).value(0).value == value
    for end in range(len(text)):
        with pytest.raises(MoreText):
            Reader(text[:end], False, strict).value(0)


@pytest.mark.parametrize(("text", "strict"), [
    ("{'a': 1}", True), ("True", True), ("{a: 1}", True), ("01", True), ("1.", True), ("[1 2]", True), ("{1: 2}", True),
    ("nul", True), ("1e999", True), ("9" * 5000, True), ("[" * 200, True), ('"\\q"', True), ("+1", False), ("NaN", True),
    ("[1,]", True), ("Infinity", False),
])  # fmt: skip
def test_what_is_no_value(text, strict):
    with pytest.raises(NotACall):
        Reader(text, True, strict).value(0)


def test_white_space_of_a_frame_may_differ():
    assert literal("[CALLS][ {", 0, "[CALLS] [") == 8
    assert literal("<a>\n\n<b>", 0, "<a> <b>") == 8
    with pytest.raises(MoreText):
        literal("<a> <", 0, "<a>\n<b>")
    with pytest.raises(NotACall):
        literal("<a> <c", 0, "<a>\n<b>")
    with pytest.raises(NotACall):
        literal("<a> <", 0, "<a>\n<b>", final=True)


def test_a_reader_without_tools_takes_any_name():
    form = learned("tags around each JSON call").tools
    text = '<tool_call>{"arguments": {"a": 1}, "name": "other"}</tool_call>'
    assert CallReader(form).read(text, 0).name == "other"
    with pytest.raises(NotACall, match="no tool 'other'"):
        CallReader(form, KNOWN).read(text, 0)


def test_learning_raises_for_nothing_but_a_missing_template():
    for template, _ in UNKNOWN.values():
        try:
            learn_answer_format(tokenizer(template))
        except EdgeformerError:
            pytest.fail("a template made the learner raise")
