"""Tools of a request: their definitions, grammars of calls, and answers divided into content, reasoning and calls."""

from __future__ import annotations

import functools
import json
import random

import jsonschema
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tool_templates import PLAIN_TOKENS, TEMPLATES, TOOLS, UNKNOWN, matcher_tokenizer, tokenizer

from edgeformer.decoding.tools.answer import AnswerParser, call_id, gather, messages_for, split
from edgeformer.decoding.tools.definitions import ToolRequest, tools_of
from edgeformer.decoding.tools.grammar import tool_grammar
from edgeformer.decoding.tools.rules import GrammarTokens
from edgeformer.decoding.tools.token_text import TokenText
from edgeformer.errors import InputError
from edgeformer.processing.tool_learning import learn_answer_format

llguidance = pytest.importorskip("llguidance")

USER = {"role": "user", "content": "What?"}
CALLS = [
    ("get_weather", {"city": "Oslo", "days": 3}),
    ("get_weather", {"city": "京都 x", "days": 12, "unit": "F", "exact": False, "more": {"tags": ["a", "b"]}}),
    ("stop", {}),
    ("get", {"key": 7}),
]
SPECIAL = tokenizer(None).special_texts
TOKENS = GrammarTokens(SPECIAL, frozenset([SPECIAL["<|end|>"]]))


@functools.cache
def learned(name: str):
    return learn_answer_format(tokenizer(TEMPLATES[name] if name in TEMPLATES else UNKNOWN[name][0]))


def rendered(name: str, calls, content: str = "", **more) -> str:
    """What the template writes for an answer, from the beginning of the answer to the end of the turn."""
    tokens = tokenizer(TEMPLATES[name])
    entries = [{"id": call_id("", n, call), "type": "function", "function": {"name": call, "arguments": given}}
               for n, (call, given) in enumerate(calls)]  # fmt: skip
    message = {"role": "assistant", "content": content, "tool_calls": entries, **more}
    ready = messages_for([USER, message], learned(name))
    text = tokens.render_chat(ready, False)
    start = len(tokens.render_chat([USER], False)) + (0 if name == "channels" else len("<|assistant|>"))
    start += len("<|start|>assistant") if name == "channels" else 0
    return (
        text[start:]
        .removeprefix("\n" if "key and value" not in name else "")
        .removesuffix("<|end|>\n")
        .removesuffix("</s>")
    )


def found_calls(answer):
    return [(call.name, call.json()) for call in answer.tool_calls]


def may_be_parallel(name: str) -> bool:
    return learned(name).tools.between is not None


def matcher(lark: str):
    made = llguidance.LLMatcher(matcher_tokenizer_once(), llguidance.LLMatcher.grammar_from_lark(lark))
    assert not made.is_error(), made.get_error()
    return made


@functools.cache
def matcher_tokenizer_once():
    return matcher_tokenizer()


def accepts(lark: str, text: str) -> bool:
    """Whether the text, as tokens, is a whole answer of the grammar."""
    made = matcher(lark)
    ids = tokenizer(None).encode(text, add_special_tokens=False)
    return made.try_consume_tokens(ids) == len(ids) and made.is_accepting()


# ------------------------------------------------------------------------------------------------------------ grammars


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("call", range(len(CALLS)))
def test_a_rendered_call_follows_the_grammar_and_is_found(name, call):
    text = rendered(name, [CALLS[call]])
    required = tool_grammar(learned(name), ToolRequest.of(TOOLS, "required"), TOKENS)
    assert accepts(required, text)
    assert accepts(tool_grammar(learned(name), ToolRequest.of(TOOLS, CALLS[call][0]), TOKENS), text)
    other = "stop" if CALLS[call][0] != "stop" else "get"
    assert not accepts(tool_grammar(learned(name), ToolRequest.of(TOOLS, other), TOKENS), text)
    assert not accepts(required, "Well. " + text)
    assert found_calls(split(text, learned(name), tools_of(TOOLS))) == [CALLS[call]]


