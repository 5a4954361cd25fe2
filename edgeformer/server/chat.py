"""POST /v1/chat/completions"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing

from msgspec import UNSET
from starlette.responses import Response

from edgeformer.decoding.result import Piece, Result
from edgeformer.server.chat_types import (
    AnswerMessage,
    ChatChoice,
    ChatChunk,
    ChatCompletion,
    ChatRequest,
    ChoiceLogprobs,
    ChunkChoice,
    Delta,
    FunctionCall,
    FunctionDelta,
    ToolCall,
    ToolCallDelta,
)
from edgeformer.server.choices import ChoiceStream, head
from edgeformer.server.endpoint import Call, Endpoint, reply
from edgeformer.server.generation import Generation, finish_reason
from edgeformer.server.sse import EventStream
from edgeformer.server.usage import Logprob, Timings, Usage, piece_logprobs, shown_logprobs

PREFIX = "chatcmpl"  # of ids


async def chat(call: Call) -> Response:
    """Answers a conversation."""
    body: ChatRequest = call.body
    messages = body.conversation(call.server.options.max_messages)
    if call.server.options.log_prompts:
        call.log["messages"] = messages
    run = await Generation.start(call, body.model, [messages], body.arguments)
    if body.stream:
        return await EventStream.of(ChatStream(run, body, call).events())
    with closing(run):
        results = await run.results()
    return reply(
        ChatCompletion(
            **head(PREFIX, call, run),
            choices=[_choice(number, result, bool(body.logprobs)) for number, result in enumerate(results)],
            usage=Usage.of(results, run.n),
            timings=Timings.of(results[0]),
        )
    )


def _choice(number: int, result: Result, has_logprobs: bool) -> ChatChoice:
    calls = [ToolCall(id=one.id, function=FunctionCall(one.name, one.arguments)) for one in result.tool_calls]
    message = AnswerMessage(
        content=None if calls and not result.content else result.content,
        reasoning_content=result.reasoning or UNSET,
        tool_calls=calls or UNSET,
    )
    logprobs = ChoiceLogprobs([Logprob.of(one) for one in shown_logprobs(result)]) if has_logprobs else None
    return ChatChoice(number, message, logprobs, _finish(result.finish_reason, bool(calls)))


def _finish(reason: str, has_calls: bool) -> str:
    found = finish_reason(reason)
    return "tool_calls" if has_calls and found == "stop" else found


class ChatStream(ChoiceStream[ChatChunk]):
    """The chunks of one streamed request."""

    prefix, kind = PREFIX, ChatChunk

    def __init__(self, run: Generation, body: ChatRequest, call: Call) -> None:
        super().__init__(run, call, includes_usage=body.includes_usage)
        self._has_logprobs = bool(body.logprobs)
        self._has_parts = run.answers[0].has_parts
        self._begun: set[int] = set()
        self._with_calls: set[int] = set()

    def _plain_text(self, number: int, pieces: Sequence[Piece]) -> str | None:
        if self._has_logprobs or self._has_parts or number not in self._begun:
            return None
        return "".join([piece.text for piece in pieces])

    def _text_choice(self, number: int, text: str) -> ChunkChoice:
        return ChunkChoice(number, Delta(content=text))

    def _choices(self, number: int, pieces: Sequence[Piece]) -> list[ChunkChoice]:
        """The role, before the first, and the new text of the answer."""
        found: list[ChunkChoice] = []
        if number not in self._begun:
            self._begun.add(number)
            found.append(ChunkChoice(number, Delta(role="assistant", content="")))
        delta = self._delta(number, pieces)
        logprobs = None
        if self._has_logprobs and (tokens := piece_logprobs(pieces)):
            logprobs = ChoiceLogprobs([Logprob.of(one) for one in tokens])
        if delta is not None or logprobs is not None:
            found.append(ChunkChoice(number, delta or Delta(content=""), logprobs))
        return found

    def _end(self, number: int, reason: str) -> ChunkChoice:
        return ChunkChoice(number, Delta(), None, _finish(reason, number in self._with_calls))

    def _delta(self, number: int, pieces: Sequence[Piece]) -> Delta | None:
        """What the pieces add; None if nothing."""
        if not self._has_parts:
            text = "".join(piece.text for piece in pieces)
            return Delta(content=text) if text else None
        parts = [part for piece in pieces for part in piece.parts]
        calls = [
            ToolCallDelta(call.index, call.id, "function", FunctionDelta(call.name, call.arguments))
            for part in parts
            if (call := part.call) is not None
        ]
        if calls:
            self._with_calls.add(number)
        content = "".join(part.content for part in parts)
        reasoning = "".join(part.reasoning for part in parts)
        if not (calls or content or reasoning):
            return None
        return Delta(content=content or UNSET, reasoning_content=reasoning or UNSET, tool_calls=calls or UNSET)


ENDPOINTS = [
    Endpoint(
        "POST", "/v1/chat/completions", chat, ChatRequest, ChatCompletion, ChatChunk, summary="Answers a conversation."
    )
]
