"""Output items of the Responses API, and the events that tell them.

https://platform.openai.com/docs/api-reference/responses-streaming
"""

from __future__ import annotations

from typing import Any

import msgspec

from edgeformer.server.answer_parts import Part
from edgeformer.server.usage import Logprob


class _Typed(msgspec.Struct, kw_only=True, tag_field="type"):
    """An object whose `type` says which it is."""


class OutputText(_Typed, kw_only=True, tag="output_text"):
    """The text of a message."""

    text: str = ""
    annotations: list[Any] = []
    logprobs: list[Logprob] = []


class ReasoningText(_Typed, kw_only=True, tag="reasoning_text"):
    """Reasoning, where the chat template marks it."""

    text: str = ""


class OutputMessage(_Typed, kw_only=True, tag="message"):
    """A message."""

    id: str
    status: str
    role: str = "assistant"
    content: list[OutputText]


class OutputReasoning(_Typed, kw_only=True, tag="reasoning"):
    """Reasoning before the answer."""

    id: str
    status: str
    summary: list[Any] = []
    content: list[ReasoningText]


class OutputCall(_Typed, kw_only=True, tag="function_call"):
    """A call. `arguments` is JSON text."""

    id: str
    status: str
    call_id: str
    name: str
    arguments: str


Item = OutputMessage | OutputReasoning | OutputCall


class _Event(_Typed, kw_only=True):
    sequence_number: int = 0


class ItemAdded(_Event, kw_only=True, tag="response.output_item.added"):
    """An item begins, empty."""

    output_index: int
    item: Item


class ItemDone(_Event, kw_only=True, tag="response.output_item.done"):
    """An item is whole."""

    output_index: int
    item: Item


class _Within(_Event, kw_only=True):
    item_id: str
    output_index: int


class _WithinPart(_Within, kw_only=True):
    content_index: int = 0


class PartAdded(_WithinPart, kw_only=True, tag="response.content_part.added"):
    """The content of an item begins, empty."""

    part: OutputText | ReasoningText


class PartDone(_WithinPart, kw_only=True, tag="response.content_part.done"):
    """The content of an item is whole."""

    part: OutputText | ReasoningText


class OutputTextDelta(_WithinPart, kw_only=True, tag="response.output_text.delta"):
    """More text."""

    delta: str
    logprobs: list[Logprob]


class OutputTextDone(_WithinPart, kw_only=True, tag="response.output_text.done"):
    """The whole text."""

    text: str
    logprobs: list[Logprob]


class ReasoningDelta(_WithinPart, kw_only=True, tag="response.reasoning_text.delta"):
    """More reasoning."""

    delta: str


class ReasoningDone(_WithinPart, kw_only=True, tag="response.reasoning_text.done"):
    """The whole reasoning."""

    text: str


class ArgumentsDelta(_Within, kw_only=True, tag="response.function_call_arguments.delta"):
    """The arguments of a call: they come when they are whole."""

    delta: str


class ArgumentsDone(_Within, kw_only=True, tag="response.function_call_arguments.done"):
    """The whole arguments of a call."""

    arguments: str


ItemEvent = (
    ItemAdded
    | ItemDone
    | PartAdded
    | PartDone
    | OutputTextDelta
    | OutputTextDone
    | ReasoningDelta
    | ReasoningDone
    | ArgumentsDelta
    | ArgumentsDone
)


class Output:
    """The items of one answer. `name`: the part of their ids that differs between answers."""

    def __init__(self, name: str) -> None:
        self.items: list[Item] = []  # whole ones
        self._name = name
        self._kind: str | None = None  # of the open item
        self._text: list[str] = []
        self._logprobs: list[Logprob] = []

    @property
    def is_open(self) -> bool:
        """Whether a message or reasoning has begun and not ended."""
        return self._kind is not None

    def add(self, part: Part) -> list[ItemEvent]:
        """More of the answer."""
        if part.call is not None:
            return [*self.close("completed"), *self._call(part)]
        found: list[ItemEvent] = []
        if self._kind != part.kind:
            found += self.close("completed")
            found += self.open(part.kind)
        logprobs = [Logprob.of(one) for one in part.logprobs]
        self._text.append(part.text)
        self._logprobs += logprobs
        where = self._where(part.kind)
        if part.kind == "text":
            found.append(OutputTextDelta(**where, delta=part.text, logprobs=logprobs))
        else:
            found.append(ReasoningDelta(**where, delta=part.text))
        return found

    def open(self, kind: str) -> list[ItemEvent]:
        """The beginning of a message or of reasoning."""
        self._kind, self._text, self._logprobs = kind, [], []
        where = self._where(kind)
        item: Item
        if kind == "text":
            item = OutputMessage(id=where["item_id"], status="in_progress", content=[])
        else:
            item = OutputReasoning(id=where["item_id"], status="in_progress", content=[])
        part = OutputText() if kind == "text" else ReasoningText()
        return [ItemAdded(output_index=where["output_index"], item=item), PartAdded(**where, part=part)]

    def close(self, status: str) -> list[ItemEvent]:
        """The end of the open item, if there is one; `status` is "completed" or "incomplete"."""
        if self._kind is None:
            return []
        kind, text, where = self._kind, "".join(self._text), self._where(self._kind)
        self._kind = None
        item: Item
        part: OutputText | ReasoningText
        done: ItemEvent
        if kind == "text":
            part = OutputText(text=text, logprobs=self._logprobs)
            done = OutputTextDone(**where, text=text, logprobs=self._logprobs)
            item = OutputMessage(id=where["item_id"], status=status, content=[part])
        else:
            part, done = ReasoningText(text=text), ReasoningDone(**where, text=text)
            item = OutputReasoning(id=where["item_id"], status=status, content=[part])
        self.items.append(item)
        return [done, PartDone(**where, part=part), ItemDone(output_index=where["output_index"], item=item)]

    def _call(self, part: Part) -> list[ItemEvent]:
        assert part.call is not None
        call, where = part.call, self._where("call")
        index = where["output_index"]

        def item(status: str, arguments: str) -> OutputCall:
            return OutputCall(id=where["item_id"], status=status, call_id=call.id, name=call.name, arguments=arguments)

        whole = item("completed", call.arguments)
        self.items.append(whole)
        return [
            ItemAdded(output_index=index, item=item("in_progress", "")),
            ArgumentsDelta(**where, delta=call.arguments),
            ArgumentsDone(**where, arguments=call.arguments),
            ItemDone(output_index=index, item=whole),
        ]

    def _where(self, kind: str) -> dict[str, Any]:
        """The place of the item that comes after the whole ones."""
        number = len(self.items)
        prefix = {"text": "msg", "reasoning": "rs", "call": "fc"}[kind]
        return {"item_id": f"{prefix}_{self._name}_{number}", "output_index": number}
