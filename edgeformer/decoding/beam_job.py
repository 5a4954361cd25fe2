"""A beam search as a job of a scheduler: its prompt runs once, then its beams are the batch of one state.

Beams that come from one beam share the cache of what they have in common.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np

from edgeformer.bundle.signature import Array
from edgeformer.decoding.answer_text import AnswerText
from edgeformer.decoding.beam import Finished, beam_search
from edgeformer.decoding.job import Progress, Rows
from edgeformer.decoding.request import Request
from edgeformer.decoding.result import Piece, Result, Timings
from edgeformer.decoding.session import Session, StateSource
from edgeformer.engines.base import CHUNK_TOKENS

Decode = Callable[[Sequence[int]], str]


class BeamSearch:
    """One beam search. All its pieces come at its end. See `edgeformer.decoding.job.Job`."""

    def __init__(self, request: Request, states: StateSource, decode: Decode | None) -> None:
        """`states` gives a state of one sequence, or where the graph has no KV cache, of all beams."""
        self.request = request
        self.reason: str | None = None
        self.error: Exception | None = None
        self.counted = Progress()
        self.slots = request.config.num_beams
        self._states = states
        self._decode = decode
        self._search = beam_search(request, self._is_stopped if request.config.stop_strings else None)
        next(self._search)
        self._running = [list(request.prompt)] * self.slots
        self._session: Session | None = None  # the ids are those of the prompt that the state holds
        self._reused = 0  # of them, tokens that were cached
        self._step = 0  # tokens of each row that run now
        self._pieces: list[Piece] = []
        self._result: Result | None = None
        self._began = self._prompt_end = time.perf_counter()
        self._queued = 0.0

    @property
    def tokens(self) -> int:
        """The most tokens that each beam will hold."""
        return self.request.tokens

    @property
    def progress(self) -> Progress:
        """All its tokens come at its end."""
        return Progress() if self._result is None else Progress(len(self._result.ids), seconds=time.perf_counter())

    @property
    def decodes(self) -> bool:
        """Whether the prompt has run."""
        return len(self._running[0]) > len(self.request.prompt)

    @property
    def session(self) -> Session:
        """The state; from `start` to `release`."""
        assert self._session is not None
        return self._session

    def start(self) -> None:
        """Makes the state, or takes one that holds a beginning of the prompt."""
        now = time.perf_counter()
        self._queued = now - self._began
        self._began = self._prompt_end = now
        self._session = self._states.open(self.request.prompt)
        self._reused = len(self._session.ids)

    def release(self) -> None:
        """Drops the state."""
        self._session = None

    def pending(self, room: int) -> Rows:
        """The next tokens of the prompt, or the last one of each beam; without a KV cache all tokens of each beam."""
        if not self.request.limits.cached:
            ids = self._running
        elif self.decodes:
            ids = [beam[-1:] for beam in self._running]
        else:
            start = len(self.session.ids)
            end = min(start + max(1, room), len(self.request.prompt))
            if end < len(self.request.prompt) and end - end % CHUNK_TOKENS > start:
                end -= end % CHUNK_TOKENS  # whole chunks, for the prefix cache
            ids = [self.request.prompt[start:end]]
        self._step = len(ids[0])
        return Rows(np.array(ids, np.int64), self.session.state, 1)

    def prepare(self) -> None:
        """As `Job.prepare`: there is nothing to do."""

    def accept(self, logits: Array, likeliest: Array | None = None) -> None:  # noqa: ARG002  the search sorts them
        """Takes the logits [rows, 1, vocab] of what ran.

        Raises:
            EdgeformerError: the logits hold NaN.
        """
        if not self.decodes:
            if self.request.limits.cached and not self._end_chunk():
                return
            self._prompt_end = time.perf_counter()
            logits = np.broadcast_to(logits, (self.slots, *logits.shape[1:]))
        try:
            step = self._search.send(logits[:, -1])
        except StopIteration as end:
            self._finish(end.value)
            return
        assert step is not None
        if self.request.limits.cached:
            # After the prompt all beams are its only row.
            self.session.state.select(step.beams if self.decodes else [0] * self.slots)
        self._running = [[*self._running[beam], token] for beam, token in zip(step.beams, step.tokens, strict=True)]

    def _end_chunk(self) -> bool:
        """Counts the tokens of the prompt that ran; whether it is all of them."""
        session, prompt = self.session, self.request.prompt
        held = len(session.ids)
        session.ids += prompt[held : held + self._step]
        is_whole = len(session.ids) == len(prompt)
        if is_whole or len(session.ids) % CHUNK_TOKENS == 0:
            self._states.keep(session)
        return is_whole

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
        timings = Timings(
            len(self.request.prompt), self._reused, prompt, seconds, len(best.ids), seconds - prompt, self._queued
        )
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
