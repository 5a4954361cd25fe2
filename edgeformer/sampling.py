"""From logits to a token: frozen options, and pure functions in the order and with the meaning of transformers.

repetition penalty, temperature, top-k, top-p, min-p; then a draw by inverse transform. Removed tokens have the
logit -inf. Formulas: transformers' `generation/logits_process.py`, which the tests hold these against.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgeformer.errors import EdgeformerError, InputError

Logits = np.ndarray[Any, np.dtype[np.float32]]
Ids = Sequence[int] | np.ndarray[Any, Any]


@dataclass(frozen=True)
class SamplingOptions:
    """How a token is chosen.

    `temperature` 0 takes the likeliest token; `top_k` 0, `top_p` 1, `min_p` 0 and `repetition_penalty` 1 do nothing.
    The same `seed` gives the same tokens; None takes a fresh one.

    Raises:
        InputError: a value is out of its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        problems = []

        def number(name: str, expected: str, low: float, high: float, *, above: bool = False) -> None:
            value = getattr(self, name)
            fine = isinstance(value, (int, float, np.number)) and not isinstance(value, bool) and math.isfinite(value)
            if not fine or value < low or value > high or (above and value == low):
                problems.append(f"{name} is {value!r}, expected {expected}")

        def whole(name: str, expected: str, value: Any) -> None:
            if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 0:
                problems.append(f"{name} is {value!r}, expected {expected}")

        number("temperature", "a number of at least 0 (0 is greedy)", 0.0, 1e6)
        number("top_p", "a number above 0 and at most 1", 0.0, 1.0, above=True)
        number("min_p", "a number from 0 to 1", 0.0, 1.0)
        number("repetition_penalty", "a number above 0 (1 is none)", 0.0, 1e6, above=True)
        whole("top_k", "a whole number of at least 0 (0 is off)", self.top_k)
        if self.seed is not None:
            whole("seed", "a whole number of at least 0", self.seed)
        if problems:
            raise InputError("; ".join(problems) + ".")


def sample(logits: Logits, seen: Ids, options: SamplingOptions, rng: np.random.Generator) -> int:
    """The chosen token id. `logits` is float [vocab]; `seen` holds the ids of prompt and answer so far.

    Raises:
        EdgeformerError: the logits hold NaN or +inf, or nothing but -inf: the model or its weights are damaged.
    """
    scores = np.asarray(logits, dtype=np.float32)
    if not math.isfinite(scores.max()):  # a NaN anywhere makes the maximum NaN
        raise EdgeformerError("The logits hold NaN or infinity; the weights are damaged or the graph overflows.")
    scores = penalize(scores, seen, options.repetition_penalty)
    if options.temperature == 0:
        return int(scores.argmax())
    scores = scores / np.float32(options.temperature)
    scores = top_k(scores, options.top_k)
    scores = top_p(scores, options.top_p)
    scores = min_p(scores, options.min_p)
    return draw(scores, rng)


def penalize(scores: Logits, seen: Ids, penalty: float) -> Logits:
    """Scores of the tokens in `seen` divided by `penalty` where positive, multiplied where negative (CTRL, 2019)."""
    if penalty == 1 or len(seen) == 0:
        return scores
    ids = np.unique(seen)
    scores = scores.copy()
    old = scores[ids]
    scores[ids] = np.where(old < 0, old * np.float32(penalty), old / np.float32(penalty))
    return scores


def top_k(scores: Logits, k: int) -> Logits:
    """Only the k largest scores (and those equal to the k-th) are left; k = 0 leaves all."""
    if k == 0 or k >= len(scores):
        return scores
    least = np.partition(scores, -k)[-k]
    return np.where(scores < least, np.float32(-np.inf), scores)


def top_p(scores: Logits, p: float) -> Logits:
    """Only the fewest likeliest tokens whose probabilities reach `p` are left; at least one.

    transformers sorts the whole vocabulary, 5 ms for 49,152 tokens; here only as many of the largest as are needed.
    """
    if p >= 1:
        return scores
    alive = np.flatnonzero(scores > -np.inf)
    probabilities = softmax(scores[alive])
    count = 64
    while True:
        count = min(count, len(alive))
        best = np.argpartition(probabilities, -count)[-count:]
        order = best[np.argsort(-probabilities[best], kind="stable")]  # the largest first
        reached = np.cumsum(probabilities[order])
        if reached[-1] >= p or count == len(alive):
            break
        count *= 8
    before = reached - probabilities[order]
    before[0] = 0.0
    kept = alive[order[before < p]]
    left = np.full_like(scores, -np.inf)
    left[kept] = scores[kept]
    return left


def min_p(scores: Logits, p: float) -> Logits:
    """Only tokens at least `p` times as likely as the likeliest are left."""
    if p <= 0:
        return scores
    # exp(score - max) < p, without the exp
    return np.where(scores < scores.max() + math.log(p), np.float32(-np.inf), scores)


def draw(scores: Logits, rng: np.random.Generator) -> int:
    """One token id, drawn with the probabilities softmax(scores)."""
    alive = np.flatnonzero(scores > -np.inf)
    ends = np.cumsum(softmax(scores[alive]))
    index = int(np.searchsorted(ends, rng.random() * ends[-1], side="right"))
    return int(alive[min(index, len(alive) - 1)])  # rounding may point one past the end


def softmax(scores: Logits) -> np.ndarray[Any, np.dtype[np.float64]]:
    """exp(scores - max) / sum; the exp in float32, as the logits are (18 times faster), the sum in float64."""
    shifted = np.exp(scores - scores.max()).astype(np.float64)
    normalized: np.ndarray[Any, np.dtype[np.float64]] = shifted / shifted.sum()
    return normalized