@pytest.mark.parametrize("name", [one for one in TEMPLATES if may_be_parallel(one)])
def test_several_calls_follow_the_grammar_if_they_may(name):
    text = rendered(name, CALLS)
    assert accepts(tool_grammar(learned(name), ToolRequest.of(TOOLS, "required"), TOKENS), text)
    assert not accepts(tool_grammar(learned(name), ToolRequest.of(TOOLS, "required", False), TOKENS), text)
    answer = split(text, learned(name), tools_of(TOOLS))
    assert found_calls(answer) == CALLS
    assert [call.index for call in answer.tool_calls] == [0, 1, 2, 3]
    assert not answer.content.strip() and not answer.problems


@pytest.mark.parametrize("name", TEMPLATES)
def test_auto_is_free_until_a_call_begins(name):
    form = learned(name)
    lark = tool_grammar(form, ToolRequest.of(TOOLS, "auto"), TOKENS)
    if not form.tools.trigger:
        assert lark is None  # nothing announces a call
        return
    text = rendered(name, [CALLS[0]])
    for free in ("", "Hello. {[<tool", "2 < 3, [1]: call <|user|> f(x)"):
        assert accepts(lark, free) and accepts(lark, free + text), free
    begin = text[: text.index(form.tools.trigger) + len(form.tools.trigger)]
    assert not accepts(lark, "Hello. " + begin)
    assert not accepts(lark, "Hello. " + begin + " and more text that is no call")
    assert not accepts(lark, "Hello. " + text.replace("get_weather", "put_weather"))
    if may_be_parallel(name):
        assert accepts(lark, "Hello. " + text + " Then. " + text)
        single = tool_grammar(form, ToolRequest.of(TOOLS, "auto", False), TOKENS)
        assert accepts(single, "Hello. " + text) and not accepts(single, "Hello. " + text + " Then. " + text)


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("seed", range(4))
def test_any_answer_of_the_grammar_is_a_call_that_fulfils_the_schema(name, seed):
    """Random tokens, chosen among those that may follow."""
    form, draw = learned(name), random.Random(seed)
    made = matcher(tool_grammar(form, ToolRequest.of(TOOLS, "required"), TOKENS))
    ids: list[int] = []
    while not made.is_stopped() and len(ids) < 3000:
        forced = made.compute_ff_tokens()
        bits = np.unpackbits(np.frombuffer(made.compute_bitmask(), np.uint8), bitorder="little") if not forced else ()
        allowed = np.flatnonzero(bits).tolist()
        if made.is_accepting() and (draw.random() < 0.5 or not allowed):
            break
        end = TOKENS.ends
        token = forced[0] if forced else draw.choice([n for n in allowed if n not in end])
        assert made.consume_token(token)
        ids.append(token)
    assert made.is_accepting() or made.is_stopped()
    text = TokenText.of(tokenizer(None), form, ids)
    answer = split(text, form, tools_of(TOOLS))
    assert answer.tool_calls and not answer.problems and not answer.content.strip(), text
    for call in answer.tool_calls:
        schema = next(tool for tool in TOOLS if tool["name"] == call.name)["parameters"]
        given = {key: value for key, value in call.json().items() if value is not None}  # nullable is OpenAPI's word
        jsonschema.validate(given, {**schema, "additionalProperties": False})


def test_without_a_format_required_is_a_plain_object_and_auto_is_refused():
    form = learned("ignores calls")
    lark = tool_grammar(form, ToolRequest.of(TOOLS, "required"), TOKENS)
    assert accepts(lark, '{"name": "get", "arguments": {"key": 7}}')
    assert not accepts(lark, '{"name": "get", "arguments": {"key": 700}}')
    with pytest.raises(InputError, match="does not show the tool calls"):
        tool_grammar(form, ToolRequest.of(TOOLS, "auto"), TOKENS)
    assert tool_grammar(form, ToolRequest.of(TOOLS, "none"), TOKENS) is None
    parser = AnswerParser(form, tools_of(TOOLS), plain=True)
    pieces = [piece for letter in '{"name": "get", "arguments": {"key": 7}}' for piece in parser.push(letter)]
    assert found_calls(gather([*pieces, *parser.finish()])) == [("get", {"key": 7})]


