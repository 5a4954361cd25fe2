"""Answers as content, reasoning and tool calls: of a whole text, or of text that comes in pieces."""

from __future__ import annotations

import hashlib
import json
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from edgeformer.decoding.stop import overlap
from edgeformer.decoding.tools.definitions import Tool
from edgeformer.errors import InputError
from edgeformer.processing.tool_format import (
    ARGUMENTS,
    NAME,
    AnswerFormat,
    ObjectCall,
    ToolFormat,
)
from edgeformer.processing.tool_reading import CallReader, Known
from edgeformer.processing.tool_values import MoreText, NotACall, literal, to_json

# How calls are forced where the template shows no format of its own.
PLAIN = ToolFormat(
    before="",
    between=None,
    after="",
    call=ObjectCall("name", "arguments", ('{"name": ', NAME, ', "arguments": ', ARGUMENTS, "}")),
)
LETTERS = string.ascii_letters + string.digits


@dataclass(frozen=True)
class ToolCall:
    """A call in an answer. `arguments` is JSON text, as in OpenAI's API; `index` counts the calls of one answer."""

    id: str
    name: str
    arguments: str
    index: int = 0

    def json(self) -> dict[str, Any]:
        """The arguments."""
        found: dict[str, Any] = json.loads(self.arguments)
        return found

    def message(self) -> dict[str, Any]:
        """The entry of `tool_calls` in a message of the assistant, as in OpenAI's API."""
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}


@dataclass(frozen=True)
class AnswerPiece:
    """A part of an answer: text of its content, or of its reasoning, or a whole call.

    `problem` says why `content` begins with text that looks like a call.
    """

    content: str = ""
    reasoning: str = ""
    call: ToolCall | None = None
    problem: str = ""


@dataclass(frozen=True)
class ParsedAnswer:
    """A whole answer. `problems`: why text that looks like a call is in the content."""

    content: str
    reasoning: str
    tool_calls: tuple[ToolCall, ...] = ()
    problems: tuple[str, ...] = ()


