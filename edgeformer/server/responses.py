"""POST /v1/responses: OpenAI's Responses API without stored responses.

https://platform.openai.com/docs/api-reference/responses
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import closing
from typing import Any

import msgspec
from starlette.responses import Response

from edgeformer.decoding.generation_config import GenerationConfig, file_settings
from edgeformer.decoding.result import Piece, Result
from edgeformer.server.answer_parts import PartReader
from edgeformer.server.endpoint import Call, Endpoint, reply
from edgeformer.server.errors import api_error
from edgeformer.server.generation import Generation, finish_reason
from edgeformer.server.responses_items import Item, ItemEvent, Output
from edgeformer.server.responses_types import ResponsesRequest
from edgeformer.server.sse import DONE, PING, EventStream, event


class InputDetails(msgspec.Struct, kw_only=True):
    """How many of the prompt's tokens the prefix cache held."""

    cached_tokens: int
    cache_write_tokens: int = 0


class OutputDetails(msgspec.Struct):
    """How many of the answer's tokens are reasoning and the marks around it."""

    reasoning_tokens: int


class ResponsesUsage(msgspec.Struct):
    """Tokens of a request."""

    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int
    output_tokens_details: OutputDetails
    total_tokens: int

    @classmethod
    def of(cls, result: Result, reasoning: int) -> ResponsesUsage:
        """That of an answer, `reasoning` tokens of which are reasoning."""
        prompt, new = result.timings.prompt_tokens, len(result.ids)
        cached = InputDetails(cached_tokens=result.cached_tokens)
        return cls(prompt, cached, new, OutputDetails(reasoning), prompt + new)


class Incomplete(msgspec.Struct):
    """Why the answer is cut."""

    reason: str


class Failure(msgspec.Struct):
    """Why there is no answer."""

    code: str
    message: str


class ResponseObject(msgspec.Struct, kw_only=True):
    """The answer of POST /v1/responses: the items, and the settings that they were made with."""

    id: str
    object: str = "response"
    created_at: int
    completed_at: int | None = None
    status: str
    error: Failure | None = None
    incomplete_details: Incomplete | None = None
    model: str
    output: list[Item] = []
    usage: ResponsesUsage | None = None
    background: bool = False
    frequency_penalty: float = 0.0
    instructions: str | None
    max_output_tokens: int | None
    max_tool_calls: None = None
    metadata: dict[str, str]
    parallel_tool_calls: bool
    presence_penalty: float = 0.0
    previous_response_id: None = None
    prompt_cache_key: str | None
    reasoning: dict[str, str | None]
    safety_identifier: str | None
    service_tier: str = "default"
    store: bool = False
    temperature: float
    text: dict[str, Any]
    tool_choice: str | dict[str, Any]
    tools: list[dict[str, Any]]
    top_logprobs: int
    top_p: float
    truncation: str = "disabled"
    user: str | None


class _Whole(msgspec.Struct, kw_only=True, tag_field="type"):
    sequence_number: int = 0
    response: ResponseObject


class Created(_Whole, kw_only=True, tag="response.created"):
    """The first event."""


class InProgress(_Whole, kw_only=True, tag="response.in_progress"):
    """The answer began."""


class Completed(_Whole, kw_only=True, tag="response.completed"):
    """The end: the whole answer."""


class Cut(_Whole, kw_only=True, tag="response.incomplete"):
    """The end: the answer as far as its limit."""


class Failed(_Whole, kw_only=True, tag="response.failed"):
    """The end: something went wrong."""


Event = Created | InProgress | Completed | Cut | Failed | ItemEvent


