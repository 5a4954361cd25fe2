"""The text of an answer as its tokens come: whole characters, up to a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from edgeformer.decoding.answer_shape import AnswerShape
from edgeformer.decoding.stop import StopFilter
from edgeformer.decoding.tools.token_text import TokenText
from edgeformer.processing.tokenizer import Tokenizer


class TextStream(Protocol):
    """The part of a detokenizer that an answer needs."""

    def push(self, token: int) -> str:
        """The text that is complete with this token."""
        ...

    def flush(self) -> str:
        """The text that is left at the end."""
        ...


class AnswerText:
    """The text of one answer, token by token. Without a `stream` it stays empty."""

    def __init__(self, stream: TextStream | None, stops: Sequence[str]) -> None:
        self._stream = stream
        self._stop = StopFilter(stops)
        self._shown: list[str] = []

    @property
    def is_stopped(self) -> bool:
        """Whether a stop string appeared."""
        return self._stop.found()

    @property
    def shown(self) -> str:
        """The text of all pieces so far."""
        return "".join(self._shown)

    def push(self, token: int) -> str:
        """The piece of text that can be shown after `token`."""
        return self._show("" if self._stream is None else self._stop.push(self._stream.push(token)))

    def flush(self) -> str:
        """The text that was held back, at the end of the answer; a stop string may appear in it."""
        if self._stream is None or self._stop.found():
            return ""
        return self._show(self._stop.push(self._stream.flush()) + self._stop.flush())

    def _show(self, text: str) -> str:
        if text:
            self._shown.append(text)
        return text


def text_stream(tokenizer: Tokenizer | None, shape: AnswerShape) -> TextStream | None:
    """The detokenizer of one answer, which keeps the special tokens of calls and reasoning; None without tokenizer."""
    if tokenizer is None:
        return None
    return tokenizer.detokenizer() if shape.format is None else TokenText(tokenizer, shape.format)
