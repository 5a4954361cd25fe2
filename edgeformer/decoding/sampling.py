"""From scores to a token: the most likely one, or a draw by inverse transform sampling after the filters.

The filters are transformers', in its order and with its meaning; a removed token has the score -inf. Formulas:
`generation/logits_process.py`, with which the tests compare. `least` tokens always stay.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from edgeformer.decoding.generation_config import GenerationConfig
from edgeformer.errors import EdgeformerError

Scores = np.ndarray[Any, Any]
Filter = Callable[[Scores], Scores]
_TOP_H = 100  # top-h looks at no more tokens than these


def filters(config: GenerationConfig, least: int = 1) -> list[Filter]:
    """The filters of a generation config, in the order in which they apply."""
    made: list[Filter] = []
    if config.temperature != 1:
        made.append(partial(_divided, config.temperature))
    if config.top_h is not None:
        made.append(partial(top_h, p=config.top_h))
    if config.top_k:
        made.append(partial(top_k, k=max(config.top_k, least)))
    if config.top_p < 1:
        made.append(partial(top_p, p=config.top_p, least=least))
    if config.min_p:
        made.append(partial(min_p, p=config.min_p, least=least))
    if config.typical_p < 1:
        made.append(partial(typical_p, p=config.typical_p, least=least))
    if 0 < config.epsilon_cutoff < 1:
        made.append(partial(epsilon_cutoff, epsilon=config.epsilon_cutoff, least=least))
    if 0 < config.eta_cutoff < 1:
        made.append(partial(eta_cutoff, epsilon=config.eta_cutoff, least=least))
    return made


def choose(scores: Scores, rng: np.random.Generator | None) -> int:
    """The chosen token id of `scores` [vocab]: a draw with `rng`, the most likely token without.

    Raises:
        EdgeformerError: no token is left.
    """
    best = int(scores.argmax())
    if scores[best] == -np.inf:
        raise EdgeformerError("The generation settings forbid every token; relax them.")
    return best if rng is None else draw(scores, rng)


def check(logits: Scores) -> None:
    """
    Raises:
        EdgeformerError: they hold NaN or +inf, or nothing but -inf: the model or its weights are damaged.
    """
    if not math.isfinite(logits.max()):  # a NaN anywhere makes the maximum NaN
        raise EdgeformerError("The logits hold NaN or infinity; the weights are damaged or the graph overflows.")


def _divided(temperature: float, scores: Scores) -> Scores:
    with np.errstate(over="ignore"):  # the smallest float32 becomes -inf
        divided: Scores = scores / temperature
    return divided


def top_h(scores: Scores, p: float) -> Scores:
    """The most likely tokens are left whose summed entropy is within `p` times that of the 100 most likely ones."""
    count = min(_TOP_H, len(scores))
    order = _largest(scores, count)
    probabilities = softmax(scores[order])
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = np.where(probabilities > 0, -probabilities * np.log(probabilities), 0.0)
    kept = np.cumsum(terms) <= terms.sum() * p
    kept[0] = True
    return _only(scores, order[kept])


def top_k(scores: Scores, k: int) -> Scores:
    """Only the k largest scores (and those equal to the k-th) are left; k = 0 leaves all."""
    if k == 0 or k >= len(scores):
        return scores
    least = np.partition(scores, -k)[-k]
    return np.where(scores < least, -np.inf, scores).astype(scores.dtype, copy=False)


def top_p(scores: Scores, p: float, least: int = 1) -> Scores:
    """Only the fewest most likely tokens whose probabilities reach `p` are left.

    transformers sorts the whole vocabulary, 5 ms for 49,152 tokens; here only as many of the largest as are needed.
    """
    if p >= 1:
        return scores
    alive = np.flatnonzero(scores > -np.inf)
    probabilities = softmax(scores[alive])
    count = 64
    while True:
        count = min(count, len(alive))
        order = _largest(probabilities, count)
        reached = np.cumsum(probabilities[order])
        if (reached[-1] >= p and count >= least) or count == len(alive):
            break
        count *= 8
    before = reached - probabilities[order]
    before[:least] = -1.0
    return _only(scores, alive[order[before < p]])


def min_p(scores: Scores, p: float, least: int = 1) -> Scores:
    """Only tokens at least `p` times as likely as the likeliest are left."""
    if p <= 0:
        return scores
    # exp(score - max) < p, without the exp
    return _without(scores, scores < scores.max() + math.log(p), least)


def typical_p(scores: Scores, p: float, least: int = 1) -> Scores:
    """Only tokens whose surprise is nearest to the entropy are left, as many as their probabilities reach `p`."""
    with np.errstate(divide="ignore", invalid="ignore"):
        probabilities = softmax(scores)
        logs = np.log(probabilities)
        entropy = -np.nansum(probabilities * logs)
        distance = np.abs(-logs - entropy)
    order = np.argsort(distance, kind="stable")
    last = min(int((np.cumsum(probabilities[order]) < p).sum()), len(scores) - 1)
    removed = distance > distance[order[last]]
    removed[order[:least]] = False
    return np.where(removed, -np.inf, scores).astype(scores.dtype, copy=False)


def epsilon_cutoff(scores: Scores, epsilon: float, least: int = 1) -> Scores:
    """Only tokens of a probability of at least `epsilon` are left."""
    return _without(scores, softmax(scores) < epsilon, least)


def eta_cutoff(scores: Scores, epsilon: float, least: int = 1) -> Scores:
    """Only tokens of a probability of at least min(epsilon, sqrt(epsilon) exp(-entropy)) are left."""
    probabilities = softmax(scores)
    some = probabilities[probabilities > 0]
    entropy = -float((some * np.log(some)).sum())
    return _without(scores, probabilities < min(epsilon, math.sqrt(epsilon) * math.exp(-entropy)), least)


def draw(scores: Scores, rng: np.random.Generator) -> int:
    """One token id, drawn with the probabilities softmax(scores)."""
    alive = np.flatnonzero(scores > -np.inf)
    ends = np.cumsum(softmax(scores[alive]))
    index = int(np.searchsorted(ends, rng.random() * ends[-1], side="right"))
    return int(alive[min(index, len(alive) - 1)])  # rounding may point one past the end


def softmax(scores: Scores) -> np.ndarray[Any, np.dtype[np.float64]]:
    """exp(scores - max) / sum; the exp in float32, as the logits are (18 times faster), the sum in float64."""
    shifted = np.exp(scores - scores.max()).astype(np.float64)
    normalized: np.ndarray[Any, np.dtype[np.float64]] = shifted / shifted.sum()
    return normalized


def _largest(values: Scores, count: int) -> Scores:
    """The places of the `count` largest values, the largest first."""
    best = np.argpartition(values, -count)[-count:] if count < len(values) else np.arange(len(values))
    order: Scores = best[np.argsort(-values[best], kind="stable")]
    return order


def _only(scores: Scores, kept: Scores) -> Scores:
    left = np.full_like(scores, -np.inf)
    left[kept] = scores[kept]
    return left


def _without(scores: Scores, removed: Scores, least: int) -> Scores:
    """`scores` without the `removed`; the `least` largest, and those equal to them, stay."""
    low = np.partition(scores, -least)[-least] if 1 < least < len(scores) else scores.max()
    if least >= len(scores):
        return scores
    return np.where(removed & (scores < low), -np.inf, scores).astype(scores.dtype, copy=False)