class ResponseRun:
    """One request: what its pieces become, streamed or not."""

    def __init__(self, run: Generation, body: ResponsesRequest, call: Call) -> None:
        self._run, self._body, self._call = run, body, call
        self._output = Output(call.id)
        self._reader = PartReader(run.answers[0].has_parts)
        self._created = int(time.time())
        self._number = 0  # of the next event

    async def whole(self) -> ResponseObject:
        """The answer.

        Raises:
            ApiError, EdgeformerError: it failed.
        """
        self._add(await self._run.feed.whole())
        _, found = self._end()
        return found

    async def events(self) -> AsyncGenerator[bytes, None]:
        """The events; closing the generator ends the answer.

        Raises:
            ApiError, EdgeformerError: it failed before its first event; later that is an event.
        """
        try:
            while (pieces := await self._run.feed.next(self._call.server.options.ping)) != []:
                if pieces is None:
                    yield PING
                    continue
                if not self._number:
                    empty = self._response("in_progress")
                    yield self._written([Created(response=empty), InProgress(response=empty)])
                yield self._written(self._add(pieces))
            events, found = self._end()
            last = Completed(response=found) if found.status == "completed" else Cut(response=found)
            yield self._written([*events, last]) + DONE
        except Exception as error:
            if not self._number or isinstance(error, OSError):
                raise
            found = self._response("failed")
            found.output = self._output.items
            found.error = Failure("server_error", api_error(error).message)
            yield self._written([Failed(response=found)]) + DONE
        finally:
            self._run.close()

    def _add(self, pieces: Sequence[tuple[int, Piece]]) -> list[Event]:
        parts = self._reader.read([piece for _, piece in pieces])
        return [one for part in parts for one in self._output.add(part)]

    def _end(self) -> tuple[list[Event], ResponseObject]:
        """(events of the open item, the whole answer)."""
        (result,) = self._run.ended()
        is_whole = finish_reason(result.finish_reason) == "stop"
        found = self._response("completed" if is_whole else "incomplete")
        events: list[Event] = []
        if not self._output.items and not self._output.is_open:
            events += self._output.open("text")  # an answer without any text
        events += self._output.close(found.status)
        found.output = self._output.items
        found.usage = ResponsesUsage.of(result, self._reader.reasoning_tokens)
        if is_whole:
            found.completed_at = int(time.time())
        else:
            found.incomplete_details = Incomplete("max_output_tokens")
        return events, found

    def _response(self, status: str) -> ResponseObject:
        body, bundle = self._body, self._run.entry.bundle
        given = {"temperature": body.temperature, "top_p": body.top_p}
        config = GenerationConfig.of(file_settings(bundle), given, bundle.vocab_size)
        tools = [msgspec.to_builtins(tool) for tool in body.tools or ()]
        form = {name: value for name, value in msgspec.to_builtins(body.form).items() if value is not None}
        return ResponseObject(
            id=f"resp_{self._call.id}",
            created_at=self._created,
            status=status,
            model=self._run.entry.name,
            instructions=body.instructions,
            max_output_tokens=body.max_output_tokens,
            metadata=body.metadata or {},
            parallel_tool_calls=body.parallel_tool_calls is not False,
            prompt_cache_key=body.prompt_cache_key,
            reasoning={"effort": body.effort, "summary": None},
            safety_identifier=body.safety_identifier,
            temperature=config.temperature if config.do_sample else 0.0,
            text={"format": form},
            tool_choice=body.tool_choice or "auto",
            tools=[{name: one.get(name) for name in _TOOL} for one in tools],
            top_logprobs=body.top_logprobs or 0,
            top_p=config.top_p,
            user=body.user,
        )

    def _written(self, events: Sequence[Event]) -> bytes:
        found = []
        for one in events:
            one.sequence_number = self._number
            self._number += 1
            found.append(event(one, str(one.__struct_config__.tag)))
        return b"".join(found)


_TOOL = ("type", "name", "description", "parameters", "strict")


async def respond(call: Call) -> Response:
    """Answers a conversation."""
    body: ResponsesRequest = call.body
    messages = body.messages(call.server.options.max_messages)
    if call.server.options.log_prompts:
        call.log["messages"] = messages
    run = await Generation.start(call, body.model, [messages], body.arguments)
    if body.stream:
        return await EventStream.of(ResponseRun(run, body, call).events())
    with closing(run):
        return reply(await ResponseRun(run, body, call).whole())


ENDPOINTS = [
    Endpoint(
        "POST", "/v1/responses", respond, ResponsesRequest, ResponseObject, Event, summary="Answers a conversation."
    )
]
