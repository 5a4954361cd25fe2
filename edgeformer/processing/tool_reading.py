"""Reads tool calls of a text, in a format that was learned from a chat template."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from edgeformer.processing.tool_format import JSON, RAW, ObjectCall, PairCall, ToolFormat
from edgeformer.processing.tool_values import MoreText, NotACall, Reader, Span, literal, to_json

T = TypeVar("T")
TOOL_NAME = re.compile(r"[A-Za-z0-9_.-]+")
KEY = re.compile(r"[^\s<>=(){}\[\],:\"']+")


@dataclass(frozen=True)
class FoundCall:
    """A call that was read: `arguments` is JSON text. Behind `end` the next call begins, if there is `another`."""

    name: str
    arguments: str
    end: int
    another: bool


@dataclass(frozen=True)
class Known:
    """What a reader knows of the tools: the JSON schemas of their parameters by name; None if nothing."""

    schemas: Mapping[str, Mapping[str, Any]] | None = None

    def check(self, name: str, whole: bool) -> None:
        """Raises NotACall: no tool has this name; if it is not `whole`, none has a name that begins so."""
        if self.schemas is None:
            return
        if not (name in self.schemas if whole else any(known.startswith(name) for known in self.schemas)):
            raise NotACall(f"there is no tool {name!r}")

    def types(self, name: str, key: str) -> set[str] | None:
        """JSON types that the argument `key` of the tool may have; None if any."""
        schema = (self.schemas or {}).get(name, {})
        properties = schema.get("properties")
        return types_of(properties[key], schema) if isinstance(properties, Mapping) and key in properties else None


def types_of(schema: Any, root: Mapping[str, Any], depth: int = 0) -> set[str] | None:
    """The JSON types that `schema` allows; None if it does not say."""
    if not isinstance(schema, Mapping) or depth > 8:
        return None
    given = schema.get("type")
    if given is not None:
        return {given} if isinstance(given, str) else set(given)
    values = schema.get("enum", [schema["const"]] if "const" in schema else None)
    if values is not None:
        return {json_type(value) for value in values}
    reference = schema.get("$ref")
    if isinstance(reference, str) and reference.startswith("#/"):
        target: Any = root
        for part in reference[2:].split("/"):
            target = target.get(part) if isinstance(target, Mapping) else None
        return types_of(target, root, depth + 1)
    options = schema.get("anyOf", schema.get("oneOf"))
    if isinstance(options, Sequence):
        found = [types_of(option, root, depth + 1) for option in options]
        return None if None in found else set().union(*(types for types in found if types))
    return None


def json_type(value: Any) -> str:
    """The JSON Schema type of a value."""
    if value is None:
        return "null"
    names = ((bool, "boolean"), (int, "integer"), (float, "number"), (str, "string"), (Mapping, "object"))
    return next((name for kind, name in names if isinstance(value, kind)), "array")


@dataclass(frozen=True)
class CallReader:
    """Reads calls in `format` from a text."""

    format: ToolFormat
    known: Known = field(default_factory=Known)

    def read(self, text: str, place: int, first: bool = True, final: bool = False) -> FoundCall:
        """The call at `place`; if it is the `first`, the format's `before` stands there.

        Raises:
            MoreText: the text ends within the call (never if it is `final`).
            NotACall: there is no call, with the reason.
        """
        call = self.format.call
        if first:
            place = literal(text, place, self.format.before, final)
        if isinstance(call, ObjectCall):
            name, arguments, place = self._object(call, text, place, final)
            return FoundCall(name, arguments, *self._ending(text, place, final))
        name, place = self._name(text, place, final)
        if isinstance(call, PairCall):
            return _Pairs(self, call, name, text, final).read(place)
        reader = Reader(text, final, call.style == JSON)
        place = reader.skip(literal(text, place, call.middle, final))
        members, end = reader.members(place)
        found = Span({key: span.value for key, span in members.items()}, place, end)
        return FoundCall(name, _json_text(text, found, call.style), *self._ending(text, end, final))

    def _name(self, text: str, place: int, final: bool) -> tuple[str, int]:
        reader = Reader(text, final)
        place = reader.skip(place)
        found = TOOL_NAME.match(text, place)
        if place == len(text) or (found and found.end() == len(text) and not final):
            self.known.check(text[place:], whole=False)
            raise reader.ends()
        if found is None:
            raise NotACall(f"{text[place : place + 20]!r} stands where a tool's name is expected")
        self.known.check(found.group(), whole=True)
        return found.group(), found.end()

    def _object(self, call: ObjectCall, text: str, place: int, final: bool) -> tuple[str, str, int]:
        reader = Reader(text, final, call.style == JSON)
        members, end = reader.members(reader.skip(place))
        for key in (call.name_key, call.arguments_key):
            if key not in members:
                raise NotACall(f"the call has no {key!r}")
        name, arguments = members[call.name_key].value, members[call.arguments_key]
        if not isinstance(name, str) or not isinstance(arguments.value, dict):
            raise NotACall("the name is no text, or the arguments are no object")
        self.known.check(name, whole=True)
        return name, _json_text(text, arguments, call.style), end

    def _ending(
        self, text: str, place: int, final: bool, none: tuple[str, str | None] | None = None
    ) -> tuple[int, bool]:
        """The place after what follows a call, and whether another call begins there.

        `none` are the texts after a call without arguments, if they differ: of the last call, and of another.
        """
        after, between = (self.format.after, self.format.between) if none is None else none
        choices: list[Callable[[], tuple[int, bool]]] = [lambda: (_last(text, place, after, final), False)]
        if between is not None and between.strip() and not self.format.repeats:
            choices.insert(0, lambda: (literal(text, place, between, final), True))
        return first_of(choices)


def first_of(choices: Sequence[Callable[[], T]]) -> T:
    """The result of the first choice that fits; MoreText if more text may make one of them fit.

    Raises:
        MoreText: see above.
        NotACall: none fits; the reason is the last one's.
    """
    results: list[T] = []
    more = False
    reason = NotACall("nothing fits")
    for choice in choices:
        try:
            results.append(choice())
        except MoreText:
            more = True
        except NotACall as error:
            reason = error
    if more:
        raise MoreText
    if not results:
        raise reason
    return results[0]


def _last(text: str, place: int, after: str, final: bool) -> int:
    """The place after `after`; at the end of a text it may be cut short: the model stopped early."""
    if final and "".join(after.split()).startswith("".join(text[place:].split())):
        return len(text)
    return literal(text, place, after, final)


def _json_text(text: str, found: Span, style: str) -> str:
    """Arguments as JSON text: as the model wrote them, if that is JSON."""
    written = text[found.start : found.end]
    try:
        return written if style == JSON and json.loads(written) == found.value else to_json(found.value)
    except ValueError:  # line breaks in strings
        return to_json(found.value)


@dataclass(frozen=True)
class _Pairs:
    """Reads one call with its arguments one by one."""

    reader: CallReader
    call: PairCall
    name: str
    text: str
    final: bool

    def read(self, place: int) -> FoundCall:
        arguments: dict[str, Any] = {}
        before, none = self.call.middle, (self.call.none, self.call.none_between)
        while True:
            key, place, another = self._next(place, before, None if arguments else none)
            if key is None:
                return FoundCall(self.name, to_json(arguments), place, another)
            arguments[key], place = self._value(key, place)
            before = self.call.join

    def _next(self, place: int, before: str, none: tuple[str, str | None] | None) -> tuple[str | None, int, bool]:
        """(key, place of its value, False), or (None, end of the call, whether another one follows)."""

        def argument() -> tuple[str | None, int, bool]:
            key, start = self._key(literal(self.text, place, before, self.final))
            return key, start, False

        return first_of([argument, lambda: (None, *self.reader._ending(self.text, place, self.final, none))])

    def _key(self, place: int) -> tuple[str, int]:
        found = KEY.match(self.text, place)
        if place == len(self.text) or (found and found.end() == len(self.text)):
            raise Reader(self.text, self.final).ends()
        if found is None:
            raise NotACall(f"{self.text[place : place + 20]!r} stands where an argument's name is expected")
        assign = self.call.assign
        end = literal(self.text, found.end(), assign.rstrip(), self.final)
        space = assign[len(assign.rstrip()) :]
        rest = self.text[end : end + len(space)]
        if rest != space and space.startswith(rest) and not self.final:
            raise MoreText
        return found.group(), end + (len(space) if rest == space else 0)

    def _value(self, key: str, place: int) -> tuple[Any, int]:
        call = self.call
        opening, closing = call.quotes
        if call.string_style != RAW or (opening and self.text.startswith(opening, place)):
            if call.string_style == RAW and opening:
                return self._raw(place + len(opening), closing)
            found = self._reader(call.string_style == JSON == call.nested_style).value(place)
            return found.value, found.end
        if opening:
            if opening.startswith(self.text[place:]) and not self.final:
                raise MoreText
            found = self._reader(False).value(place)
            return found.value, found.end
        text, end = self._raw(place, "")
        return self._typed(key, text), end

    def _reader(self, strict: bool) -> Reader:
        return Reader(self.text, self.final, strict, self.call.quotes if self.call.quotes[0] else None)

    def _raw(self, place: int, closing: str) -> tuple[str, int]:
        """The string at `place` and the place after it. It ends where the call can go on."""
        wanted = closing or self.call.close.split()[0]
        space = "" if closing else self.call.close[: -len(self.call.close.lstrip())]
        found = place
        while (found := self.text.find(wanted, found)) >= 0:
            end = found + len(closing)
            start = found - len(space) if space and self.text.endswith(space, place, found) else found
            try:
                self._next(end if closing else start, self.call.join, None)
            except NotACall:
                found += 1
                continue
            return self.text[place : max(start, place)], end if closing else start
        raise Reader(self.text, self.final).ends()

    def _typed(self, key: str, text: str) -> Any:
        """The value of a text without quotes: the tool's schema tells strings from the rest."""
        types = self.reader.known.types(self.name, key)
        if types == {"string"}:
            return text
        for strict in (True, False):
            reader = Reader(text, final=True, strict=strict)
            try:
                found = reader.value(0)
            except NotACall:
                continue
            if reader.skip(found.end) < len(text) or isinstance(found.value, str):
                continue
            return found.value
        if types is not None and "string" not in types:
            raise NotACall(f"{text[:40]!r} is no {' or '.join(sorted(types))}")
        return text
