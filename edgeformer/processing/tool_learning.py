"""Learns from a chat template how its model writes tool calls and reasoning.

Known calls are rendered, and the constant text between their names, keys and values is the format. It is kept only if
reading rendered calls gives the same calls again. So no list of model families is needed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from edgeformer.errors import EdgeformerError
from edgeformer.processing.tokenizer import Tokenizer
from edgeformer.processing.tool_format import (
    ARGUMENTS,
    JSON,
    LITERAL,
    NAME,
    TEXT,
    AnswerFormat,
    NamedCall,
    ObjectCall,
    PairCall,
    ReasoningFormat,
    ToolFormat,
)
from edgeformer.processing.tool_pairs import learn_pairs
from edgeformer.processing.tool_probe import (
    ANSWER,
    ID,
    KEYS,
    NAMES,
    REASON,
    SCHEMAS,
    Arguments,
    Call,
    CannotLearn,
    Probe,
    common,
    outside_tag,
    place_of,
)
from edgeformer.processing.tool_reading import CallReader, Known
from edgeformer.processing.tool_values import CALL_ID, NUMBER, MoreText, NotACall, Reader, Span

PLAIN: Arguments = {KEYS[0]: "vq7 one"}
OTHER: Arguments = {KEYS[1]: "vq7 two"}
# Calls that the format must read as they were written: all types, no arguments, characters with escapes.
CHECKS: tuple[tuple[Call, ...], ...] = (
    ((NAMES[0], {KEYS[0]: "vq7 one", KEYS[1]: 8675301, KEYS[2]: True, KEYS[3]: {"deep": [1, "x", None]}}),),
    ((NAMES[0], {}),),
    ((NAMES[1], {KEYS[0]: 'a "quoted" Größe 東京 \\ {x}, [y]', KEYS[1]: -2.5}),),
    ((NAMES[1], {KEYS[0]: "two\n\nlines", KEYS[3]: {"a": {"b": False}, "c": "d"}}),),
)


def learn_answer_format(tokenizer: Tokenizer, ends: Collection[str] = ()) -> AnswerFormat:
    """What the bundle's chat template shows of calls and reasoning.

    `ends` are the texts of the tokens that end an answer, beside the tokenizer's own end token.

    Never raises for a template that shows nothing, or fails: then `tools` is None, and `why_no_tools` has the reason.
    It renders about forty short chats: keep the result.
    """
    if not tokenizer.chat.names:
        return AnswerFormat(why_no_tools="the bundle has no chat template")
    try:
        probe = Probe(tokenizer, ends)
    except EdgeformerError as error:
        return AnswerFormat(why_no_tools=f"the chat template refuses a short chat: {error}")
    reasoning = _reasoning(probe)
    probe.reasoning = reasoning
    found: list[ToolFormat] = []
    reasons: list[str] = []
    for as_text in (False, True):
        probe.arguments_as_text = as_text
        try:
            found.append(_tools(probe))
        except (CannotLearn, EdgeformerError) as error:
            reasons.append(str(error))
    if not found:
        return AnswerFormat(None, reasons[0], reasoning, _content_open(probe))
    # A mapping that the template prints as Python does (`{{ arguments }}`) was not meant to be given.
    found.sort(key=lambda one: getattr(one.call, "style", JSON) == LITERAL)
    opening = _content_open(probe)
    tools = found[0]
    if opening and tools.before.lstrip().startswith(opening):  # what begins every answer begins no call
        tools = replace(tools, before=tools.before.lstrip().removeprefix(opening))
    return AnswerFormat(tools, "", reasoning, opening)


# ----------------------------------------------------------------------------------------------------------- reasoning


def _reasoning(probe: Probe) -> ReasoningFormat | None:
    """The texts around `reasoning_content`; None if the template does not show it."""
    try:
        text = probe.text(content=ANSWER, reasoning=REASON)
        if REASON not in text:
            text = probe.text([(NAMES[0], PLAIN)], reasoning=REASON)
    except EdgeformerError:
        text = ""
    place = text.find(REASON)
    if place < 0:
        return _reasoning_of_prompt(probe)
    start = probe.cut(text)
    before = text[start:place].strip()
    if not before:  # the prompt for an answer has it too
        tag = re.search(r"<[^<>\s]+>\s*$|\[[^\[\]\s]+\]\s*$", text[:place])
        before = tag.group().strip() if tag else ""
    behind = text[place + len(REASON) :]
    close = _reasoning_end(probe, behind)
    plain = probe.answer.find(ANSWER)
    if plain >= 0 and text[:place].rstrip() == probe.answer[:plain].rstrip():
        return None  # nothing stands before reasoning that does not stand before an answer
    return ReasoningFormat(before, close) if before and close else None


def _reasoning_end(probe: Probe, behind: str) -> str:
    """The text that ends reasoning, before an answer and before calls."""
    answer = behind.find(ANSWER)
    if answer < 0:
        return _first_tag(behind).strip()
    close = behind[:answer]
    try:
        calls = probe.text([(NAMES[0], PLAIN)], reasoning=REASON).partition(REASON)[2]
    except EdgeformerError:
        calls = ""
    if calls:
        both = common(close, calls)
        close = close[: both if both == len(close) else outside_tag(close, both)] or close
    return close.strip()


def _first_tag(text: str) -> str:
    tag = re.match(r"\s*(<[^<>]*>|\[[^\[\]]*\])", text)
    return tag.group() if tag else ""


def _content_open(probe: Probe) -> str:
    """Text before the content of a plain answer that the prompt does not have."""
    place = probe.answer.find(ANSWER)
    return "" if place < 0 else probe.without_reasoning(probe.answer[probe.cut(probe.answer) : place]).strip()


def _reasoning_of_prompt(probe: Probe) -> ReasoningFormat | None:
    """The tag that the prompt ends with, if a finished answer does not have it and the template names its end."""
    extra = probe.prompt[outside_tag(probe.prompt, common(probe.prompt, probe.answer)) :].strip()
    tag = re.fullmatch(r"<([A-Za-z]\w*)>", extra)
    if tag is None or f"</{tag.group(1)}>" not in probe.source:
        return None
    return ReasoningFormat(extra, f"</{tag.group(1)}>")


# --------------------------------------------------------------------------------------------------------------- calls


def _tools(probe: Probe) -> ToolFormat:
    """The format of calls, checked.

    Raises:
        CannotLearn: the template does not show it.
        TemplateError: it refuses the calls.
    """
    body = probe.body([(NAMES[0], PLAIN)])
    if NAMES[0] not in body:
        raise CannotLearn("the chat template does not show the tool calls of a message")
    if _objects(body):
        learned = _object_format(probe, body)
    else:
        place = place_of(body, NAMES[0])
        arguments = next((span for span, _ in _spans(body) if span.value == PLAIN), None)
        if arguments is not None and arguments.start < place:
            raise CannotLearn("the chat template writes the arguments before the name")
        learned = learn_pairs(probe) if arguments is None else _named_format(probe, body)
    turned = probe.body([(NAMES[0], {KEYS[1]: 1, KEYS[0]: "x"})])
    sorts = turned.find(KEYS[0]) < turned.find(KEYS[1])
    learned = _marked(replace(learned, sorts=sorts, arguments_as_text=probe.arguments_as_text))
    return _checked(probe, learned)


def _marked(learned: ToolFormat) -> ToolFormat:
    """The format with marks for the ids of calls."""

    def marked(text: str) -> str:
        return re.sub(ID.format(r"\d"), lambda _: CALL_ID, text)

    call = learned.call
    if isinstance(call, NamedCall):
        call = replace(call, middle=marked(call.middle))
    elif isinstance(call, PairCall):
        between = None if call.none_between is None else marked(call.none_between)
        call = replace(call, middle=marked(call.middle), none=marked(call.none), none_between=between)
    between = None if learned.between is None else marked(learned.between)
    return replace(learned, before=marked(learned.before), between=between, after=marked(learned.after), call=call)


def _spans(body: str) -> list[tuple[Span, str]]:
    """The objects in `body`, each with its style."""
    found = []
    for place in (match.start() for match in re.finditer(r"\{", body)):
        for style in (JSON, LITERAL):
            reader = Reader(body, final=True, strict=style == JSON)
            try:
                members, end = reader.members(place)
            except (NotACall, MoreText):
                continue
            found.append((Span({key: span.value for key, span in members.items()}, place, end), style))
            break
    return found


def _objects(body: str) -> list[tuple[ObjectCall, Span]]:
    """The objects that hold a name and arguments, outer ones first."""
    found: list[tuple[ObjectCall, Span]] = []
    for span, style in _spans(body):
        name = next((key for key, value in span.value.items() if value in NAMES), None)
        arguments = next((key for key, value in span.value.items() if value in (PLAIN, OTHER)), None)
        if name is not None and arguments is not None:
            found.append((ObjectCall(name, arguments, style=style), span))
    return found


def _object_format(probe: Probe, body: str) -> ToolFormat:
    call, one = _objects(body)[0]
    pair = probe.try_body([(NAMES[0], PLAIN), (NAMES[1], OTHER)])
    found = [] if pair is None else _objects(pair)
    between, second = None, one.value
    if pair is not None and len(found) == 2 and pair[found[1][1].end :] == body[one.end :]:
        between = pair[found[0][1].end : found[1][1].start]
        second = found[1][1].value
    call = replace(call, parts=_parts(body, one, call, second))
    return ToolFormat(body[: one.start], between, body[one.end :], call)


def _parts(body: str, one: Span, call: ObjectCall, second: Mapping[str, Any]) -> tuple[str, ...]:
    """The text of an object, with marks in the place of what differs in the `second` call."""
    members, _ = Reader(body, final=True, strict=call.style == JSON).members(one.start)
    kinds = {call.name_key: NAME, call.arguments_key: ARGUMENTS}
    for key, span in members.items():
        if key not in kinds and span.value == ID.format(0):
            kinds[key] = CALL_ID
        elif key not in kinds and span.value != second.get(key):
            kinds[key] = TEXT if isinstance(span.value, str) else NUMBER
    parts: list[str] = []
    place = one.start
    for key, kind in sorted(kinds.items(), key=lambda item: members[item[0]].start):
        parts += [body[place : members[key].start], kind]
        place = members[key].end
    return (*parts, body[place : one.end])


def _named_format(probe: Probe, body: str) -> ToolFormat:
    name = place_of(body, NAMES[0])
    one, style = next((span, style) for span, style in _spans(body) if span.value == PLAIN)
    middle = body[name + len(NAMES[0]) : one.start]
    pair = probe.try_body([(NAMES[0], PLAIN), (NAMES[1], OTHER)])
    between = None
    if pair is not None and pair.count(NAMES[1]) == 1:
        first = next((span for span, _ in _spans(pair) if span.value == PLAIN), None)
        if first is not None and first.end <= pair.index(NAMES[1]):
            between = pair[first.end : pair.index(NAMES[1])]
            second = next((span for span, _ in _spans(pair) if span.value == OTHER), first)
            middle = _varying(middle, pair[pair.index(NAMES[1]) + len(NAMES[1]) : second.start])
    return ToolFormat(body[:name], between, body[one.end :], NamedCall(middle, style))


def _varying(one: str, other: str) -> str:
    """`one`, with a mark for each number that is another one in `other`."""
    parts, others = (re.split(r"(\d+)", re.sub(ID.format(r"\d"), lambda _: CALL_ID, text)) for text in (one, other))
    if parts[::2] != others[::2]:
        return one
    return "".join(NUMBER if part != there else part for part, there in zip(parts, others, strict=True))


def _checked(probe: Probe, learned: ToolFormat) -> ToolFormat:
    """`learned`, if it reads what the template writes; without `between` if that fails for several calls.

    Raises:
        CannotLearn: it does not.
    """
    for calls in CHECKS:
        _check(probe, learned, calls)
    several: tuple[Call, ...] = (CHECKS[0][0], (NAMES[1], PLAIN), (NAMES[2], {}))
    try:
        _check(probe, learned, several)
        _check(probe, learned, ((NAMES[2], {}), (NAMES[1], PLAIN)))
    except (CannotLearn, EdgeformerError):
        return replace(learned, between=None)
    return learned


def _check(probe: Probe, learned: ToolFormat, calls: Sequence[Call]) -> None:
    body = probe.body(calls)
    reader = CallReader(learned, Known(SCHEMAS))
    try:
        found = read_all(reader, body)
    except NotACall as error:
        raise CannotLearn(f"the text of a call cannot be read back: {error}") from error
    expected, got = _texts(calls), _texts(found)
    if got != expected:
        raise CannotLearn(f"the text of a call is read back as {got[0] if got else 'nothing'}, not as {expected[0]}")


def _texts(calls: Sequence[Call]) -> list[str]:
    """The calls as JSON: there, True is not 1. Templates may sort keys."""
    return [json.dumps([name, arguments], sort_keys=True) for name, arguments in calls]


def read_all(reader: CallReader, body: str) -> list[tuple[str, Mapping[str, Any]]]:
    """All calls of a text that has nothing else.

    Raises:
        NotACall: it has something else.
    """
    found: list[tuple[str, Mapping[str, Any]]] = []
    place, first = 0, True
    while not first or body[place:].strip():
        one = reader.read(body, place, first, final=True)
        found.append((one.name, json.loads(one.arguments)))
        place, first = one.end, not one.another
    return found