def test_reasoning_may_come_first_in_a_forced_answer():
    form = learned("tags, with reasoning")
    call = '<tool_call>\n{"name": "stop", "arguments": {}}\n</tool_call>'
    lark = tool_grammar(form, ToolRequest.of(TOOLS, "required"), TOKENS)
    assert accepts(lark, call) and accepts(lark, "<think>\nA <tool_call>?\n</think>\n\n" + call)
    assert not accepts(lark, "<think>\nA\n" + call)
    opened = tool_grammar(form, ToolRequest.of(TOOLS, "required"), TOKENS, in_reasoning=True)
    assert accepts(opened, "A.\n</think>\n\n" + call) and not accepts(opened, call)


@pytest.mark.parametrize("schema", [
    {"type": "string", "pattern": "a+"}, {"type": "array", "uniqueItems": True}, {"type": "object", "minProperties": 1},
])  # fmt: skip
def test_a_keyword_that_a_format_cannot_obey_is_refused(schema):
    tool = {"name": "f", "parameters": {"type": "object", "properties": {"x": schema}}}
    with pytest.raises(InputError, match="cannot be obeyed"):
        tool_grammar(learned("Python calls in tokens, plain quotes"), ToolRequest.of([tool], "required"), TOKENS)


# ------------------------------------------------------------------------------------------------------------- answers


@pytest.mark.parametrize("name", TEMPLATES)
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_pieces_give_what_the_whole_text_gives(name, data):
    form = learned(name)
    calls = CALLS if may_be_parallel(name) else CALLS[1:2]
    content = "Hi <x> there.\n" if form.tools.trigger else ""
    text = content + rendered(name, calls) + ("\n\nDone. " if form.tools.trigger and "channels" not in name else "")
    if form.reasoning is not None and "plan" not in name:
        text = f"{form.reasoning.open}\nBecause < of {form.tools.before}\n{form.reasoning.close}\n\n" + text
    whole = split(text, form, tools_of(TOOLS))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=30)))
    parser = AnswerParser(form, tools_of(TOOLS))
    pieces = [piece for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True) for piece in parser.push(text[a:b])]
    answer = gather([*pieces, *parser.finish()])
    assert answer == whole
    assert found_calls(answer) == calls
    assert not answer.problems


def test_content_and_reasoning_come_at_once_and_calls_when_they_are_whole():
    form = learned("tags, with reasoning")
    parser = AnswerParser(form, tools_of(TOOLS), in_reasoning=True)
    text = 'So.\n</think>\n\nLet me see. \n<tool_call>\n{"name": "get", "arguments": {"key": 7}}\n</tool_call>'
    came = [(index, piece) for index, letter in enumerate(text) for piece in parser.push(letter)]
    assert not parser.finish()
    assert "".join(piece.reasoning for _, piece in came) == "So."
    assert "".join(piece.content for _, piece in came) == "Let me see."
    assert min(index for index, piece in came if piece.content) == text.index("L")
    (call,) = [(index, piece.call) for index, piece in came if piece.call]
    assert call[0] == len(text) - 1
    assert (call[1].name, call[1].arguments) == ("get", '{"key": 7}')
    assert call[1].message()["function"]["arguments"] == '{"key": 7}'


@pytest.mark.parametrize(("text", "content", "problem"), [
    ("<tool_call>\n{oops", "<tool_call>\n{oops", "a key is expected"),
    ('<tool_call>\n{"name": "get"}\n</tool_call>', '<tool_call>\n{"name": "get"}\n</tool_call>', "no 'arguments'"),
    ('A <tool_call>{"name": "put", "arguments": {}}</tool_call>.',
     'A <tool_call>{"name": "put", "arguments": {}}</tool_call>.', "no tool 'put'"),
    ("Use <tool_call> for it.", "Use <tool_call> for it.", "'{' is expected"),
    ('<tool_call>{"name": "get", "arguments": 7}</tool_call>', '<tool_call>{"name": "get", "arguments": 7}</tool_call>',
     "no object"),
])  # fmt: skip
def test_a_malformed_call_stays_content_and_says_so(text, content, problem):
    answer = split(text, learned("tags around each JSON call"), tools_of(TOOLS))
    assert not answer.tool_calls
    assert answer.content == content
    assert len(answer.problems) == 1 and problem in answer.problems[0]


