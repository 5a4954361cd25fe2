"""POST /v1/completions: https://platform.openai.com/docs/api-reference/completions"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import closing
from typing import Any, ClassVar

import msgspec
from msgspec import UNSET, UnsetType
from starlette.responses import Response

from edgeformer.decoding.result import Piece, Result
from edgeformer.server.endpoint import Call, Endpoint, reply
from edgeformer.server.errors import ApiError
from edgeformer.server.generation import Generation, finish_reason
from edgeformer.server.items import Items, items_of
from edgeformer.server.registry import Loaded
from edgeformer.server.sampling import Neutral, SamplingFields
from edgeformer.server.sse import DONE, PING, EventStream, event
from edgeformer.server.usage import CompletionLogprobs, Timings, Usage, piece_logprobs, shown_logprobs

DEFAULT_TOKENS = 16  # OpenAI's, of this route


class CompletionRequest(SamplingFields, kw_only=True):
    """The body of POST /v1/completions. A prompt is a text, token ids, or a list of either."""

    prompt: Items
    logprobs: int | None = None
    echo: bool | None = None
    best_of: Any = None
    suffix: Any = None
    response_format: dict[str, Any] | None = None

    NEUTRAL: ClassVar[Neutral] = {
        **SamplingFields.NEUTRAL,
        "suffix": ((None,), "text cannot be inserted"),
    }

    def prompts(self) -> list[str | list[int]]:
        """The prompts.

        Raises:
            ApiError: there is none or too many, the list mixes kinds, or a field is not supported.
        """
        self.refuse()
        if self.best_of not in (None, self.n or 1):
            raise ApiError(400, "best_of must be n: no other answers are made and dropped.", param="best_of")
        if self.echo and self.stream and self.logprobs is not None:
            raise ApiError(400, "echo with logprobs is not streamed; leave out stream.", param="echo")
        return items_of(self.prompt, "prompt")

    def arguments(self, loaded: Loaded) -> dict[str, Any]:
        """See `SamplingFields.arguments`."""
        found = super().arguments(loaded)
        found["max_new_tokens"] = DEFAULT_TOKENS if self.max_tokens is None else self.max_tokens
        if self.response_format is not None:
            found["response_format"] = self.response_format
        if self.logprobs is not None:
            found["logprobs"] = self.logprobs
            if self.echo:
                found["prompt_logprobs"] = self.logprobs
        return found


class CompletionChoice(msgspec.Struct):
    """One answer, or a part of it."""

    text: str
    index: int
    logprobs: CompletionLogprobs | None = None
    finish_reason: str | None = None


class Completion(msgspec.Struct, kw_only=True):
    """The answer of POST /v1/completions, and one event of its stream."""

    id: str
    object: str = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | UnsetType | None = UNSET
    system_fingerprint: str
    timings: Timings | UnsetType = UNSET


async def complete(call: Call) -> Response:
    """Goes on with texts."""
    body: CompletionRequest = call.body
    prompts = body.prompts()
    if call.server.options.log_prompts:
        call.log["prompts"] = prompts
    run = await Generation.start(call, body.model, prompts, body.arguments)
    try:
        echoes = [_text(run.loaded, prompt) if body.echo else "" for prompt in prompts]
    except BaseException:
        run.close()
        raise
    if body.stream:
        return await EventStream.of(CompletionStream(run, body, call, echoes).events())
    with closing(run):
        results = await run.results()
    choices = [_choice(number, result, echoes[number // run.n], body) for number, result in enumerate(results)]
    usage, timings = Usage.of(results, run.n), Timings.of(results[0])
    return reply(Completion(**_head(call, run), choices=choices, usage=usage, timings=timings))


def _head(call: Call, run: Generation) -> dict[str, Any]:
    return {
        "id": f"cmpl-{call.id}",
        "created": int(time.time()),
        "model": run.entry.name,
        "system_fingerprint": run.entry.fingerprint,
    }


def _text(loaded: Loaded, prompt: str | list[int]) -> str:
    """The prompt as text, for `echo`."""
    if isinstance(prompt, str):
        return prompt
    tokenizer = loaded.model.tokenizer
    return "" if tokenizer is None else tokenizer.decode(prompt, skip_special_tokens=False)


def _choice(number: int, result: Result, echo: str, body: CompletionRequest) -> CompletionChoice:
    logprobs = None
    if body.logprobs is not None:
        tokens = [*(result.prompt_logprobs or ()), *shown_logprobs(result)]
        logprobs = CompletionLogprobs.of(tokens)
    return CompletionChoice(echo + result.text, number, logprobs, finish_reason(result.finish_reason))


class CompletionStream:
    """The events of one streamed request."""

    def __init__(self, run: Generation, body: CompletionRequest, call: Call, echoes: Sequence[str]) -> None:
        self._run, self._body = run, body
        self._ping = call.server.options.ping
        self._head = _head(call, run)
        self._usage = None if body.includes_usage else UNSET
        self._count = len(echoes) * run.n
        self._echoes = {number: echoes[number // run.n] for number in range(self._count)}  # that were not sent yet
        self._offsets = {number: len(echoes[number // run.n]) for number in range(self._count)}
        self._ended = 0
        self._last: Completion | None = None  # the end of the last answer, which also has the timings

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
                chunks.append(self._chunk([], Usage.of(results, run.n)))
            chunks[-1].timings = Timings.of(results[0])
            yield b"".join(map(event, chunks)) + DONE
        finally:
            run.close()

    def _of(self, pieces: Sequence[tuple[int, Piece]]) -> list[bytes]:
        found: list[bytes] = []
        for number in sorted({number for number, _ in pieces}):
            own = [piece for index, piece in pieces if index == number]
            text = self._echoes.pop(number, "") + "".join(piece.text for piece in own)
            logprobs = None
            if self._body.logprobs is not None and (tokens := piece_logprobs(own)):
                logprobs = CompletionLogprobs.of(tokens, self._offsets[number])
                self._offsets[number] += sum(len(token) for token in logprobs.tokens)
            if text or logprobs is not None:
                found.append(event(self._chunk([CompletionChoice(text, number, logprobs)])))
            if (reason := own[-1].finish_reason) is not None:
                self._ended += 1
                self._last = self._chunk([CompletionChoice("", number, None, finish_reason(reason))])
                if self._ended < self._count:
                    found.append(event(self._last))
        return found

    def _chunk(self, choices: list[CompletionChoice], usage: Usage | None = None) -> Completion:
        return Completion(**self._head, choices=choices, usage=self._usage if usage is None else usage)


ENDPOINTS = [
    Endpoint(
        "POST", "/v1/completions", complete, CompletionRequest, Completion, Completion, summary="Goes on with text."
    )
]
