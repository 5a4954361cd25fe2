"""Numbers of tokens as OpenAI's API gives them, timings as llama-server does, and log probabilities."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from edgeformer.decoding.logprobs import TokenLogprob
from edgeformer.decoding.result import Piece, Result

LOWEST = -9999.0  # JSON has no -inf; OpenAI's API gives this number


class PromptTokensDetails(msgspec.Struct):
    """How many of the prompt's tokens the prefix cache held."""

    cached_tokens: int = 0
    audio_tokens: int = 0


class CompletionTokensDetails(msgspec.Struct):
    """Of OpenAI's; nothing here is predicted by the client."""

    accepted_prediction_tokens: int = 0
    rejected_prediction_tokens: int = 0
    audio_tokens: int = 0


class Usage(msgspec.Struct):
    """Tokens of a request; a prompt counts once, however many answers it has."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails

    @classmethod
    def of(cls, results: Sequence[Result], n: int) -> Usage:
        """That of several prompts with `n` answers each."""
        firsts = results[::n]
        prompt = sum(one.timings.prompt_tokens for one in firsts)
        completion = sum(len(one.ids) for one in results)
        cached = sum(one.cached_tokens for one in firsts)
        return cls(prompt, completion, prompt + completion, PromptTokensDetails(cached), CompletionTokensDetails())


class Timings(msgspec.Struct):
    """llama-server's `timings`: tokens of the prompt that were cached and that ran, new ones, and drafts."""

    cache_n: int
    prompt_n: int
    prompt_ms: float
    prompt_per_token_ms: float
    prompt_per_second: float
    predicted_n: int
    predicted_ms: float
    predicted_per_token_ms: float
    predicted_per_second: float
    draft_n: int
    draft_n_accepted: int
    queue_ms: float

    @classmethod
    def of(cls, result: Result) -> Timings:
        """Those of one answer."""
        timings = result.timings
        ran, after = timings.prompt_tokens - timings.reused_tokens, max(0, timings.new_tokens - 1)
        prompt, decode = 1000 * timings.prompt_seconds, 1000 * timings.decode_seconds
        return cls(
            timings.reused_tokens,
            ran,
            round(prompt, 3),
            round(prompt / max(1, ran), 4),
            round(timings.prompt_tokens_per_second, 2),
            timings.new_tokens,
            round(decode, 3),
            round(decode / max(1, after), 4),
            round(timings.decode_tokens_per_second, 2),
            result.drafts.proposed,
            result.drafts.accepted,
            round(1000 * timings.queue_seconds, 3),
        )


class TopLogprob(msgspec.Struct):
    """One of the likeliest tokens at a place."""

    token: str
    logprob: float
    bytes: list[int] | None


class Logprob(msgspec.Struct):
    """A token of the answer."""

    token: str
    logprob: float
    bytes: list[int] | None
    top_logprobs: list[TopLogprob]

    @classmethod
    def of(cls, token: TokenLogprob) -> Logprob:
        """As chat completions give it."""
        top = [TopLogprob(one.text or "", finite(one.logprob), _listed(one.bytes)) for one in token.top]
        return cls(token.text or "", finite(token.logprob), _listed(token.bytes), top)


class CompletionLogprobs(msgspec.Struct):
    """As completions give them: lists with an entry for each token."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]

    @classmethod
    def of(cls, tokens: Sequence[TokenLogprob], offset: int = 0) -> CompletionLogprobs:
        """Those of `tokens`, the first of which stands at the character `offset` of the text."""
        found = cls([], [], [], [])
        for token in tokens:
            text = token.text or ""
            found.tokens.append(text)
            known = token.logprob is not None  # not of the first token of a prompt
            found.token_logprobs.append(finite(token.logprob) if known else None)
            top = {one.text or "": finite(one.logprob) for one in token.top}
            found.top_logprobs.append(top if known else None)
            found.text_offset.append(offset)
            offset += len(text)
        return found


def shown_logprobs(result: Result) -> list[TokenLogprob]:
    """Those of the tokens that the text shows: without the end token."""
    tokens = list(result.logprobs or ())
    return tokens[:-1] if result.finish_reason == "eos" else tokens


def piece_logprobs(pieces: Sequence[Piece]) -> list[TokenLogprob]:
    """As `shown_logprobs`, of pieces of a stream."""
    return [one.logprob for one in pieces if one.logprob is not None and one.finish_reason != "eos"]


def finite(value: float | None) -> float:
    """A log probability that JSON can hold."""
    return LOWEST if value is None or value < LOWEST else value


def _listed(data: bytes | None) -> list[int] | None:
    return None if data is None else list(data)