@dataclass
class AnswerParser:
    """Divides one answer, given in pieces, into content, reasoning and calls.

    A call is given when it is whole: a malformed one stays content, which could not be said after a part of it was
    given. What may become a call, or the end of reasoning, is held back.

    Attributes:
        format: what the template shows.
        tools: the tools that may be called; none: the text of calls is content.
        in_reasoning: the prompt ends within reasoning (`ReasoningFormat.is_open`).
        seed: text that differs between the answers of one conversation (its length, for example), so that the ids of
            their calls do. The ids are nine letters and digits, because some templates refuse any others.
        plain: the answer was forced to be a call by the `PLAIN` format.
    """

    format: AnswerFormat
    tools: Sequence[Tool] = ()
    in_reasoning: bool = False
    seed: str = ""
    plain: bool = False
    _text: str = field(default="", init=False)
    _mode: str = field(default="begin", init=False)  # begin, reasoning, alone, content, calls
    _count: int = field(default=0, init=False)
    _waits: bool = field(default=False, init=False)  # for a character that may end a call
    _trims: bool = field(default=False, init=False)  # white space at the beginning of what comes
    _thought: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        form = PLAIN if self.plain else self.format.tools
        self._tools = form if self.tools else None
        if self._tools is not None:
            schemas = {tool.name: tool.parameters for tool in self.tools}
            self._reader = CallReader(self._tools, Known(schemas))
            self._ends = {letter for text in self._tools.texts for letter in text if not letter.isalnum()} | set("}])")
        self._thinks = self.format.reasoning
        if self.in_reasoning and self._thinks is not None:
            self._mode, self._trims = "reasoning", True

    def push(self, text: str) -> list[AnswerPiece]:
        """The parts of the answer that are certain after `text` was added."""
        self._text += text
        if self._waits and not self._ends.intersection(text):
            return []
        return self._advance(final=False)

    def finish(self) -> list[AnswerPiece]:
        """The rest, at the end of the answer. A call may lack the end of its frame: the model stopped there."""
        return self._advance(final=True)

    def _advance(self, final: bool) -> list[AnswerPiece]:
        pieces: list[AnswerPiece] = []
        steps = {
            "begin": self._begin, "reasoning": self._reasoning, "alone": self._alone, "content": self._content,
            "calls": self._calls,
        }  # fmt: skip
        self._waits = False
        while steps[self._mode](pieces, final):
            pass
        return [piece for piece in pieces if piece != AnswerPiece()]

    # Each step adds pieces; it returns True if another step can go on with the text that is left.

    def _begin(self, _pieces: list[AnswerPiece], final: bool) -> bool:
        """The beginning of an answer: reasoning, a call, or content."""
        start = self._text.lstrip()
        if self._thinks is not None and not self._thought:
            if start.startswith(self._thinks.open):
                self._text, self._mode, self._trims = start[len(self._thinks.open) :], "reasoning", True
                return True
            if self._thinks.open.startswith(start) and not final:
                return False
        opening = self.format.content_open
        if opening and start.startswith(opening):
            self._text, self._trims = start[len(opening) :], True
        elif opening and opening.startswith(start) and not final:
            return False
        alone = self._tools is not None and not self._tools.trigger
        self._mode = "alone" if alone else "content"
        return True

    def _reasoning(self, pieces: list[AnswerPiece], final: bool) -> bool:
        assert self._thinks is not None  # it is the reason for this mode
        if self._trims:
            self._text = self._text.lstrip()
        close = self._thinks.close
        place = self._text.find(close)
        if place < 0:
            keep = 0 if final else overlap(self._text, close)
            text = self._text[: len(self._text) - keep]
            shown = text.rstrip()
            self._trims = self._trims and not shown
            pieces.append(AnswerPiece(reasoning=shown))
            self._text = "" if final else self._text[len(shown) :]
            return False
        pieces.append(AnswerPiece(reasoning=self._text[:place].rstrip()))
        self._text, self._mode, self._trims, self._thought = self._text[place + len(close) :], "begin", True, True
        return True

    def _alone(self, pieces: list[AnswerPiece], final: bool) -> bool:
        """A call that nothing announces: only at the beginning, or after another call."""
        place = len(self._text) - len(self._text.lstrip())
        if place == len(self._text):
            return self._drop_space() if self._count and final else self._to_content(final)
        try:
            if self._count and self._tools is not None and (self._tools.between or "").strip():
                place = literal(self._text, place, self._tools.between or "", final)
            return self._take(pieces, place, first=True, final=final)
        except MoreText:
            self._waits = True
            return False
        except NotACall:
            return self._to_content(True)

    def _drop_space(self) -> bool:
        self._text = ""
        return False

    def _to_content(self, now: bool) -> bool:
        if now:
            self._mode = "content"
        return now

    def _calls(self, pieces: list[AnswerPiece], final: bool) -> bool:
        """Another call of the same frame."""
        try:
            return self._take(pieces, 0, first=False, final=final)
        except MoreText:
            self._waits = True
            return False
        except NotACall as error:
            return self._malformed(pieces, 0, error)

    def _content(self, pieces: list[AnswerPiece], final: bool) -> bool:
        if self._trims:
            self._text = self._text.lstrip()
        self._trims = self._trims and not self._text
        trigger = "" if self._tools is None else self._tools.trigger
        place, found = self._place_of(trigger, final)
        shown = self._text[:place].rstrip() if place < len(self._text) or not final else self._text[:place]
        if found:
            calls: list[AnswerPiece] = []
            try:
                took = self._take(calls, place, first=True, final=final)
            except MoreText:
                self._waits = True
            except NotACall as error:
                shown = self._text[:place]
                pieces.append(AnswerPiece(content=shown))
                return self._malformed(pieces, place, error)
            else:
                pieces += [AnswerPiece(content=shown), *calls]
                return took
        if self._tools is None:  # nothing can follow that needs the white space
            shown = self._text[:place]
        pieces.append(AnswerPiece(content=shown))
        self._text = self._text[len(shown) :]
        return False

    def _place_of(self, trigger: str, final: bool) -> tuple[int, bool]:
        """Where a call begins, or may begin with what follows (False); else the end of the text."""
        place = self._text.find(trigger[0]) if trigger else -1
        while place >= 0:
            try:
                literal(self._text, place, trigger, final)
            except MoreText:
                return place, False
            except NotACall:
                place = self._text.find(trigger[0], place + 1)
            else:
                return place, True
        return len(self._text), False

    def _take(self, pieces: list[AnswerPiece], place: int, first: bool, final: bool) -> bool:
        found = self._reader.read(self._text, place, first, final)
        name, arguments = found.name, found.arguments
        pieces.append(AnswerPiece(call=ToolCall(call_id(self.seed, self._count, name), name, arguments, self._count)))
        self._count += 1
        self._text, self._trims = self._text[found.end :], True
        alone = self._tools is not None and not self._tools.trigger
        self._mode = "calls" if found.another else "alone" if alone else "content"
        return True

    def _malformed(self, pieces: list[AnswerPiece], place: int, error: NotACall) -> bool:
        """The text of no call is content, up to where the next call may begin."""
        assert self._tools is not None  # calls are read with it
        end = place + max(1, len(self._tools.trigger))
        pieces.append(AnswerPiece(content=self._text[place:end], problem=f"A tool call is malformed: {error}."))
        self._text, self._mode, self._trims = self._text[end:], "content", False
        return True


