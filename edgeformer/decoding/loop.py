"""The token loop: the prompt, then one token at a time, as a generator."""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from typing import Protocol

import numpy as np

from edgeformer.bundle.signature import IDS, Array
from edgeformer.decoding.limits import Limits
from edgeformer.decoding.logits_processors import next_token
from edgeformer.decoding.request import Request
from edgeformer.decoding.result import Piece, Result, Timings
from edgeformer.decoding.sampling import check
from edgeformer.decoding.session import Session
from edgeformer.decoding.stop import StopFilter
from edgeformer.engines.base import Engine, State
from edgeformer.engines.feed import CHUNK, feed
from edgeformer.errors import EdgeformerError


class TextStream(Protocol):
    """The part of a detokenizer that the loop needs."""

    def push(self, token: int) -> str:
        """The text that is complete with this token."""
        ...

    def flush(self) -> str:
        """The text that is left at the end."""
        ...


def last_logits(engine: Engine, state: State, ids: Array, limits: Limits) -> Array:
    """The logits [batch, vocab] that follow `ids` [batch, length], run through `state` in chunks."""
    keep, chunk = (1 if limits.keeps_logits else None), (CHUNK if limits.cached else None)
    logits: Array = np.empty(0)
    for outputs in feed(engine, state, {IDS: ids}, chunk=chunk, keep=keep):
        logits = outputs["logits"][:, -1]
    return logits


def next_logits(engine: Engine, session: Session, ids: Sequence[int], limits: Limits) -> Array:
    """The logits [vocab] that follow `ids`; runs the part of `ids` that the session's state does not hold."""
    start = len(session.ids) if limits.cached else 0
    session.ids.extend(ids[len(session.ids) :])  # after an interruption the state holds fewer; see Session.reuse
    logits: Array = last_logits(engine, session.state, np.array([ids[start:]], np.int64), limits)[0]
    return logits


def tokens(
    engine: Engine, session: Session, request: Request, text: TextStream | None = None
) -> Generator[Piece, None, Result]:
    """Pieces as they come; the generator's value is the Result.

    Raises:
        EdgeformerError: the logits hold NaN, or the logits processors leave no token.
    """
    began = time.perf_counter()
    config, limits, processors = request.config, request.limits, request.processors
    ids = list(request.prompt)
    length = len(ids)
    reused = session.reuse(ids)
    logits = next_logits(engine, session, ids, limits)
    prompt_end = first = last = time.perf_counter()
    rng = request.rng()
    stop = StopFilter(config.stop_strings)
    seen = np.array(ids, np.int64) if processors else np.empty(0, np.int64)
    new: list[int] = []
    shown: list[str] = []
    reason: str | None = None
    while reason is None:
        try:
            scores = np.asarray(logits, np.float32)
            if not config.remove_invalid_values:
                check(scores)
            token = next_token(processors, seen, scores, rng)
        except EdgeformerError as error:
            raise EdgeformerError(f"Step {len(new)} of the generation, after {len(ids)} tokens: {error}") from error
        last = time.perf_counter()
        if not new:
            first = last
        new.append(token)
        ids.append(token)
        if processors:
            seen = np.append(seen, token)
        ended = token in limits.eos
        piece = "" if ended or text is None else stop.push(text.push(token))
        if ended:
            reason = "eos"
        elif stop.found():
            reason = "stop"
        elif len(new) >= request.max_new_tokens:
            reason = "length"
        elif config.max_time is not None and last - began > config.max_time:
            reason = "time"
        elif limits.context is not None and len(ids) > limits.context:
            reason = "context"
        if reason is None:
            shown.append(piece)
            yield Piece(token, piece)
            logits = next_logits(engine, session, ids, limits)
            continue
        if text is not None and not stop.found():
            piece += stop.push(text.flush())
            piece += stop.flush()
            reason = "stop" if stop.found() and reason != "eos" else reason
        shown.append(piece)
        yield Piece(token, piece, reason)
    timings = Timings(length, reused, prompt_end - began, first - began, len(new), last - first)
    return Result("".join(shown), new, reason, timings)
