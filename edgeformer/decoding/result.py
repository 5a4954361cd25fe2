"""What a generation gives: pieces as they come, and the whole result with its timings.

`finish_reason` is why it ended: "eos" (the model ended its answer), "stop" (a stop string appeared), "length"
(`max_new_tokens` reached), "time" (`max_time` passed), "context" (the context is full) or "cancel" (the caller ended
it). OpenAI's API calls the first two "stop".
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from edgeformer.decoding.logprobs import TokenLogprob
from edgeformer.decoding.tools.answer import AnswerPiece, ParsedAnswer, ToolCall
from edgeformer.errors import InputError


@dataclass(frozen=True)
class Piece:
    """One step of a stream. `text` may be empty: in the middle of a character, or of what may become a stop string.

    The last piece carries `finish_reason`; its `id` is None where it only brings held-back text.
    """

    id: int | None
    text: str
    finish_reason: str | None = None
    index: int = 0  # of the answer, where a prompt has several
    parts: tuple[AnswerPiece, ...] = ()  # what it adds to content, reasoning and tool calls, in a chat that has them
    logprob: TokenLogprob | None = None  # where asked for


@dataclass(frozen=True)
class Timings:
    """Seconds of one generation. Tokenizing the prompt is not in them; sampling is."""

    prompt_tokens: int
    reused_tokens: int  # of these, tokens that the state held already
    prompt_seconds: float
    first_token_seconds: float
    new_tokens: int
    decode_seconds: float  # from the first new token to the last
    queue_seconds: float = 0.0  # before the prompt began to run

    @property
    def prompt_tokens_per_second(self) -> float:
        """Prefill speed; tokens that were in the state already do not count."""
        return _rate(self.prompt_tokens - self.reused_tokens, self.prompt_seconds)

    @property
    def decode_tokens_per_second(self) -> float:
        """The first token comes with the prompt, so it is not counted."""
        return _rate(self.new_tokens - 1, self.decode_seconds)

    def __str__(self) -> str:
        reused = f" ({self.reused_tokens} reused)" if self.reused_tokens else ""
        parts = [
            f"prompt {self.prompt_tokens} tokens{reused} at {self.prompt_tokens_per_second:.1f} tokens/s",
            f"first token after {self.first_token_seconds:.3f} s",
        ]
        if self.new_tokens > 1:
            parts.append(f"{self.new_tokens} new tokens at {self.decode_tokens_per_second:.1f} tokens/s")
        return ", ".join(parts)


class Drafts(NamedTuple):
    """Guesses of tokens that ran in the steps of an answer (speculation), and how many of them were right."""

    proposed: int = 0
    accepted: int = 0


NO_DRAFTS = Drafts()


@dataclass(frozen=True)
class Result:
    """A whole answer. `ids` holds every new token, the end token too; `text` holds neither it nor the stop string."""

    text: str
    ids: list[int]
    finish_reason: str
    timings: Timings
    drafts: Drafts = NO_DRAFTS
    logprobs: list[TokenLogprob] | None = None  # of `ids`, where asked for
    prompt_logprobs: list[TokenLogprob] | None = None
    answer: ParsedAnswer | None = None  # divided into content, reasoning and calls, in a chat that has them

    def __str__(self) -> str:
        return self.text

    @property
    def cached_tokens(self) -> int:
        """Tokens of the prompt that a session or the prefix cache held already."""
        return self.timings.reused_tokens

    @property
    def tool_calls(self) -> list[ToolCall]:
        """The calls of tools, in their order."""
        return [] if self.answer is None else list(self.answer.tool_calls)

    @property
    def content(self) -> str:
        """The text without reasoning and tool calls."""
        return self.text if self.answer is None else self.answer.content

    @property
    def reasoning(self) -> str:
        """What the model wrote before its answer, as its chat template marks it."""
        return "" if self.answer is None else self.answer.reasoning


class Stream(Iterator[Piece]):
    """An iterator of pieces that keeps the Result: `result` is there once the stream has ended."""

    def __init__(self, pieces: Generator[Piece, None, Result]) -> None:
        self._pieces = pieces
        self._result: Result | None = None
        self._is_closed = False

    def __next__(self) -> Piece:
        try:
            return next(self._pieces)
        except StopIteration as end:
            if self._result is None:
                self._result = end.value
            raise StopIteration from None

    @property
    def result(self) -> Result:
        """The whole answer.

        Raises:
            InputError: the stream was not read to its end.
        """
        if self._result is None and self._is_closed:
            raise InputError("The stream was closed before its end, so it has no result; read its pieces instead.")
        if self._result is None:
            raise InputError("The stream has not ended; read all its pieces first.")
        return self._result

    def close(self) -> None:
        """Stop early; what was generated stays in the session."""
        self._is_closed = True
        self._pieces.close()


def _rate(count: int, seconds: float) -> float:
    return count / seconds if seconds > 0 and count > 0 else 0.0
