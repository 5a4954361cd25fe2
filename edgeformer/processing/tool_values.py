"""Values in a tool call, read from text that may be cut short: JSON, Python literals, and strings in own quotes.

Text of a model arrives in pieces. So every function tells "more text may complete it" (`MoreText`) from "this is no
call" (`NotACall`); both are for this package only and never reach a caller.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from typing import Any

DEPTH = 64  # nested lists and objects; deeper text is refused
NUMBER = re.compile(r"-?(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][+-]?\d+)?")
NUMBER_TEXT = re.compile(r"[-+.\w]*")
WORD = re.compile(r"[A-Za-z]+")
KEY = re.compile(r"[\w.$-]+")
SPACE = re.compile(r"\s*")
JSON_STRING = re.compile(r'"((?:[^"\\]|\\.)*)"', re.DOTALL)
PYTHON_STRING = re.compile(r"'((?:[^'\\]|\\.)*)'|" + JSON_STRING.pattern, re.DOTALL)
JSON_WORDS: dict[str, Any] = {"true": True, "false": False, "null": None}
WORDS = JSON_WORDS | {"True": True, "False": False, "None": None}
ESCAPE = re.compile(r"\\(x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8}|.)", re.DOTALL)
ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "a": "\a", "v": "\v", "0": "\0", "\n": ""}


class MoreText(Exception):
    """The text ends too early; more of it may complete the call."""


class NotACall(Exception):
    """The text is no call in this format, whatever follows."""


@dataclass(frozen=True)
class Span:
    """A value and the characters that it takes."""

    value: Any
    start: int
    end: int


@dataclass(frozen=True)
class Reader:
    """Reads values of one text.

    Attributes:
        text: what there is so far.
        final: no more text follows.
        strict: JSON only; otherwise also Python literals and bare keys.
        quotes: what encloses a string that has no escapes, beside `'` and `"`; None if nothing.
    """

    text: str
    final: bool = False
    strict: bool = True
    quotes: tuple[str, str] | None = None

    def value(self, place: int, depth: int = 0) -> Span:
        """The value that begins at `place`, after white space.

        Raises:
            MoreText: the text ends within it.
            NotACall: there is none.
        """
        start = self.skip(place)
        if start == len(self.text):
            raise self.ends()
        if depth > DEPTH:
            raise NotACall(f"values are nested more than {DEPTH} deep")
        first = self.text[start]
        if first == "{":
            members, end = self.members(start, depth)
            return Span({key: span.value for key, span in members.items()}, start, end)
        if first == "[":
            return self._list(start, depth)
        text = self._string(start)
        if text is not None:
            return text
        if first in "-+." or first.isdigit():
            return self._number(start)
        return self._word(start)

    def members(self, start: int, depth: int = 0) -> tuple[dict[str, Span], int]:
        """The members of the object at `start`, and the end of it. Of equal keys the last counts, as in `json`."""
        found: dict[str, Span] = {}
        place = self.character(start, "{")
        if self._peek(place) == "}":
            return found, self.skip(place) + 1
        while True:
            key, place = self._key(place)
            found[key] = self.value(self.character(place, ":"), depth + 1)
            place = found[key].end
            if self._peek(place) == "}":
                return found, self.skip(place) + 1
            place = self.character(place, ",")

    def skip(self, place: int) -> int:
        """The first place from `place` on without white space."""
        found = SPACE.match(self.text, place)
        return found.end() if found else place

    def character(self, place: int, wanted: str) -> int:
        """The place after `wanted`, which must be the next character that is no white space."""
        if self._peek(place) != wanted:
            raise NotACall(f"{self._near(place)} stands where {wanted!r} is expected")
        return self.skip(place) + 1

    def ends(self) -> MoreText | NotACall:
        """The error for a text that ends too early."""
        return NotACall("the text ends within the call") if self.final else MoreText()

    def _peek(self, place: int) -> str:
        place = self.skip(place)
        if place == len(self.text):
            raise self.ends()
        return self.text[place]

    def _near(self, place: int) -> str:
        return repr(self.text[place : place + 20])

    def _key(self, place: int) -> tuple[str, int]:
        place = self.skip(place)
        if place == len(self.text):
            raise self.ends()
        quoted = self._string(place)
        if quoted is not None:
            return quoted.value, quoted.end
        bare = None if self.strict else KEY.match(self.text, place)
        if bare is None:
            raise NotACall(f"{self._near(place)} stands where a key is expected")
        if bare.end() == len(self.text):
            raise self.ends()
        return bare.group(), bare.end()

    def _list(self, start: int, depth: int) -> Span:
        items: list[Any] = []
        place = start + 1
        if self._peek(place) == "]":
            return Span(items, start, self.skip(place) + 1)
        while True:
            item = self.value(place, depth + 1)
            items.append(item.value)
            if self._peek(item.end) == "]":
                return Span(items, start, self.skip(item.end) + 1)
            place = self.character(item.end, ",")

    def _string(self, start: int) -> Span | None:
        """The string at `start`; None if another value begins there."""
        if self.quotes is not None and self.quotes[0] not in "'\"":
            opening, closing = self.quotes
            if self.text.startswith(opening, start):
                end = self.text.find(closing, start + len(opening))
                if end < 0:
                    raise self.ends()
                return Span(self.text[start + len(opening) : end], start, end + len(closing))
            if opening.startswith(self.text[start:]):
                raise self.ends()
        if self.text[start] != '"' and (self.strict or self.text[start] != "'"):
            return None
        found = (JSON_STRING if self.strict else PYTHON_STRING).match(self.text, start)
        if found is None:
            raise self.ends()
        return Span(self._unescaped(found), start, found.end())

    def _unescaped(self, found: re.Match[str]) -> str:
        if self.strict:
            try:
                # Models write line breaks into strings, which JSON forbids.
                text: str = json.loads(found.group(), strict=False)
            except ValueError as error:
                raise NotACall(f"{found.group()[:40]!r} is no JSON string") from error
            return text
        return ESCAPE.sub(_escaped, next(part for part in found.groups() if part is not None))

    def _number(self, start: int) -> Span:
        whole = NUMBER_TEXT.match(self.text, start)
        assert whole is not None  # it matches the empty text too
        if whole.end() == len(self.text) and not self.final:
            raise MoreText
        if not NUMBER.fullmatch(whole.group()):
            raise NotACall(f"{whole.group()[:40]!r} is no number")
        try:
            value: int | float = json.loads(whole.group())
        except ValueError as error:  # Python limits the digits of an integer
            raise NotACall(f"{whole.group()[:40]!r} has too many digits") from error
        if isinstance(value, float) and math.isinf(value):
            raise NotACall(f"{whole.group()[:40]!r} is too large")
        return Span(value, start, whole.end())

    def _word(self, start: int) -> Span:
        words = JSON_WORDS if self.strict else WORDS
        found = WORD.match(self.text, start)
        word = found.group() if found else ""
        if start + len(word) == len(self.text) and not self.final and any(name.startswith(word) for name in words):
            raise MoreText
        if word not in words:
            raise NotACall(f"{self._near(start)} is no value")
        return Span(words[word], start, start + len(word))


def _escaped(found: re.Match[str]) -> str:
    code = found.group(1)
    if len(code) > 1:
        number = int(code[1:], 16)
        return chr(number) if number < 0x110000 else found.group()
    if code in "\\'\"/":
        return code
    return ESCAPES.get(code, found.group())


def literal(text: str, place: int, expected: str, final: bool = False) -> int:
    """The place after `expected`. A run of white space in it stands for any run, an empty one too.

    Models often write a space or a line break more or less than their template.

    Raises:
        MoreText: the text ends within `expected`.
        NotACall: something else stands there.
    """
    words = expected.split()
    for word in words:
        place = _skip(text, place)
        found = text[place : place + len(word)]
        if found != word:
            if not final and word.startswith(found):
                raise MoreText
            raise NotACall(f"{found!r} stands where {word!r} is expected")
        place += len(word)
    return _skip(text, place) if not words or expected[-1].isspace() else place


def _skip(text: str, place: int) -> int:
    found = SPACE.match(text, place)
    return found.end() if found else place


def to_json(value: Any) -> str:
    """`value` as JSON text, readable where UTF-8 can hold it."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    try:
        text.encode()
    except UnicodeEncodeError:  # a lone surrogate
        return json.dumps(value, allow_nan=False)
    return text
