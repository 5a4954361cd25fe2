"""POST /v1/completions: https://platform.openai.com/docs/api-reference/completions"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from typing import Any, ClassVar

import msgspec
from msgspec import UNSET, UnsetType
from starlette.responses import Response

from edgeformer.decoding.result import Piece, Result
from edgeformer.server.choices import ChoiceStream, head
from edgeformer.server.endpoint import Call, Endpoint, reply
from edgeformer.server.errors import ApiError
from edgeformer.server.generation import Generation, finish_reason
from edgeformer.server.items import Items, items_of
from edgeformer.server.registry import Loaded
from edgeformer.server.sampling import Neutral, SamplingFields
from edgeformer.server.sse import EventStream
from edgeformer.server.usage import CompletionLogprobs, Timings, Usage, piece_logprobs, shown_logprobs

PREFIX = "cmpl"  # of ids
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
    return reply(Completion(**head(PREFIX, call, run), choices=choices, usage=usage, timings=timings))


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


class CompletionStream(ChoiceStream[Completion]):
    """The events of one streamed request."""

    prefix, kind = PREFIX, Completion

    def __init__(self, run: Generation, body: CompletionRequest, call: Call, echoes: Sequence[str]) -> None:
        super().__init__(run, call, includes_usage=body.includes_usage)
        self._has_logprobs = body.logprobs is not None
        self._echoes = {number: echoes[number // run.n] for number in range(len(echoes) * run.n)}  # not sent yet
        self._offsets = {number: len(echo) for number, echo in self._echoes.items()}

    def _plain_text(self, number: int, pieces: Sequence[Piece]) -> str | None:
        if self._has_logprobs or self._echoes.get(number):
            return None
        return "".join([piece.text for piece in pieces])

    def _text_choice(self, number: int, text: str) -> CompletionChoice:
        return CompletionChoice(text, number)

    def _choices(self, number: int, pieces: Sequence[Piece]) -> list[CompletionChoice]:
        text = self._echoes.pop(number, "") + "".join(piece.text for piece in pieces)
        logprobs = None
        if self._has_logprobs and (tokens := piece_logprobs(pieces)):
            logprobs = CompletionLogprobs.of(tokens, self._offsets[number])
            self._offsets[number] += sum(len(token) for token in logprobs.tokens)
        return [CompletionChoice(text, number, logprobs)] if text or logprobs is not None else []

    def _end(self, number: int, reason: str) -> CompletionChoice:
        return CompletionChoice("", number, None, finish_reason(reason))


ENDPOINTS = [
    Endpoint(
        "POST", "/v1/completions", complete, CompletionRequest, Completion, Completion, summary="Goes on with text."
    )
]
