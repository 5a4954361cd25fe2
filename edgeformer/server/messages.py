"""POST /v1/messages and /v1/messages/count_tokens: Anthropic's Messages API.

https://docs.anthropic.com/en/api/messages, https://docs.anthropic.com/en/api/messages-streaming
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import closing
from typing import Any

import msgspec
from starlette.responses import Response

from edgeformer.decoding.result import Piece, Result
from edgeformer.model import Model
from edgeformer.server.answer_parts import Part, PartReader
from edgeformer.server.endpoint import Call, Endpoint, reply
from edgeformer.server.errors import ApiError, api_error
from edgeformer.server.generation import Generation, finish_reason
from edgeformer.server.messages_errors import SCHEMA, error_event
from edgeformer.server.messages_types import CountRequest, MessagesRequest
from edgeformer.server.sse import PING, EventStream, event

LIMITS = {"length": "max_tokens", "time": "max_tokens", "context": "model_context_window_exceeded"}


class _Typed(msgspec.Struct, kw_only=True, tag_field="type"):
    """An object whose `type` says which it is."""


class TextBlock(_Typed, tag="text"):
    """Text of the answer."""

    text: str
    citations: None = None


class ThinkingBlock(_Typed, tag="thinking"):
    """Reasoning before the answer, where the chat template marks it. It is not signed."""

    thinking: str
    signature: str = ""


class ToolUseBlock(_Typed, tag="tool_use"):
    """A call."""

    id: str
    name: str
    input: dict[str, Any]
    caller: dict[str, str] = msgspec.field(default_factory=lambda: {"type": "direct"})  # the model, not code


Content = TextBlock | ThinkingBlock | ToolUseBlock


class MessagesUsage(msgspec.Struct, kw_only=True):
    """Tokens; those of the prompt are the sum of the three inputs."""

    input_tokens: int
    cache_creation_input_tokens: int = 0
    cache_read_input_tokens: int = 0
    output_tokens: int
    # What follows is always there, though this server has nothing to say of it.
    cache_creation: None = None
    inference_geo: None = None
    output_tokens_details: None = None
    server_tool_use: None = None
    service_tier: str = "standard"

    @classmethod
    def of(cls, result: Result) -> MessagesUsage:
        """That of an answer."""
        cached = result.cached_tokens
        fresh = result.timings.prompt_tokens - cached
        return cls(input_tokens=fresh, cache_read_input_tokens=cached, output_tokens=len(result.ids))


class MessageAnswer(_Typed, kw_only=True, tag="message"):
    """The answer of POST /v1/messages."""

    id: str
    role: str = "assistant"
    model: str
    content: list[Content]
    stop_reason: str | None = None
    stop_sequence: str | None = None
    stop_details: None = None
    container: None = None
    usage: MessagesUsage


class MessageStart(_Typed, tag="message_start"):
    """The first event: an empty answer."""

    message: MessageAnswer


class BlockStart(_Typed, tag="content_block_start"):
    """A block begins, empty."""

    index: int
    content_block: Content


class TextDelta(_Typed, tag="text_delta"):
    """More text."""

    text: str


class ThinkingDelta(_Typed, tag="thinking_delta"):
    """More reasoning."""

    thinking: str


class SignatureDelta(_Typed, tag="signature_delta"):
    """The end of a block of reasoning."""

    signature: str = ""


class InputDelta(_Typed, tag="input_json_delta"):
    """The arguments of a call, as JSON text."""

    partial_json: str


class BlockDelta(_Typed, tag="content_block_delta"):
    """More of a block."""

    index: int
    delta: TextDelta | ThinkingDelta | SignatureDelta | InputDelta


class BlockStop(_Typed, tag="content_block_stop"):
    """A block is whole."""

    index: int


class StopDelta(msgspec.Struct):
    """Why the answer ended."""

    stop_reason: str
    stop_sequence: str | None


class MessageDelta(_Typed, tag="message_delta"):
    """The end of the answer, with the numbers of the whole."""

    delta: StopDelta
    usage: MessagesUsage


class MessageStop(_Typed, tag="message_stop"):
    """The last event."""


Event = MessageStart | BlockStart | BlockDelta | BlockStop | MessageDelta | MessageStop


class TokenCount(msgspec.Struct):
    """The answer of POST /v1/messages/count_tokens."""

    input_tokens: int


class Blocks:
    """The blocks of one answer, and the events that tell them."""

    def __init__(self) -> None:
        self.content: list[Content] = []
        self._is_open = False

    def add(self, part: Part) -> list[Event]:
        """More of the answer."""
        found: list[Event] = []
        if part.call is not None:
            found += self.close()
            found += self._open(ToolUseBlock(id=part.call.id, name=part.call.name, input={}))
            found.append(self._delta(InputDelta(partial_json=part.call.arguments)))
            self.content[-1] = ToolUseBlock(id=part.call.id, name=part.call.name, input=part.call.json())
            return found + self.close()
        kind = TextBlock if part.kind == "text" else ThinkingBlock
        if not (self._is_open and isinstance(self.content[-1], kind)):
            found += self.close()
            found += self._open(TextBlock(text="") if part.kind == "text" else ThinkingBlock(thinking=""))
        last = self.content[-1]
        if isinstance(last, TextBlock):
            self.content[-1] = TextBlock(text=last.text + part.text)
            found.append(self._delta(TextDelta(text=part.text)))
        elif isinstance(last, ThinkingBlock):
            self.content[-1] = ThinkingBlock(thinking=last.thinking + part.text)
            found.append(self._delta(ThinkingDelta(thinking=part.text)))
        return found

    def close(self) -> list[Event]:
        """The end of the open block, if there is one."""
        if not self._is_open:
            return []
        self._is_open = False
        signed: list[Event] = [self._delta(SignatureDelta())] if isinstance(self.content[-1], ThinkingBlock) else []
        return [*signed, BlockStop(index=len(self.content) - 1)]

    def _open(self, empty: Content) -> list[Event]:
        self._is_open = True
        self.content.append(empty)
        return [BlockStart(index=len(self.content) - 1, content_block=empty)]

    def _delta(self, delta: TextDelta | ThinkingDelta | SignatureDelta | InputDelta) -> Event:
        return BlockDelta(index=len(self.content) - 1, delta=delta)


class MessageRun:
    """One request: what its pieces become, streamed or not."""

    def __init__(self, run: Generation, body: MessagesRequest, call: Call) -> None:
        self._run, self._body, self._call = run, body, call
        self._blocks = Blocks()
        self._reader = PartReader(run.answers[0].has_parts)

    async def whole(self) -> MessageAnswer:
        """The answer.

        Raises:
            ApiError, EdgeformerError: it failed.
        """
        self._add(await self._run.feed.whole())
        end = self._end()
        found = self._empty(end.usage)
        found.content, found.stop_reason, found.stop_sequence = (
            self._blocks.content,
            end.delta.stop_reason,
            end.delta.stop_sequence,
        )
        return found

    async def events(self) -> AsyncGenerator[bytes, None]:
        """The events; closing the generator ends the answer.

        Raises:
            ApiError, EdgeformerError: it failed before its first event; later that is an event.
        """
        has_begun = False
        try:
            while (pieces := await self._run.feed.next(self._call.server.options.ping)) != []:
                if pieces is None:
                    yield event({"type": "ping"}, "ping") if has_begun else PING
                    continue
                found: list[Event] = self._add(pieces)
                if not has_begun:
                    has_begun = True
                    prompt = self._run.answers[0].prompt_tokens
                    usage = MessagesUsage(input_tokens=prompt, output_tokens=0)
                    found.insert(0, MessageStart(message=self._empty(usage)))
                yield _written(found)
            yield _written([*self._blocks.close(), self._end(), MessageStop()])
        except Exception as error:
            if not has_begun or isinstance(error, OSError):
                raise
            yield event(error_event(api_error(error), self._call.id), "error")
        finally:
            self._run.close()

    def _add(self, pieces: Sequence[tuple[int, Piece]]) -> list[Event]:
        parts = self._reader.read([piece for _, piece in pieces])
        return [one for part in parts for one in self._blocks.add(part)]

    def _end(self) -> MessageDelta:
        (result,) = self._run.ended()
        finish_reason(result.finish_reason)  # raises if it was cancelled
        reason, stopped_by = LIMITS.get(result.finish_reason), None
        if reason is None:
            stopped_by = _stop_sequence(self._run.loaded.model, result, self._body.stop_sequences or ())
            reason = "stop_sequence" if stopped_by is not None else "tool_use" if self._has_calls else "end_turn"
        return MessageDelta(delta=StopDelta(reason, stopped_by), usage=MessagesUsage.of(result))

    @property
    def _has_calls(self) -> bool:
        return any(isinstance(block, ToolUseBlock) for block in self._blocks.content)

    def _empty(self, usage: MessagesUsage) -> MessageAnswer:
        return MessageAnswer(id=f"msg_{self._call.id}", model=self._run.entry.name, content=[], usage=usage)


def _stop_sequence(model: Model, result: Result, stops: Sequence[str]) -> str | None:
    """The text that ended the answer; None if the bundle's own did."""
    if result.finish_reason != "stop" or model.tokenizer is None:
        return None
    text = model.tokenizer.decode(result.ids)
    places = [(text.index(stop), len(stop), stop) for stop in stops if stop in text]
    return min(places)[2] if places else None


