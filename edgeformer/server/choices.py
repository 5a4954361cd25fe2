"""What the two routes with `choices` share, chat and completions: the head of an answer, and the frame of a stream."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Sequence
from typing import Any, Generic, TypeVar

from msgspec import UNSET, UnsetType

from edgeformer.decoding.result import Piece
from edgeformer.server.endpoint import Call
from edgeformer.server.generation import Generation
from edgeformer.server.sse import DONE, PING, encoded, event
from edgeformer.server.usage import Timings, Usage

Chunk = TypeVar("Chunk")  # a struct with `usage` and `timings`
MARK = "\x1a"  # stands for the text in a chunk that was encoded once; no name or fingerprint has it


def head(prefix: str, call: Call, run: Generation) -> dict[str, Any]:
    """The fields that an answer and each of its chunks begin with."""
    return {
        "id": f"{prefix}-{call.id}",
        "created": int(time.time()),
        "model": run.entry.name,
        "system_fingerprint": run.entry.fingerprint,
    }


class ChoiceStream(ABC, Generic[Chunk]):
    """The chunks of one streamed request. `prefix` begins its id, `kind` is the struct of a chunk."""

    prefix: str
    kind: Any  # type[Chunk]

    def __init__(self, run: Generation, call: Call, *, includes_usage: bool) -> None:
        self._run = run
        self._ping = call.server.options.ping
        self._head = head(self.prefix, call, run)
        self._includes_usage = includes_usage
        self._usage: UnsetType | None = None if includes_usage else UNSET
        self._ended = 0
        self._frames: dict[int, tuple[bytes, bytes]] = {}  # of an answer's chunks: what stands around the text
        self._last: Chunk | None = None  # the end of the last answer, which also has the timings

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
            if self._includes_usage:
                chunks.append(self._chunk([], Usage.of(results, run.n)))
            chunks[-1].timings = Timings.of(results[0])  # type: ignore[attr-defined]
            yield b"".join(map(event, chunks)) + DONE
        finally:
            run.close()

    def _of(self, pieces: Sequence[tuple[int, Piece]]) -> list[bytes]:
        """The events of the pieces that came together: one for what is new of each answer, and its end."""
        found: list[bytes] = []
        for number in sorted({number for number, _ in pieces}):
            own = [piece for index, piece in pieces if index == number]
            text = self._plain_text(number, own)
            if text is None:
                found += (event(self._chunk([choice])) for choice in self._choices(number, own))
            elif text:
                found.append(self._text_event(number, text))
            if (reason := own[-1].finish_reason) is not None:
                self._ended += 1
                self._last = self._chunk([self._end(number, reason)])
                if self._ended < len(self._run.answers) * self._run.n:
                    found.append(event(self._last))
        return found

    def _text_event(self, number: int, text: str) -> bytes:
        """The event of a chunk with text alone: all but the text is encoded once for each answer."""
        frame = self._frames.get(number)
        if frame is None:
            before, after = event(self._chunk([self._text_choice(number, MARK)])).split(encoded(MARK))
            frame = self._frames[number] = before, after
        return frame[0] + encoded(text) + frame[1]

    @abstractmethod
    def _plain_text(self, number: int, pieces: Sequence[Piece]) -> str | None:
        """The text of the pieces, if they add nothing else to answer `number`; else None, and `_choices` says what."""

    @abstractmethod
    def _text_choice(self, number: int, text: str) -> Any:
        """More text of answer `number`."""

    @abstractmethod
    def _choices(self, number: int, pieces: Sequence[Piece]) -> list[Any]:
        """What the pieces add to answer `number`, each for a chunk of its own."""

    @abstractmethod
    def _end(self, number: int, reason: str) -> Any:
        """The end of answer `number`."""

    def _chunk(self, choices: list[Any], usage: Usage | None = None) -> Chunk:
        chunk: Chunk = self.kind(**self._head, choices=choices, usage=self._usage if usage is None else usage)
        return chunk
