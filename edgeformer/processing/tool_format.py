"""How a model writes tool calls and reasoning: the constant texts around them, and how values are written.

`processing/tool_learning.py` learns a `ToolFormat` from a chat template. No format of any model family is built in.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

# Parts of an ObjectCall that stand for values; no template can write them.
NAME, ARGUMENTS, CALL_ID, NUMBER, TEXT = "\0name", "\0arguments", "\0id", "\0number", "\0text"
JSON, LITERAL, RAW = "json", "literal", "raw"  # how a value is written: JSON; a Python literal; a string without quotes


@dataclass(frozen=True)
class ObjectCall:
    """A call is an object with the name and the arguments: `{"name": "f", "arguments": {...}}`.

    Attributes:
        name_key, arguments_key: keys of the object.
        parts: the object as the template writes it: constant texts, and NAME, ARGUMENTS, CALL_ID, NUMBER or TEXT for
            values that differ between calls.
        style: JSON or LITERAL.
    """

    name_key: str
    arguments_key: str
    parts: tuple[str, ...] = ()
    style: str = JSON


@dataclass(frozen=True)
class NamedCall:
    """A call is the name, `middle`, and the arguments as one object: `<function=f>{...}</function>`."""

    middle: str
    style: str = JSON


@dataclass(frozen=True)
class PairCall:
    """A call is the name, `middle`, and each argument by itself: `f(a=1, b='x')` or `<parameter=a>1</parameter>`.

    Attributes:
        middle: between the name and the first key.
        assign: between a key and its value.
        join: between a value and the next key.
        close: what every value ends with; a part of `join` and of the format's `after`. May be empty.
        quotes: what encloses a string in this format; two empty texts if nothing does.
        string_style: RAW (no escapes), JSON or LITERAL.
        scalar_style, nested_style: JSON or LITERAL, for booleans and null, and for lists and objects.
        none: what follows the name of the last call if it has no arguments.
        none_between: the same if another call follows, up to its name; None if unknown.
    """

    middle: str
    assign: str
    join: str
    close: str
    quotes: tuple[str, str]
    string_style: str
    scalar_style: str
    nested_style: str
    none: str
    none_between: str | None


@dataclass(frozen=True)
class ToolFormat:
    """Tool calls in an answer: `before` CALL (`between` CALL)* `after`.

    Attributes:
        before: text before the first call's name (NamedCall, PairCall) or object (ObjectCall).
        between: from the end of a call to the next one's name or object; None: one call at most.
        after: from the end of the last call to the end of the turn.
        call: how one call is written.
        sorts: the template writes the arguments in the order of their names.
        arguments_as_text: the template expects the arguments of earlier calls as JSON text, not as a mapping.
    """

    before: str
    between: str | None
    after: str
    call: ObjectCall | NamedCall | PairCall
    sorts: bool = False
    arguments_as_text: bool = False

    @property
    def trigger(self) -> str:
        """The text that begins calls anywhere in an answer. Empty: only the beginning of an answer can be a call."""
        start = self.before.strip()
        return start if len(start) > 2 and re.search(r"\w", start) else ""

    @property
    def repeats(self) -> bool:
        """Whether each of several calls stands in a whole frame of its own."""
        end = self.after.split()
        return bool(self.trigger and end) and (self.between or "").split()[: len(end)] == end

    @property
    def texts(self) -> tuple[str, ...]:
        """All constant texts, as the template writes them."""
        own: tuple[str | None, ...] = ()
        if isinstance(self.call, ObjectCall):
            own = self.call.parts
        elif isinstance(self.call, NamedCall):
            own = (self.call.middle,)
        elif isinstance(self.call, PairCall):
            call = self.call
            own = (call.middle, call.assign, call.join, *call.quotes, call.none, call.none_between)
        return tuple(text for text in (self.before, self.between, self.after, *own) if text)


@dataclass(frozen=True)
class ReasoningFormat:
    """Reasoning stands between `open` and `close`, before the answer."""

    open: str
    close: str

    def is_open(self, prompt: str) -> bool:
        """Whether a rendered prompt ends within reasoning, so that the answer begins there."""
        return prompt.rstrip().endswith(self.open)


@dataclass(frozen=True)
class AnswerFormat:
    """What a chat template shows of the answers of its model.

    Attributes:
        tools: how calls are written; None if the template does not show it.
        why_no_tools: the reason, if `tools` is None.
        reasoning: how reasoning is written; None if the template does not show it.
    """

    tools: ToolFormat | None = None
    why_no_tools: str = ""
    reasoning: ReasoningFormat | None = None

    @property
    def texts(self) -> tuple[str, ...]:
        """All constant texts of calls and reasoning."""
        reasoning = () if self.reasoning is None else (self.reasoning.open, self.reasoning.close)
        return (*reasoning, *(() if self.tools is None else self.tools.texts))
