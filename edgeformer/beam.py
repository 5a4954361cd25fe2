"""Beam search, with the scores and the stopping rule of transformers' own (`GenerationMixin._beam_search`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from edgeformer.engine import Engine, State
from edgeformer.errors import EdgeformerError, InputError
from edgeformer.generate import CHUNK, Limits
from edgeformer.signature import IDS, KEEP

Array = np.ndarray[Any, Any]
_NEVER = -1.0e9  # a score that no real one comes near, and that stays finite when it is divided


@dataclass(frozen=True)
class BeamOptions:
    """How wide, and what counts as better.

    A finished text's score is the sum of its tokens' log probabilities divided by `length ** length_penalty`.
    `early_stopping=True` ends with the first `num_beams` finished texts; False as soon as no running one looks able to
    beat them; "never" only when none can.

    Raises:
        InputError: a value is out of its range.
    """

    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False

    def __post_init__(self) -> None:
        if type(self.num_beams) is not int or not 1 <= self.num_beams <= 256:
            raise InputError(f"num_beams is {self.num_beams!r}, expected a whole number from 1 to 256.")
        if self.early_stopping not in (True, False, "never"):
            raise InputError(f"early_stopping is {self.early_stopping!r}, expected True, False or 'never'.")

    @classmethod
    def of(
        cls,
        settings: Mapping[str, Any],
        num_beams: int | None,
        length_penalty: float | None,
        early_stopping: bool | Literal["never"] | None,
        *,
        plain: bool,
    ) -> BeamOptions:
        """What was asked for; what is None is as a generation_config's `settings` say. `plain`: something else was
        asked for that only a single text can have, so a number of beams in the settings does not count.

        Raises:
            InputError: `plain`, and several beams were asked for; or a value is out of its range.
        """
        found = cls(
            num_beams or (1 if plain else int(settings.get("num_beams") or 1)),
            float(settings.get("length_penalty") or 1.0) if length_penalty is None else length_penalty,
            settings.get("early_stopping") or False if early_stopping is None else early_stopping,
        )
        if plain and found.num_beams > 1:
            raise InputError("A beam search neither samples nor knows stop strings and sessions; leave out num_beams.")
        return found


@dataclass(frozen=True)
class Finished:
    """The best text: its new tokens, its score, and whether it ended by itself."""

    ids: list[int]
    score: float
    ended: bool


def beam_search(
    engine: Engine,
    state: State,
    prompt: Sequence[int],
    limits: Limits,
    max_new_tokens: int,
    options: BeamOptions,
    rules: Callable[[Array, Sequence[int]], Array],
) -> Finished:
    """The best continuation of `prompt`. `state` is empty, and takes `num_beams` sequences.

    Raises:
        EdgeformerError: the logits hold NaN.
    """
    beams, start = options.num_beams, len(prompt)
    keep = max(2, 1 + len(limits.eos)) * beams
    limit = start + max_new_tokens
    running = [list(prompt) for _ in range(beams)]
    scores = np.array([0.0] + [_NEVER] * (beams - 1))  # all begin alike: only one may count
    done: list[tuple[float, list[int], bool]] = []  # (score, ids, ended), at most `beams`, best first
    pending, improving = list(prompt), True
    logits = _prefill(engine, state, pending, beams, limits)
    while True:
        if np.isnan(logits).any():
            raise EdgeformerError(f"The logits hold NaN after {len(running[0])} tokens.")
        table = np.stack([rules(row, ids) for row, ids in zip(_log_softmax(logits), running, strict=True)])
        vocab = table.shape[1]
        sums = (table + scores[:, None]).reshape(-1)
        top = np.argsort(-sums, kind="stable")[:keep]
        candidates = [running[int(i) // vocab] + [int(i) % vocab] for i in top]
        length = len(candidates[0])
        ends = np.array([ids[-1] in limits.eos or length >= limit for ids in candidates])
        if improving and not (options.early_stopping is True and len(done) == beams):
            divisor = float(length - start) ** options.length_penalty
            for place in range(min(beams, len(candidates))):
                if ends[place] and np.isfinite(sums[top[place]]):
                    ended = candidates[place][-1] in limits.eos
                    done.append((float(sums[top[place]]) / divisor, candidates[place], ended))
            done = sorted(done, key=lambda text: -text[0])[:beams]
        order = np.argsort(-(sums[top] + ends * _NEVER), kind="stable")[:beams]
        scores = (sums[top] + ends * _NEVER)[order]
        rows = [int(top[i]) // vocab for i in order]
        running = [candidates[int(i)] for i in order]
        improving = improving and _may_improve(scores, done, length - start, max_new_tokens, options)
        full = options.early_stopping is True and len(done) == beams
        if not improving or full or ends.all() or (limits.context is not None and length >= limits.context):
            break
        state.select(rows)
        logits = _step(engine, state, [[ids[-1]] for ids in running], limits)
    score, ids, ended = done[0] if done else (float(scores[0]), running[0], False)
    return Finished(ids[start:], score, ended)


def _may_improve(
    scores: Array, done: list[tuple[float, list[int], bool]], length: int, longest: int, options: BeamOptions
) -> bool:
    if len(done) < options.num_beams:
        return True
    hoped = longest if options.early_stopping == "never" and options.length_penalty > 0 else length
    return bool(float(scores[0]) / float(hoped) ** options.length_penalty > done[-1][0])


def _prefill(engine: Engine, state: State, prompt: Sequence[int], beams: int, limits: Limits) -> Array:
    logits: Array = np.empty(0)
    for start in range(0, len(prompt), CHUNK):
        logits = _step(engine, state, [list(prompt[start : start + CHUNK])] * beams, limits)
    return logits


def _step(engine: Engine, state: State, ids: list[list[int]], limits: Limits) -> Array:
    """float64 [beams, vocab]: the logits after these tokens of each beam."""
    inputs: dict[str, Array] = {IDS: np.array(ids, np.int64)}
    if limits.keeps_logits:
        inputs[KEEP] = np.array(1, np.int64)
    logits: Array = engine.forward([(inputs, state)])[0]["logits"][:, -1]
    return logits.astype(np.float64)


def _log_softmax(logits: Array) -> Array:
    shifted = logits - logits.max(-1, keepdims=True)
    table: Array = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return table
