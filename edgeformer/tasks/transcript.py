"""What a transcription gives: the text, and where asked for its segments with times and log probabilities."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from edgeformer.decoding.logprobs import TokenLogprob


@dataclass(frozen=True)
class Segment:
    """A part of a recording.

    start, end: seconds. ids: tokens of the text, without times. avg_logprob: the mean of their natural log
    probabilities, None where these were not asked for. silence: the probability that nobody speaks in the window that
    the segment is of, None where the model has no token for it.
    """

    start: float
    end: float
    text: str
    ids: list[int]
    window: int
    avg_logprob: float | None = None
    silence: float | None = None


@dataclass(frozen=True)
class Transcript:
    """What was said. `language` is the code that was given or heard, None where the model knows one alone.

    seconds: the length of the recording. segments: with `timestamps=True`, else empty. logprobs: of `ids`, with
    `logprobs=True`.
    """

    text: str
    ids: list[int]
    language: str | None
    seconds: float = 0.0
    segments: list[Segment] = field(default_factory=list)
    logprobs: list[TokenLogprob] | None = None

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class TranscriptPiece:
    """More text of a transcript as it is made. `logprobs`: of the tokens that made it, where asked for."""

    text: str
    logprobs: tuple[TokenLogprob, ...] = ()


class PieceText:
    """Joins tokens to the text of a transcript, which begins and ends without spaces; `push` is Detokenizer.push."""

    def __init__(self, push: Callable[[int], str], flush: Callable[[], str]) -> None:
        self._push, self._flush = push, flush
        self._spaces: str | None = None  # held back; None before the first letter

    def push(self, token: int) -> str:
        """The text that the token completes."""
        return self._trimmed(self._push(token))

    def flush(self) -> str:
        """The rest."""
        return self._trimmed(self._flush())

    def _trimmed(self, text: str) -> str:
        if self._spaces is None:
            text = text.lstrip()
            if not text:
                return ""
            self._spaces = ""
        kept = text.rstrip()
        if not kept:
            self._spaces += text
            return ""
        found, self._spaces = self._spaces + kept, text[len(kept) :]
        return found
