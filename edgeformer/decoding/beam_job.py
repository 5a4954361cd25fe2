"""A beam search as a job of a scheduler: its beams are the batch of one state, and fork by sharing the cache."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np

from edgeformer.bundle.signature import Array
from edgeformer.decoding.answer_text import AnswerText
from edgeformer.decoding.beam import Finished, beam_search
from edgeformer.decoding.job import Rows
from edgeformer.decoding.request import Request
from edgeformer.decoding.result import Piece, Result, Timings
from edgeformer.engines.base import State

Decode = Callable[[Sequence[int]], str]


class BeamSearch:
    """One beam search. All its pieces come at its end. See `edgeformer.decoding.job.Job`."""

    def __init__(self, request: Request, new_state: Callable[[int], State], decode: Decode | None) -> None:
        self.request = request
        self.reason: str | None = None
        self.error: Exception | None = None
        self.slots = request.config.num_beams
        self._new_state = new_state
        self._decode = decode
        self._search = beam_search(request, self._is_stopped if request.config.stop_strings else None)
        next(self._search)
        self._running = [list(request.prompt)] * self.slots
        self._state: State | None = None
        self._held = 0  # tokens of each beam that the state holds
        self._step = 0  # tokens of each beam that run now
        self._pieces: list[Piece] = []
        self._result: Result | None = None
        self._began = self._prompt_end = time.perf_counter()

    @property
    def tokens(self) -> int:
        """The most tokens that each beam will hold."""
        return self.request.tokens

    @property
    def decodes(self) -> bool:
        """Whether the prompt has run."""
        return len(self._running[0]) > len(self.request.prompt)

    def start(self) -> None:
        """Makes the state of all beams."""
        self._began = time.perf_counter()
        self._state = self._new_state(self.slots)

    def release(self) -> None:
        """Drops the state."""
        self._state = None

    def pending(self, room: int) -> Rows:
        """The next tokens of each beam."""
        assert self._state is not None
        start = self._held if self.request.limits.cached else 0
        self._step = len(self._running[0]) - start
        if self.request.limits.cached and not self.decodes:
            self._step = min(self._step, max(1, room // len(self._running)))
        ids = [beam[start : start + self._step] for beam in self._running]
        return Rows(np.array(ids, np.int64), self._state, 1)

    def accept(self, logits: Array) -> None:
        """Takes the logits [beams, 1, vocab] of what ran.

        Raises:
            EdgeformerError: the logits hold NaN.
        """
        if self.request.limits.cached:
            self._held += self._step
            if self._held < len(self._running[0]):
                return
        if not self.decodes:
            self._prompt_end = time.perf_counter()
        try:
            step = self._search.send(logits[:, -1])
        except StopIteration as end:
            self._finish(end.value)
            return
        assert step is not None
        if self.request.limits.cached and self._state is not None:
            self._state.select(step.beams)
        self._running = [[*self._running[beam], token] for beam, token in zip(step.beams, step.tokens, strict=True)]

    def take(self) -> list[Piece]:
        """All pieces, once it has ended."""
        pieces, self._pieces = self._pieces, []
        return pieces

    def fail(self, error: Exception) -> None:
        """Ends it with an error."""
        self.error = error

    def cancel(self) -> None:
        """Ends it without an answer."""
        self._finish(Finished(0.0, [], "cancel"))

    def result(self) -> Result:
        """The best text, once it has ended."""
        assert self._result is not None
        return self._result

    def _finish(self, best: Finished) -> None:
        seconds = time.perf_counter() - self._began
        text, shown = AnswerText(None, ()), ""
        if self._decode is not None:
            text = AnswerText(_Whole(self._decode), self.request.config.stop_strings)
            for token in best.ids[:-1] if best.reason == "eos" else best.ids:
                text.push(token)
            text.flush()
            shown = text.shown
        self._pieces = [Piece(token, "") for token in best.ids[:-1]]
        self._pieces.append(Piece(best.ids[-1] if best.ids else None, shown, best.reason))
        prompt = self._prompt_end - self._began
        timings = Timings(len(self.request.prompt), 0, prompt, seconds, len(best.ids), seconds - prompt)
        self._result = Result(shown, best.ids, best.reason, timings)
        self.reason = best.reason

    def _is_stopped(self, ids: Sequence[int]) -> bool:
        assert self._decode is not None
        text = self._decode(ids)
        return any(stop in text for stop in self.request.config.stop_strings)


class _Whole:
    """A text stream that gives all text at its end, as the tokenizer decodes it at once."""

    def __init__(self, decode: Decode) -> None:
        self._decode = decode
        self._ids: list[int] = []

    def push(self, token: int) -> str:
        self._ids.append(token)
        return ""

    def flush(self) -> str:
        return self._decode(self._ids)