def _written(events: Sequence[Event]) -> bytes:
    return b"".join(event(one, str(one.__struct_config__.tag)) for one in events)


async def messages(call: Call) -> Response:
    """Answers a conversation."""
    body: MessagesRequest = call.body
    conversation = body.conversation(call.server.options.max_messages)
    if call.server.options.log_prompts:
        call.log["messages"] = conversation
    run = await Generation.start(call, body.model, [conversation], body.arguments)
    if body.stream:
        return await EventStream.of(MessageRun(run, body, call).events())
    with closing(run):
        return reply(await MessageRun(run, body, call).whole())


async def count_tokens(call: Call) -> Response:
    """Counts the tokens of a conversation."""
    body: CountRequest = call.body
    conversation, tools = body.conversation(call.server.options.max_messages), body.definitions()
    lease = await call.server.registry.lease(body.model)
    try:
        call.log["model"] = lease.entry.name
        if lease.loaded.scheduler is None:
            raise ApiError(400, f"{lease.entry.name} does not generate text.", param="model")
        model = lease.loaded.model
        given: dict[str, Any] = {"tools": tools, "tool_choice": "none"} if tools else {}
        given["chat_template_kwargs"] = body.variables(lease.loaded)
        loop = asyncio.get_running_loop()
        # The prompt as for an answer: what a template needs changed in messages with calls is changed.
        prompt = await loop.run_in_executor(
            None, lambda: model._generating("count_tokens").call(conversation, given).prompt
        )
    finally:
        lease.release()
    return reply(TokenCount(len(prompt)))


ENDPOINTS = [
    Endpoint(
        "POST", "/v1/messages", messages, MessagesRequest, MessageAnswer, Event, "Answers a conversation.", SCHEMA
    ),
    Endpoint(
        "POST",
        "/v1/messages/count_tokens",
        count_tokens,
        CountRequest,
        TokenCount,
        summary="Counts the tokens of a conversation.",
        error=SCHEMA,
    ),
]
