"""POST /v1/chat/completions"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import closing
from typing import Any

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
from edgeformer.server.endpoint import Call, Endpoint, reply
from edgeformer.server.generation import Generation, finish_reason
from edgeformer.server.sse import DONE, PING, EventStream, event
from edgeformer.server.usage import Logprob, Timings, Usage, piece_logprobs, shown_logprobs


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
            **_head(call, run),
            choices=[_choice(number, result, bool(body.logprobs)) for number, result in enumerate(results)],
            usage=Usage.of(results, run.n),
            timings=Timings.of(results[0]),
        )
    )


def _head(call: Call, run: Generation) -> dict[str, Any]:
    return {
        "id": f"chatcmpl-{call.id}",
        "created": int(time.time()),
        "model": run.entry.name,
        "system_fingerprint": run.entry.fingerprint,
    }


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


class ChatStream:
    """The chunks of one streamed request."""

    def __init__(self, run: Generation, body: ChatRequest, call: Call) -> None:
        self._run, self._body = run, body
        self._ping = call.server.options.ping
        self._head = _head(call, run)
        self._usage = None if body.includes_usage else UNSET
        self._has_parts = run.answers[0].has_parts
        self._begun: set[int] = set()
        self._with_calls: set[int] = set()
        self._ended = 0
        self._last: ChatChunk | None = None  # the end of the last answer, which also has the timings

    async def events(self) -> AsyncGenerator[bytes, None]:
        """The events; closing the generator ends the answers.

        Raises:
            ApiError, EdgeformerError: an answer failed.
        """
        run = self._run
        try:
            while (pieces := await run.feed.next(self._ping)) != []:
                yield PING if pieces is None else b"".join(self._of(pieces))
            results = run.ended()
            assert self._last is not None
            chunks = [self._last]
            if self._body.includes_usage:
                chunks.append(self._chunk(choices=[], usage=Usage.of(results, run.n)))
            chunks[-1].timings = Timings.of(results[0])
            yield b"".join(map(event, chunks)) + DONE
        finally:
            run.close()

    def _of(self, pieces: Sequence[tuple[int, Piece]]) -> list[bytes]:
        """The events of the pieces that came together: one for the new text of each answer."""
        found: list[bytes] = []
        for number in sorted({number for number, _ in pieces}):
            own = [piece for index, piece in pieces if index == number]
            if number not in self._begun:
                self._begun.add(number)
                found.append(event(self._chunk([ChunkChoice(number, Delta(role="assistant", content=""))])))
            delta = self._delta(number, own)
            logprobs = None
            if self._body.logprobs and (tokens := piece_logprobs(own)):
                logprobs = ChoiceLogprobs([Logprob.of(one) for one in tokens])
            if delta is not None or logprobs is not None:
                choice = ChunkChoice(number, delta or Delta(content=""), logprobs)
                found.append(event(self._chunk([choice])))
            if (reason := own[-1].finish_reason) is not None:
                end = ChunkChoice(number, Delta(), None, _finish(reason, number in self._with_calls))
                self._ended += 1
                self._last = self._chunk([end])
                if self._ended < self._run.n:
                    found.append(event(self._last))
        return found

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

    def _chunk(self, choices: list[ChunkChoice], usage: Usage | None = None) -> ChatChunk:
        return ChatChunk(**self._head, choices=choices, usage=self._usage if usage is None else usage)


ENDPOINTS = [
    Endpoint(
        "POST", "/v1/chat/completions", chat, ChatRequest, ChatCompletion, ChatChunk, summary="Answers a conversation."
    )
]
