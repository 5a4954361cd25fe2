"""The filters of sampling: each selects, of the tokens that are left, those that may be drawn.

A selection is a function of the scores [n] of the tokens that are left; it gives the places of those that stay,
ascending, or None where all stay. So after a top-k of 50 every other filter works on 50 numbers. `least` tokens always
stay. Meaning and order are transformers' (`generation/logits_process.py`, with which the tests compare), XTC's are its
author's. No selection sorts the whole vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from edgeformer.decoding.generation_config import GenerationConfig
from edgeformer.decoding.sampling import Candidates, Places, Random, Scores, check_some_left, weights
from edgeformer.decoding.selection import at_least_kth, covering, kth_largest, largest
from edgeformer.decoding.vocabulary import places_reaching

Filter = Callable[[Candidates, Random | None], Candidates]
_TINY = 1e-37  # a weight above 0
_FEW = 256  # tokens among which no fewer are looked for first
_SORTED = 4096  # numbers that numpy sorts faster than they are halved again and again
_TOP_H = 100  # top-h looks at no more tokens than these


def filters(config: GenerationConfig, least: int = 1) -> list[Filter]:
    """The filters of a generation config, in the order in which they apply."""
    made: list[Filter] = []
    if config.top_h is not None:
        made.append(_selecting(top_h, config.top_h))
    if config.top_k:
        made.append(_selecting(top_k, max(config.top_k, least)))
    if config.temperature != 1:  # a temperature keeps the order, so after top-k it has few scores to divide
        made.insert(0 if config.top_h is not None else len(made), partial(_heated, config.temperature))
    if config.top_p < 1:
        made.append(_weighing(top_p, config.top_p, least))
    if config.min_p:
        made.append(_weighing(min_p, config.min_p, least))
    if config.typical_p < 1:
        made.append(_weighing(typical_p, config.typical_p, least))
    if 0 < config.epsilon_cutoff < 1:
        made.append(_weighing(epsilon_cutoff, config.epsilon_cutoff, least))
    if 0 < config.eta_cutoff < 1:
        made.append(_weighing(eta_cutoff, config.eta_cutoff, least))
    if config.xtc_probability:
        kept = frozenset(config.eos_token_id) | frozenset(config.xtc_kept_ids)
        made.append(partial(_excluding, config.xtc_probability, config.xtc_threshold, kept))
    return made


def checked_filters(config: GenerationConfig, least: int = 1) -> list[Filter]:
    """The filters, and the check that a token is left: after a first top-k, which takes the scores as they are."""
    made = filters(config, least)
    made.insert(1 if config.top_k and config.top_h is None else 0, _some_left)
    return made


@dataclass(frozen=True)
class Reach:
    """Which tokens, of those in the order of their scores, decide what the filters of a config leave.

    Neither `best` nor `distance`: all of them, for a filter looks at their total, or there is none.
    """

    best: int | None = None  # so many, and those equal to the last
    distance: float | None = None  # those whose score lies at most so far below the largest
    is_alone: bool = False  # no other filter follows; with neither `best` nor `distance` there is none at all


def reach(config: GenerationConfig) -> Reach:
    """What the first filter of `filters(config)` can leave, in scores before the temperature; others see no more."""
    others = config.typical_p < 1, config.epsilon_cutoff, config.eta_cutoff, config.xtc_probability
    is_alone = config.top_p >= 1 and not config.min_p and not any(others)
    if config.top_h is not None:
        return Reach()
    if config.top_k:
        return Reach(best=config.top_k, is_alone=is_alone)
    if config.min_p and config.top_p >= 1:
        return Reach(distance=-math.log(config.min_p) * config.temperature)
    return Reach(is_alone=is_alone)


def _some_left(candidates: Candidates, _: Random | None) -> Candidates:
    """
    Raises:
        EdgeformerError: there is nothing to draw from.
    """
    largest = candidates.scores.max(initial=-np.inf) if candidates.largest is None else candidates.largest
    check_some_left(largest)
    return Candidates(candidates.scores, candidates.tokens, largest)


def _selecting(select: Callable[..., Places | None], *arguments: float) -> Filter:
    return lambda candidates, _: candidates.at(select(candidates.scores, *arguments))


def _weighing(select: Callable[..., Places | None], *arguments: float) -> Filter:
    """As `_selecting`, for a selection that is told the largest score where it is known."""
    return lambda candidates, _: candidates.at(select(candidates.scores, *arguments, largest=candidates.largest))


def _heated(temperature: float, candidates: Candidates, _: Random | None) -> Candidates:
    scores, largest = candidates.scores, candidates.largest
    if temperature < 1e-30:  # the largest score may become infinite: draws depend on differences only
        scores = scores - scores.max()
        largest = None
    with np.errstate(over="ignore"):  # the smallest float32 becomes -inf
        return Candidates(scores / temperature, candidates.tokens, None if largest is None else largest / temperature)


def top_h(scores: Scores, p: float) -> Places:
    """The most likely tokens whose summed entropy is within `p` times that of the 100 most likely ones."""
    order = largest(scores, _TOP_H)
    probabilities = weights(scores[order]).at(None).astype(np.float64)
    probabilities /= probabilities.sum()
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = np.where(probabilities > 0, -probabilities * np.log(probabilities), 0.0)
    stays = np.cumsum(terms) <= terms.sum() * p
    stays[0] = True
    return np.sort(order[stays])


def top_k(scores: Scores, k: int) -> Places | None:
    """The k largest scores, and those equal to the k-th; k = 0 leaves all."""
    return None if k == 0 or k >= len(scores) else at_least_kth(scores, k)


def top_p(scores: Scores, p: float, least: int = 1, *, largest: Any = None) -> Places | None:
    """The fewest most likely tokens whose probabilities reach `p`.

    Of equally likely tokens at the end those with the lower places stay.
    """
    if p >= 1:
        return None
    likely = weights(scores, largest)
    total = likely.total
    goal = p * total
    places = few = None
    for floor in _floors(p, total, len(scores)):
        places = places_reaching(scores, likely.score(floor))
        few = likely.at(places)
        if few.sum(dtype=np.float64) >= goal:
            break
    if few is None:
        few = likely.at(None)
    if len(few) <= _SORTED:
        values, ordered = few, np.sort(few)[::-1]
        reached = ordered.cumsum(dtype=np.float64)
        end = ordered[min(int(np.count_nonzero(reached < goal)), len(ordered) - 1)]
    else:  # a nearly even distribution
        values = scores if places is None else scores[places]
        end = -covering(-values, few, goal)
    stays = (values >= end).nonzero()[0]
    ends = (values == end).nonzero()[0]
    if len(ends) > 1 and few[ends[0]] > 0:
        missing = goal - float(few.compress(values > end).sum(dtype=np.float64))
        stays = np.setdiff1d(stays, ends[max(1, math.ceil(missing / float(few[ends[0]]))) :])
    places = stays if places is None else places[stays]
    return places if len(places) >= least else largest_places(scores, least)


def min_p(scores: Scores, p: float, least: int = 1, *, largest: Any = None) -> Places | None:
    """The tokens at least `p` times as likely as the likeliest."""
    if p <= 0:
        return None
    # exp(score - max) >= p, without the exp
    return _reaching(scores, (scores.max() if largest is None else largest) + math.log(p), least)


def typical_p(scores: Scores, p: float, least: int = 1, *, largest: Any = None) -> Places:
    """The tokens whose surprise is nearest to the entropy, as many as their probabilities reach `p`."""
    likely = weights(scores, largest)
    total, entropy = likely.total, likely.entropy
    middle = likely.score(total) - entropy  # the score whose surprise is the entropy
    goal = p * total
    places = few = None
    for floor in _floors(p, total, len(scores)) if least == 1 else ():
        # of the tokens as likely as `floor`: the likeliest or the least likely is the farthest
        farthest = max(abs(entropy - math.log(total)), abs(entropy + math.log(floor / total)))
        places = places_reaching(scores, middle - farthest)
        few = likely.at(places)
        if few.sum(dtype=np.float64) >= goal:
            break
    if few is None:
        few = likely.at(None)
    near = np.minimum(np.abs((scores if places is None else scores[places]) - middle), 1e4)  # 1e4 for a score of -inf
    end = covering(near, few, goal)
    if least > 1:
        end = max(end, -kth_largest(-near, min(least, len(near))))
    stays: Places = (near <= end).nonzero()[0]
    return stays if places is None else places[stays]


def epsilon_cutoff(scores: Scores, epsilon: float, least: int = 1, *, largest: Any = None) -> Places:
    """The tokens of a probability of at least `epsilon`."""
    likely = weights(scores, largest)
    return _reaching(scores, likely.score(epsilon * likely.total), least)


def eta_cutoff(scores: Scores, epsilon: float, least: int = 1, *, largest: Any = None) -> Places:
    """The tokens of a probability of at least min(epsilon, sqrt(epsilon) exp(-entropy))."""
    likely = weights(scores, largest)
    least_likely = min(epsilon, math.sqrt(epsilon) * math.exp(-likely.entropy))
    return _reaching(scores, likely.score(least_likely * likely.total), least)


def xtc(scores: Scores, threshold: float, *, largest: Any = None) -> Places | None:
    """The places of the top choices that XTC excludes: all tokens of a probability of at least `threshold` but the
    least likely of them. None where fewer than two are so likely.
    """
    likely = weights(scores, largest)
    top = places_reaching(scores, likely.score(max(threshold * likely.total, _TINY)))
    if len(top) < 2:
        return None
    least = len(top) - 1 - int(np.argmin(scores[top][::-1]))  # of equal ones the last
    return np.delete(top, least)


def _excluding(
    probability: float, threshold: float, kept: frozenset[int], candidates: Candidates, rng: Random | None
) -> Candidates:
    """XTC (p-e-w, text-generation-webui pull request 6335): with `probability`, without the top choices.

    One random number is drawn at each step, so the others of the answer are the same for every threshold. Where an end
    token or a newline (`kept`) is among the top choices, all stay, as in the author's program (llama.cpp has no such
    exception): else answers and lines would not end.
    """
    if rng is None or rng.random() >= probability:
        return candidates
    excluded = xtc(candidates.scores, threshold, largest=candidates.largest)
    if excluded is None or not kept.isdisjoint(candidates.token(place) for place in excluded.tolist()):
        return candidates
    scores = candidates.scores.copy()  # few are excluded, so the others are not gathered
    scores[excluded] = -np.inf
    return Candidates(scores, candidates.tokens)


def largest_places(scores: Scores, count: int) -> Places | None:
    """The places, ascending, of the `count` largest scores; None where that is all."""
    return None if count >= len(scores) else np.sort(largest(scores, count))


def _floors(p: float, total: float, count: int) -> Iterator[float]:
    """Weights above which the tokens may reach `p`, and surely do: those below (1 - p) / n sum to less than 1 - p.

    In texts 64 or 16 times as much nearly always does too, and leaves few tokens. None for a few tokens.
    """
    if count <= _FEW:
        return
    floor = max((1 - p) * total / count, _TINY)
    for times in (64, 16, 1):
        yield min(times * floor, 1.0)


def _reaching(scores: Scores, bound: Any, least: int) -> Places:
    """The places of the scores that reach `bound`, of the `least` largest, and of those equal to them."""
    if least >= len(scores):
        return np.arange(len(scores))
    if least > 1:
        low = kth_largest(scores, least)
        return places_reaching(scores, min(bound, low))
    places = places_reaching(scores, bound)
    return places if len(places) else np.flatnonzero(scores == scores.max())