@pytest.mark.parametrize("name", ["what begins every answer", "channels"])
def test_what_begins_every_answer_is_no_content(name):
    form = learned(name)
    text = form.content_open + " Hello < there."
    for cut in range(len(text)):
        parser = AnswerParser(form, tools_of(TOOLS))
        pieces = [*parser.push(text[:cut]), *parser.push(text[cut:]), *parser.finish()]
        assert gather(pieces).content == "Hello < there."


def test_a_good_call_behind_a_malformed_one_is_found():
    good = '<tool_call>{"name": "stop", "arguments": {}}</tool_call>'
    answer = split("<tool_call>no</tool_call>" + good, learned("tags around each JSON call"), tools_of(TOOLS))
    assert found_calls(answer) == [("stop", {})]
    assert answer.content == "<tool_call>no</tool_call>" and len(answer.problems) == 1


def test_a_call_may_lack_the_end_of_its_frame():
    for end in ("", "\n", "\n</tool", "\n</tool_call>"):
        text = '<tool_call>\n{"name": "stop", "arguments": {}}' + end
        assert found_calls(split(text, learned("tags around each JSON call"), tools_of(TOOLS))) == [("stop", {})]


def test_text_that_looks_like_a_call_is_content_without_tools():
    text = rendered("tags around each JSON call", CALLS[:1])
    assert split(text, learned("tags around each JSON call")).content == text


def test_where_nothing_announces_a_call_an_object_that_is_none_is_content():
    form = learned("a bare object, one call")
    for text in ('{"answer": 3}', "{oops", '{"name": "put", "parameters": {}}', "Text.", '{"name": "get"'):
        answer = split(text, form, tools_of(TOOLS))
        assert answer.content == text and not answer.tool_calls


def test_line_breaks_in_json_become_escapes_and_other_arguments_stay_as_written():
    form = learned("tags around each JSON call")
    text = '<tool_call>{"name": "get_weather", "arguments": {"city": "a\nb", "days": 1.50}}</tool_call>'
    (call,) = split(text, form, tools_of(TOOLS)).tool_calls
    assert json.loads(call.arguments) == {"city": "a\nb", "days": 1.5}
    (call,) = split(text.replace("\n", ""), form, tools_of(TOOLS)).tool_calls
    assert call.arguments == '{"city": "ab", "days": 1.50}'


def test_ids_are_nine_letters_and_digits_that_depend_on_the_seed():
    ids = {call_id(seed, index, "f") for seed in ("a", "b", "") for index in range(50)}
    assert len(ids) == 150
    assert all(len(one) == 9 and one.isascii() and one.isalnum() for one in ids)
    assert call_id("a", 0, "f") == call_id("a", 0, "f")


@pytest.mark.parametrize("name", TEMPLATES)
def test_special_tokens_of_a_call_are_kept_and_others_are_not(name):
    form, tokens = learned(name), tokenizer(TEMPLATES[name])
    text = rendered(name, [CALLS[0]])
    ids = tokens.encode(text + "<|user|>", add_special_tokens=False)
    shown = TokenText.of(tokens, form, ids)
    assert "<|user|>" not in shown
    assert found_calls(split(shown, form, tools_of(TOOLS))) == [CALLS[0]]
    assert any(one in text for one in (*PLAIN_TOKENS, *SPECIAL)) or not form.tools.trigger or "<" in text


def test_messages_have_arguments_as_the_template_expects_them():
    def given(form, arguments):
        call = {"id": "abcdefgh1", "type": "function", "function": {"name": "f", "arguments": arguments}}
        (message,) = messages_for([{"role": "assistant", "tool_calls": [call]}], form)
        return message["tool_calls"][0]["function"]["arguments"]

    mapping, text = learned("tags around each JSON call"), learned("nested tokens, arguments as text")
    assert given(mapping, '{"a": 1}') == given(mapping, {"a": 1}) == {"a": 1}
    assert given(text, '{"a":1}') == '{"a":1}' and given(text, {"a": 1}) == '{"a": 1}'
    assert given(mapping, "") == {}
    for wrong in ("{", "[1]"):
        with pytest.raises(InputError, match="no JSON"):
            given(mapping, wrong)
    assert messages_for([USER], mapping) == [USER]
