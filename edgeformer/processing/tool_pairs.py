"""Learns a format in which each argument stands by itself, as `f(a=1)` or `<parameter=a>1</parameter>`."""

from __future__ import annotations

from typing import Any

from edgeformer.processing.tool_format import JSON, LITERAL, RAW, PairCall, ToolFormat
from edgeformer.processing.tool_probe import KEYS, NAMES, CannotLearn, Probe, common, outside_tag, place_of
from edgeformer.processing.tool_values import NotACall, Reader

ONE, TWO, TEXT = 8675301, 8675302, "vq7 text"
ESCAPED = "a\"b'c\\d"
NESTED = {"deep": [1, "x"], "more": {"y": "z"}}


def learn_pairs(probe: Probe) -> ToolFormat:
    """The format, unchecked.

    Raises:
        CannotLearn: the template shows none of this kind.
        TemplateError: it refuses the calls.
    """
    one = probe.body([(NAMES[0], {KEYS[0]: ONE})])
    name, key, value = place_of(one, NAMES[0]), place_of(one, KEYS[0]), place_of(one, str(ONE))
    if not name < key < value:
        raise CannotLearn("the chat template writes no name, key and value in this order")
    before, middle = one[:name], one[name + len(NAMES[0]) : key]
    assign, after = one[key + len(KEYS[0]) : value], one[value + len(str(ONE)) :]
    two = probe.body([(NAMES[0], {KEYS[0]: ONE, KEYS[1]: TWO})])
    join = two[place_of(two, str(ONE)) + len(str(ONE)) : place_of(two, KEYS[1])]
    quotes = _quotes(probe, assign, after)
    between, none_between = _several(probe)
    empty = probe.body([(NAMES[0], {})])
    none = empty[place_of(empty, NAMES[0]) + len(NAMES[0]) :]
    close = join[: common(join, after, *([] if between is None else [between]))]
    close = close[: outside_tag(close, len(close))]
    if not close.strip() and not quotes[0]:
        raise CannotLearn("the chat template writes texts without quotes and without an end")

    def written(sample: Any) -> str:
        """How the template writes a value."""
        body = probe.body([(NAMES[0], {KEYS[0]: sample})])
        start = place_of(body, KEYS[0]) + len(KEYS[0])
        if body[start:].startswith(assign) and body.endswith(after):
            return body[start + len(assign) : len(body) - len(after)]
        raise CannotLearn(f"the chat template writes the value {sample!r} in another way than a number")

    call = PairCall(
        middle=middle,
        assign=assign,
        join=join,
        close=close,
        quotes=quotes,
        string_style=_string_style(written(ESCAPED), quotes),
        scalar_style=_style(written, [True, False, None], quotes),
        nested_style=_style(written, [[1, "x"], NESTED], quotes),
        none=none,
        none_between=none_between,
    )
    return ToolFormat(before, between, after, call)


def _quotes(probe: Probe, assign: str, after: str) -> tuple[str, str]:
    """What stands around a text and not around a number."""
    body = probe.body([(NAMES[0], {KEYS[0]: TEXT})])
    place = place_of(body, TEXT)
    before, behind = body[place_of(body, KEYS[0]) + len(KEYS[0]) : place], body[place + len(TEXT) :]
    if not before.startswith(assign) or not behind.endswith(after):
        raise CannotLearn("the chat template writes texts in another way than numbers")
    opening, closing = before[len(assign) :], behind[: len(behind) - len(after)]
    if bool(opening) != bool(closing):
        raise CannotLearn(f"the chat template writes {opening!r} and {closing!r} around a text")
    return opening, closing


def _several(probe: Probe) -> tuple[str | None, str | None]:
    """From the last value of a call to the next name; from a name without arguments to the next one."""
    two = probe.try_body([(NAMES[0], {KEYS[0]: ONE}), (NAMES[1], {KEYS[0]: TWO})])
    if two is None or any(two.count(part) != 1 for part in (NAMES[0], NAMES[1], str(ONE))):
        return None, None
    between = two[two.index(str(ONE)) + len(str(ONE)) : two.index(NAMES[1])]
    empty = probe.try_body([(NAMES[0], {}), (NAMES[1], {KEYS[0]: TWO})])
    if empty is None or empty.count(NAMES[0]) != 1 or empty.count(NAMES[1]) != 1:
        return between, None
    return between, empty[empty.index(NAMES[0]) + len(NAMES[0]) : empty.index(NAMES[1])]


def _string_style(text: str, quotes: tuple[str, str]) -> str:
    if text == quotes[0] + ESCAPED + quotes[1]:
        return RAW
    for style in (JSON, LITERAL):
        try:
            found = Reader(text, final=True, strict=style == JSON).value(0)
        except NotACall:
            continue
        if found.value == ESCAPED and found.end == len(text):
            return style
    raise CannotLearn(f"the chat template writes the text {ESCAPED!r} as {text!r}")


def _style(written: Any, samples: list[Any], quotes: tuple[str, str]) -> str:
    for style in (JSON, LITERAL):
        own = quotes if quotes[0] and style == LITERAL else None
        if all(_reads(written(sample), sample, Reader("", True, style == JSON, own)) for sample in samples):
            return style
    raise CannotLearn(f"the chat template writes {samples[-1]!r} as {written(samples[-1])!r}")


def _reads(text: str, sample: Any, settings: Reader) -> bool:
    reader = Reader(text, True, settings.strict, settings.quotes)
    try:
        found = reader.value(0)
    except NotACall:
        return False
    return found.end == len(text.rstrip()) and found.value == sample and type(found.value) is type(sample)
