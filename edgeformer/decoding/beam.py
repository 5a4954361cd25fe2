"""Beam search, with the scores and the stopping rule of transformers' own (`GenerationMixin._beam_search`)."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from edgeformer.bundle.signature import IDS, KEEP
from edgeformer.decoding.generation_config import GenerationConfig
from edgeformer.decoding.logits_processors import Processor, log_softmax, process
from edgeformer.decoding.loop import CHUNK, GenerationOptions, Limits
from edgeformer.engines.base import Engine, State
from edgeformer.errors import EdgeformerError

Array = np.ndarray[Any, Any]
_NEVER = -1.0e9  # a score that no real one comes near, and that stays finite when it is divided


@dataclass(frozen=True)
class BeamOptions:
    """How wide, and what counts as better.

    A finished text's score is the sum of its tokens' log probabilities divided by `length ** length_penalty`.
    `early_stopping=True` ends with the first `num_beams` finished texts; False as soon as no running one looks able to
    beat them; "never" only when none can.
    """

    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False

    @classmethod
    def of(cls, config: GenerationConfig) -> BeamOptions:
        """What a generation's rules say of its search."""
        return cls(config.num_beams, config.length_penalty, config.early_stopping)


@dataclass(frozen=True)
class Finished:
    """A text that ended: its score, its new tokens, and why."""

    score: float
    ids: list[int]
    reason: str


def beam_search(
    engine: Engine,
    state: State,
    prompt: Sequence[int],
    limits: Limits,
    options: GenerationOptions,
    search: BeamOptions,
    processors: Sequence[Processor] = (),
    stopped: Callable[[Sequence[int]], bool] | None = None,
) -> Finished:
    """The best continuation of `prompt`. `state` is empty, and takes `num_beams` sequences.

    With `options.do_sample` the continuations of a step are drawn, without replacement, instead of the likeliest.
    `stopped` says whether new tokens hold a stop string.

    Raises:
        EdgeformerError: the logits hold NaN.
    """
    began, rng = time.perf_counter(), options.rng()
    beams, start, longest = search.num_beams, len(prompt), options.max_new_tokens
    keep = max(2, 1 + len(limits.eos)) * beams
    running = [list(prompt) for _ in range(beams)]
    scores = np.array([0.0] + [_NEVER] * (beams - 1))  # all begin alike: only one may count
    done: list[Finished] = []  # at most `beams`, best first
    improving = True
    logits = _prefill(engine, state, prompt, beams, limits)
    while True:
        if not options.remove_invalid_values and np.isnan(logits).any():
            raise EdgeformerError(f"The logits hold NaN after {len(running[0])} tokens.")
        table = log_softmax(logits)
        if processors:
            seen = np.array(running, np.int64)
            table = np.stack([process(processors, ids, row) for ids, row in zip(seen, table, strict=True)])
        vocab = table.shape[1]
        sums = (table + scores[:, None]).reshape(-1)
        top = _best(sums if rng is None else sums + rng.gumbel(size=len(sums)), keep)
        top = top[np.argsort(-sums[top], kind="stable")]
        candidates = [running[int(i) // vocab] + [int(i) % vocab] for i in top]
        length = len(candidates[0])
        late = options.max_time is not None and time.perf_counter() - began > options.max_time
        reasons = [_reason(ids, start, limits, longest, late, stopped) for ids in candidates]
        ends = np.array([reason is not None for reason in reasons])
        if improving and not (search.early_stopping is True and len(done) == beams):
            divisor = float(length - start) ** search.length_penalty
            for place in range(min(beams, len(candidates))):
                reason, score = reasons[place], float(sums[top[place]]) / divisor
                if reason is not None and score > _NEVER:
                    done.append(Finished(score, candidates[place][start:], reason))
            done = sorted(done, key=lambda text: -text.score)[:beams]
        order = np.argsort(-(sums[top] + ends * _NEVER), kind="stable")[:beams]
        scores = (sums[top] + ends * _NEVER)[order]
        rows = [int(top[i]) // vocab for i in order]
        running = [candidates[int(i)] for i in order]
        improving = improving and _may_improve(scores, done, length - start, longest, search)
        full = search.early_stopping is True and len(done) == beams
        if not improving or full or ends.all() or (limits.context is not None and length >= limits.context):
            break
        if limits.cached:
            state.select(rows)
        logits = _step(engine, state, [ids[-1:] if limits.cached else ids for ids in running], limits)
    return done[0] if done else Finished(float(scores[0]), running[0][start:], "length")


def _best(values: Array, count: int) -> Array:
    """The places of the largest `count` values, the largest first and equal ones in their order."""
    if count >= len(values):
        return np.argsort(-values, kind="stable")
    least = np.partition(values, -count)[-count]
    places = np.flatnonzero(values >= least)
    order: Array = places[np.argsort(-values[places], kind="stable")][:count]
    return order


def _reason(
    ids: Sequence[int],
    start: int,
    limits: Limits,
    longest: int,
    late: bool,
    stopped: Callable[[Sequence[int]], bool] | None,
) -> str | None:
    """Why a text ends with its last token, if it does."""
    if ids[-1] in limits.eos:
        return "eos"
    if stopped is not None and stopped(ids[start:]):
        return "stop"
    return "length" if len(ids) - start >= longest else "time" if late else None


def _may_improve(scores: Array, done: Sequence[Finished], length: int, longest: int, search: BeamOptions) -> bool:
    if len(done) < search.num_beams:
        return True
    hoped = longest if search.early_stopping == "never" and search.length_penalty > 0 else length
    return bool(float(scores[0]) / float(hoped) ** search.length_penalty > done[-1].score)


def _prefill(engine: Engine, state: State, prompt: Sequence[int], beams: int, limits: Limits) -> Array:
    logits, step = np.empty(0), CHUNK if limits.cached else len(prompt)
    for start in range(0, len(prompt), step):
        logits = _step(engine, state, [list(prompt[start : start + step])] * beams, limits)
    return logits


def _step(engine: Engine, state: State, ids: list[list[int]], limits: Limits) -> Array:
    """float64 [beams, vocab]: the logits after these tokens of each beam."""
    inputs: dict[str, Array] = {IDS: np.array(ids, np.int64)}
    if limits.keeps_logits:
        inputs[KEEP] = np.array(1, np.int64)
    logits: Array = engine.forward([(inputs, state)])[0]["logits"][:, -1]
    return logits.astype(np.float64)