def split(text: str, format: AnswerFormat, tools: Sequence[Tool] = (), in_reasoning: bool = False) -> ParsedAnswer:  # noqa: A002
    """A whole answer, divided; see `AnswerParser`."""
    parser = AnswerParser(format, tools, in_reasoning)
    return gather([*parser.push(text), *parser.finish()])


def gather(pieces: Sequence[AnswerPiece]) -> ParsedAnswer:
    """The answer that the pieces make."""
    return ParsedAnswer(
        "".join(piece.content for piece in pieces),
        "".join(piece.reasoning for piece in pieces),
        tuple(piece.call for piece in pieces if piece.call is not None),
        tuple(piece.problem for piece in pieces if piece.problem),
    )


def call_id(seed: str, index: int, name: str) -> str:
    """Nine letters and digits, the same for the same arguments."""
    number = int.from_bytes(hashlib.sha256(f"{seed}\0{index}\0{name}".encode()).digest()[:8], "big")
    letters = []
    for _ in range(9):
        number, rest = divmod(number, len(LETTERS))
        letters.append(LETTERS[rest])
    return "".join(letters)


def messages_for(messages: Sequence[Mapping[str, Any]], format: AnswerFormat) -> list[dict[str, Any]]:  # noqa: A002
    """The messages with the arguments of earlier calls as the template expects them.

    OpenAI's API has them as JSON text. Most templates expect a mapping and write text as a quoted string, which no
    model was trained on; some expect text and fail with a mapping.

    Raises:
        InputError: the arguments are no JSON object.
    """
    as_text = format.tools is not None and format.tools.arguments_as_text
    return [{**message, **_calls_for(message, as_text)} for message in messages]


def _calls_for(message: Mapping[str, Any], as_text: bool) -> dict[str, Any]:
    calls = message.get("tool_calls")
    if not isinstance(calls, Sequence) or isinstance(calls, str):
        return {}
    return {"tool_calls": [_call_for(call, as_text) for call in calls]}


def _call_for(call: Any, as_text: bool) -> Any:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or "arguments" not in function:
        return call
    arguments = function["arguments"]
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except ValueError as error:
            raise InputError(f"The arguments of the call of {function.get('name')!r} are no JSON: {error}.") from error
    if not isinstance(arguments, Mapping):
        raise InputError(f"The arguments of the call of {function.get('name')!r} are no JSON object.")
    given = function["arguments"] if as_text and isinstance(function["arguments"], str) else arguments
    return {**call, "function": {**function, "arguments": to_json(given) if as_text and given is arguments else given}}
