"""Beam search, with the scores and the stopping rule of transformers' own (`GenerationMixin._beam_search`)."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from edgeformer.bundle.signature import Array
from edgeformer.decoding.logits_processors import log_softmax, process
from edgeformer.decoding.request import Request
from edgeformer.errors import EdgeformerError

_NEVER = -1.0e9  # lower than any real score, and finite when divided


@dataclass(frozen=True)
class Finished:
    """A text that ended: its score, its new tokens, and why."""

    score: float
    ids: list[int]
    reason: str


class Step(NamedTuple):
    """The next token of each beam, and the beam of the step before that each goes on from."""

    tokens: list[int]
    beams: list[int]


def beam_search(
    request: Request, is_stopped: Callable[[Sequence[int]], bool] | None = None
) -> Generator[Step | None, Array, Finished]:
    """Finds the best continuation of the request's prompt; a generator that is sent the logits [beams, vocab] of the
    step that it gave (first those of the prompt, for which it gives None), and whose value is what it found.

    A finished text's score is the sum of its tokens' log probabilities divided by `length ** length_penalty`.
    `early_stopping=True` ends with the first `num_beams` finished texts; False as soon as no running one is likely to
    beat them; "never" only when none can. With `do_sample` the continuations of a step are drawn, without replacement.
    `is_stopped` says whether new tokens hold a stop string.

    Raises:
        EdgeformerError: the logits hold NaN.
    """
    began, rng = time.perf_counter(), request.rng()
    prompt, config, limits = request.prompt, request.config, request.limits
    beams, start = config.num_beams, len(prompt)
    keep = max(2, 1 + len(limits.eos)) * beams
    running = [list(prompt) for _ in range(beams)]
    scores = np.array([0.0] + [_NEVER] * (beams - 1))  # all beams are equal at first: only one counts
    done: list[Finished] = []  # at most `beams`, best first
    improving = True
    logits = yield None
    while True:
        if not config.remove_invalid_values and np.isnan(logits).any():
            raise EdgeformerError(f"The logits hold NaN after {len(running[0])} tokens.")
        table = log_softmax(logits.astype(np.float64))
        if request.processors:
            seen = np.array(running, np.int64)
            table = np.stack([process(request.processors, ids, row, rng) for ids, row in zip(seen, table, strict=True)])
        vocab = table.shape[1]
        sums = (table + scores[:, None]).reshape(-1)
        top = _best(sums if rng is None else sums + rng.gumbel(size=len(sums)), keep)
        top = top[np.argsort(-sums[top], kind="stable")]
        candidates = [running[int(i) // vocab] + [int(i) % vocab] for i in top]
        length = len(candidates[0])
        late = config.max_time is not None and time.perf_counter() - began > config.max_time
        reasons = [_reason(ids, request, late, is_stopped) for ids in candidates]
        ends = np.array([reason is not None for reason in reasons])
        if improving and not (config.early_stopping is True and len(done) == beams):
            divisor = float(length - start) ** config.length_penalty
            for place in range(min(beams, len(candidates))):
                reason, score = reasons[place], float(sums[top[place]]) / divisor
                if reason is not None and score > _NEVER:
                    done.append(Finished(score, candidates[place][start:], reason))
            done = sorted(done, key=lambda text: -text.score)[:beams]
        order = np.argsort(-(sums[top] + ends * _NEVER), kind="stable")[:beams]
        scores = (sums[top] + ends * _NEVER)[order]
        rows = [int(top[i]) // vocab for i in order]
        running = [candidates[int(i)] for i in order]
        improving = improving and _may_improve(scores, done, length - start, request)
        full = config.early_stopping is True and len(done) == beams
        if not improving or full or ends.all() or (limits.context is not None and length >= limits.context):
            break
        logits = yield Step([ids[-1] for ids in running], rows)
    return done[0] if done else Finished(float(scores[0]), running[0][start:], "context")


def _best(values: Array, count: int) -> Array:
    """The places of the largest `count` values, the largest first and equal ones in their order."""
    if count >= len(values):
        return np.argsort(-values, kind="stable")
    least = np.partition(values, -count)[-count]
    places = np.flatnonzero(values >= least)
    order: Array = places[np.argsort(-values[places], kind="stable")][:count]
    return order


def _reason(
    ids: Sequence[int], request: Request, late: bool, is_stopped: Callable[[Sequence[int]], bool] | None
) -> str | None:
    """Why a text ends with its last token, if it does."""
    new = ids[len(request.prompt) :]
    if ids[-1] in request.limits.eos:
        return "eos"
    if is_stopped is not None and is_stopped(new):
        return "stop"
    return "length" if len(new) >= request.max_new_tokens else "time" if late else None


def _may_improve(scores: Array, done: Sequence[Finished], length: int, request: Request) -> bool:
    """Whether a running text may still beat the worst of the finished ones."""
    config = request.config
    if len(done) < config.num_beams:
        return True
    never = config.early_stopping == "never" and config.length_penalty > 0
    hoped = request.max_new_tokens if never else length
    return bool(float(scores[0]) / float(hoped) ** config.length_penalty > done[-1].score)
