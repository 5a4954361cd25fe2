"""Renders known answers with a chat template: calls, reasoning and text that occur nowhere else."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from edgeformer.errors import EdgeformerError, TemplateError
from edgeformer.processing.chat import ChatRequest
from edgeformer.processing.tokenizer import Tokenizer
from edgeformer.processing.tool_format import ReasoningFormat
from edgeformer.processing.tool_values import to_json

Arguments = Mapping[str, Any]
Call = tuple[str, Arguments]

NAMES = ("fq7alpha", "fq7beta", "fq7gamma")
KEYS = ("kq7a", "kq7b", "kq7c", "kq7d")  # sorted: a template may sort them
ANSWER, REASON, QUESTION = "Aq7 answer.", "Rq7 reason.", "Qq7 question?"
ID = "q7callid{}"  # nine letters and digits: some templates refuse any other id
TYPES: Mapping[str, Any] = {
    KEYS[0]: {"type": "string", "description": "text"},
    KEYS[1]: {"type": "number", "description": "number"},
    KEYS[2]: {"type": "boolean", "description": "choice"},
    KEYS[3]: {"type": "object", "description": "more"},
}
SCHEMAS: Mapping[str, Any] = {name: {"type": "object", "properties": TYPES, "required": []} for name in NAMES}
TOOLS = [
    {"type": "function", "function": {"name": name, "description": "A tool.", "parameters": schema}}
    for name, schema in SCHEMAS.items()
]


class CannotLearn(Exception):
    """The template does not show the format; the text says why."""


class Probe:
    """Renders answers of an assistant to one question.

    Attributes:
        prompt: the question and the beginning of an answer.
        answer: the question and a finished answer in text.
        arguments_as_text: give the arguments of calls as JSON text.
        reasoning: empty blocks of it are removed from `body`.
    """

    def __init__(self, tokenizer: Tokenizer, ends: Collection[str] = ()) -> None:
        self._tokenizer = tokenizer
        self.source = tokenizer.chat.source(ChatRequest(tools=TOOLS))
        self.reasoning: ReasoningFormat | None = None
        self.arguments_as_text = False
        self._rendered: dict[str, str] = {}
        self._ends = [*filter(None, (*ends, tokenizer.special_tokens.get("eos_token")))]
        self.prompt = self._render([])
        self.answer = self.text(content=ANSWER)

    def text(self, calls: Sequence[Call] = (), content: str | None = None, reasoning: str | None = None) -> str:
        """The chat with one message of the assistant.

        Raises:
            TemplateError: the template refuses it.
        """
        message: dict[str, Any] = {"role": "assistant", "content": content}
        if reasoning is not None:
            message["reasoning_content"] = reasoning
        if not calls:
            return self._render([message])
        message["tool_calls"] = [self._call(index, call) for index, call in enumerate(calls)]
        if content is not None:
            return self._render([message])
        # A message without text has an empty one, or none. A template may refuse either, or print it.
        found: list[str] = []
        refused: EdgeformerError | None = None
        for empty in ("", None):
            try:
                found.append(self._render([message | {"content": empty}]))
            except EdgeformerError as error:
                refused = error
        if not found:
            raise refused or TemplateError("the chat template refuses calls")
        return min(found, key=len)

    def body(self, calls: Sequence[Call]) -> str:
        """The calls without what stands around every answer: its beginning, empty reasoning, and its end.

        Raises:
            TemplateError: the template refuses it.
        """
        text = self.text(calls)
        text = text[self.cut(text) :]
        tail = self.answer[self.answer.rfind(ANSWER) + len(ANSWER) :] if ANSWER in self.answer else ""
        end = len(text) - common(text[::-1], tail[::-1])
        inside = re.search(r"[<\[][^<>\[\]\s]*$", text[:end])
        if inside and end < len(text):  # both ends share the last characters of a tag
            closed = re.search(r"[>\]]", text[end:])
            end += closed.end() if closed else 0
        text = text[:end]
        text = text[: min((text.find(ending) for ending in self._ends if ending in text), default=len(text))]
        return self.without_reasoning(text)

    def without_reasoning(self, text: str) -> str:
        """The text of an answer without the empty reasoning that it begins with."""
        if self.reasoning is None:
            return text
        opened = f"(?:{re.escape(self.reasoning.open)})?"
        block = re.match(rf"\s*{opened}\s*{re.escape(self.reasoning.close)}\s*", text)
        return text[block.end() :] if block else text

    def try_body(self, calls: Sequence[Call]) -> str | None:
        """`body`; None if the template refuses the calls."""
        try:
            return self.body(calls)
        except EdgeformerError:
            return None

    def cut(self, text: str) -> int:
        """Where the answer begins in a rendered chat."""
        shared = common(self.prompt, text)
        return shared if shared == len(self.prompt) else outside_tag(text, shared)

    def _call(self, index: int, call: Call) -> dict[str, Any]:
        name, arguments = call
        given = to_json(arguments) if self.arguments_as_text else arguments
        return {"id": ID.format(index), "type": "function", "function": {"name": name, "arguments": given}}

    def _render(self, answer: list[dict[str, Any]]) -> str:
        key = repr(answer)
        if key not in self._rendered:
            messages = [{"role": "user", "content": QUESTION}, *answer]
            self._rendered[key] = self._tokenizer.render_chat(messages, not answer, tools=TOOLS)
        return self._rendered[key]


def common(*texts: str) -> int:
    """The length of the common beginning."""
    shortest = min(texts, key=len)
    return next((n for n, letter in enumerate(shortest) if any(text[n] != letter for text in texts)), len(shortest))


def outside_tag(text: str, place: int) -> int:
    """`place`, or the beginning of the tag in which it lies: two tags may begin with the same characters."""
    inside = re.search(r"[<\[][^<>\[\]\s]*$", text[:place])
    return inside.start() if inside else place


def place_of(text: str, part: str) -> int:
    """Where `part` stands.

    Raises:
        CannotLearn: nowhere, or at several places.
    """
    if text.count(part) != 1:
        raise CannotLearn(f"the chat template writes {part!r} {text.count(part)} times in a call, expected once")
    return text.index(part)
