"""Pieces of a stream as runs of reasoning, of text, and whole calls, in the order in which the model wrote them.

The APIs that give an answer as a list of blocks or items build it from these, streamed or not.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from edgeformer.decoding.logprobs import TokenLogprob
from edgeformer.decoding.result import Piece
from edgeformer.decoding.tools.answer import ToolCall
from edgeformer.server.usage import piece_logprobs

Kind = Literal["reasoning", "text", "call"]


@dataclass
class Part:
    """More of a run of reasoning or text, or a whole call. `logprobs`: of the tokens of text, where asked for."""

    kind: Kind
    text: str = ""
    call: ToolCall | None = None
    logprobs: Sequence[TokenLogprob] = ()


class PartReader:
    """Divides the pieces of one answer.

    has_parts: the pieces carry parsed parts (`Answer.has_parts`).

    Attributes:
        reasoning_tokens: tokens of the reasoning and of the marks around it.
    """

    def __init__(self, has_parts: bool) -> None:
        self.reasoning_tokens = 0
        self._has_parts = has_parts
        self._held: list[TokenLogprob] = []  # of tokens whose text was held back
        self._held_tokens = 0

    def read(self, pieces: Sequence[Piece]) -> list[Part]:
        """What they add; neighbours of one kind are joined."""
        found: list[Part] = []
        for piece in pieces:
            self._held += piece_logprobs([piece])
            self._held_tokens += piece.id is not None
            for part in self._parts(piece):
                if part.kind == "text":
                    part.logprobs, self._held = self._held, []
                else:
                    self._held = []
                if part.kind == "reasoning":
                    self.reasoning_tokens += self._held_tokens
                self._held_tokens = 0
                if found and found[-1].kind == part.kind != "call":
                    found[-1].text += part.text
                    found[-1].logprobs = [*found[-1].logprobs, *part.logprobs]
                else:
                    found.append(part)
        return found

    def _parts(self, piece: Piece) -> Iterator[Part]:
        if not self._has_parts:
            if piece.text:
                yield Part("text", piece.text)
            return
        for one in piece.parts:
            if one.reasoning:
                yield Part("reasoning", one.reasoning)
            if one.content:
                yield Part("text", one.content)
            if one.call is not None:
                yield Part("call", call=one.call)
