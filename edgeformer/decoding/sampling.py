"""From scores to a token: the most likely one, or a draw by inverse transform sampling from the candidates.

A draw takes one number of the random generator and walks the tokens in the order of their ids, so that the same seed
gives the same token whichever filters have selected the candidates before.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from edgeformer.decoding.vocabulary import BLOCK, LONG, exponential_sums
from edgeformer.errors import EdgeformerError

Scores = np.ndarray[Any, Any]
Places = np.ndarray[Any, np.dtype[np.intp]]
Random = np.random.Generator


class Candidates(NamedTuple):
    """The tokens that may still be chosen: those of the whole vocabulary, or the few that filters left."""

    scores: Scores  # [n]; -inf for a token that may not follow
    tokens: Places | None = None  # [n], ascending; None: all of them, token i has the score i
    largest: Any = None  # of the scores, where it is known

    def at(self, places: Places | None) -> Candidates:
        """Those at `places` (ascending); None: all."""
        if places is None:
            return self
        return Candidates(self.scores[places], places if self.tokens is None else self.tokens[places])

    def token(self, place: int) -> int:
        """The token id of the candidate at a place."""
        return place if self.tokens is None else int(self.tokens[place])

    def holds(self, token: int) -> bool:
        """Whether the token is a candidate that may follow."""
        if self.tokens is None:
            return bool(self.scores[token] > -np.inf)
        place = int(self.tokens.searchsorted(token))
        return place < len(self.tokens) and self.token(place) == token and bool(self.scores[place] > -np.inf)

    def spread(self, vocab: int) -> Scores:
        """The scores of all tokens [vocab]: -inf for those that are no candidates."""
        if self.tokens is None:
            return self.scores
        scores = np.full(vocab, -np.inf, self.scores.dtype)
        scores[self.tokens] = self.scores
        return scores


def choose(candidates: Candidates, rng: Random | None) -> int:
    """The chosen token: a draw with `rng`, the one with the largest score without.

    Raises:
        EdgeformerError: no token is left.
    """
    scores, largest = candidates.scores, candidates.largest
    if rng is None or largest is None:
        best = int(scores.argmax())
        largest = scores[best]
        check_some_left(largest)
    return candidates.token(best if rng is None else draw(scores, rng, largest))


def check_some_left(largest: Any) -> None:
    """
    Raises:
        EdgeformerError: the largest score is that of a token that may not follow.
    """
    if largest == -np.inf:
        raise EdgeformerError("The generation settings forbid every token; relax them.")


def likeliest(logits: Scores) -> int:
    """The place of the largest of `logits` [n]: of the first NaN, where they have one."""
    return int(logits.argmax())


def check(largest: float) -> None:
    """
    Raises:
        EdgeformerError: the largest logit is NaN, +inf or -inf: the model or its weights are damaged.
    """
    if not math.isfinite(largest):
        raise EdgeformerError("The logits hold NaN or infinity; the weights are damaged or the graph overflows.")


def draw(scores: Scores, rng: Random, largest: Any = None) -> int:
    """One place of `scores` [n], drawn with the probabilities softmax(scores); `largest` as for `weights`."""
    return Draws(weights(scores, largest)).next(rng)


class Weights:
    """exp(score - max) of tokens: 1 for the likeliest, 0 for one that may not follow. Those of a large vocabulary are
    not kept, only their sums: a filter and a draw look at few of them.
    """

    def __init__(self, scores: Scores, largest: float) -> None:
        self.scores = scores  # [n]
        self.largest = largest
        self._each: Scores | None = None  # [n], of few tokens
        self._slope: float | None = None  # sum(exp(score - max) * (score - max)), where it is known
        if len(scores) >= LONG:
            self.sums, self._slope = exponential_sums(scores, largest)  # float64 [blocks]
        else:
            self._each = self.at(None)
            self.sums = self._each.sum(dtype=np.float64, keepdims=True)  # of few tokens, one sum
        self.total = float(self.sums.sum())

    @property
    def entropy(self) -> float:
        """Of the distribution, in nats."""
        if self._slope is None:
            _, self._slope = exponential_sums(self.scores, self.largest)
        return math.log(self.total) - self._slope / self.total

    def at(self, places: Places | slice | None) -> Scores:
        """Those at `places`, in the type of the scores; None: all."""
        if self._each is not None:
            return self._each if places is None else self._each[places]
        shifted: Scores = (self.scores if places is None else self.scores[places]) - self.largest
        return np.exp(shifted, out=shifted)

    def score(self, weight: float) -> float:
        """The score of a weight above 0: others are compared with it without their exponentials."""
        return self.largest + math.log(weight)


def weights(scores: Scores, largest: Any = None) -> Weights:
    """Those of `scores` [n], whose largest one may be given."""
    return Weights(scores, float(scores.max() if largest is None else largest))


class Draws:
    """Draws from the same weights: each is the place at which their running sum passes a random share of their total.

    A sequential sum of the whole vocabulary takes longer than all other steps together, so the sums of blocks come
    first, and then the running sum in one block, in float64.
    """

    def __init__(self, weights: Weights) -> None:
        self._weights = weights
        self._is_short = len(weights.scores) < LONG
        self._ends = (weights.at(None) if self._is_short else weights.sums).cumsum(dtype=np.float64)

    def next(self, rng: Random) -> int:
        """The place of one more draw."""
        ends, share = self._ends, rng.random()
        if self._is_short:
            return _passed(ends, share)
        block = _passed(ends, share)
        left = share * ends[-1] - (ends[block - 1] if block else 0.0)  # never below 0
        likely = self._weights.at(slice(block * BLOCK, (block + 1) * BLOCK))
        inside = likely.cumsum(dtype=np.float64)
        return block * BLOCK + _passed(inside, left / float(self._weights.sums[block]))


def _passed(ends: Scores, share: float) -> int:
    """The first place whose end lies above `share` of the last end; a place that adds nothing is never taken."""
    index = int(ends.searchsorted(share * ends[-1], side="right"))
    if index == len(ends):  # rounding may point one past the end
        index = int(ends.searchsorted(ends[-1], side="left"))
    return index
