"""From scores to a token: the most likely one, or a draw by inverse transform sampling from the candidates.

A draw takes one number of the random generator and walks the tokens in the order of their ids, so that the same seed
gives the same token whichever filters have selected the candidates before.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from edgeformer.errors import EdgeformerError

Scores = np.ndarray[Any, Any]
Places = np.ndarray[Any, np.dtype[np.intp]]
Random = np.random.Generator
_BLOCK = 256  # tokens: `draw` sums blocks and walks through one of them


class Candidates(NamedTuple):
    """The tokens that may still be chosen: those of the whole vocabulary, or the few that filters left."""

    scores: Scores  # [n]; -inf for a token that may not follow
    tokens: Places | None = None  # [n], ascending; None: all of them, token i has the score i

    def at(self, places: Places | None) -> Candidates:
        """Those at `places` (ascending); None: all."""
        if places is None:
            return self
        return Candidates(self.scores[places], places if self.tokens is None else self.tokens[places])

    def token(self, place: int) -> int:
        """The token id of the candidate at a place."""
        return place if self.tokens is None else int(self.tokens[place])

    def spread(self, vocab: int) -> Scores:
        """The scores of all tokens [vocab]: -inf for those that are no candidates."""
        if self.tokens is None:
            return self.scores
        scores = np.full(vocab, -np.inf, self.scores.dtype)
        scores[self.tokens] = self.scores
        return scores


def choose(scores: Scores, rng: Random | None) -> int:
    """The chosen place of `scores` [n], a token id where all tokens are there: a draw with `rng`, the largest without.

    Raises:
        EdgeformerError: no token is left.
    """
    best = int(scores.argmax())
    if scores[best] == -np.inf:
        raise EdgeformerError("The generation settings forbid every token; relax them.")
    return best if rng is None else _drawn(weights(scores, scores[best]), rng)


def likeliest(logits: Scores) -> int:
    """The place of the largest of `logits` [n], checked as by `check`, in one pass.

    Raises:
        EdgeformerError: as `check`.
    """
    best = int(logits.argmax())  # the first NaN counts as the largest
    _check_largest(logits[best])
    return best


def check(logits: Scores) -> None:
    """
    Raises:
        EdgeformerError: they hold NaN or +inf, or nothing but -inf: the model or its weights are damaged.
    """
    _check_largest(logits.max())  # a NaN anywhere makes the maximum NaN


def _check_largest(largest: float) -> None:
    if not math.isfinite(largest):
        raise EdgeformerError("The logits hold NaN or infinity; the weights are damaged or the graph overflows.")


def draw(scores: Scores, rng: Random) -> int:
    """One place of `scores` [n], drawn with the probabilities softmax(scores)."""
    return _drawn(weights(scores), rng)


def weights(scores: Scores, largest: Any = None) -> Scores:
    """exp(scores - max) [n], in the type of `scores`: 1 for the likeliest, 0 for a token that may not follow."""
    shifted: Scores = scores - (scores.max() if largest is None else largest)
    return np.exp(shifted, out=shifted)


def _drawn(weights: Scores, rng: Random) -> int:
    """The place at which the running sum of `weights` passes a random share of their total.

    A sequential sum of the whole vocabulary takes longer than all other steps together, so the sums of blocks come
    first, and then the running sum in one block, in float64.
    """
    blocks = -(-len(weights) // _BLOCK)
    if blocks < 8:
        return _passed(np.cumsum(weights, dtype=np.float64), rng.random())
    whole = len(weights) // _BLOCK
    sums = np.empty(blocks)
    sums[:whole] = weights[: whole * _BLOCK].reshape(whole, _BLOCK).sum(1)  # each in the type of the weights
    if blocks > whole:
        sums[whole] = weights[whole * _BLOCK :].sum()
    ends, share = np.cumsum(sums), rng.random()
    block = _passed(ends, share)
    left = share * ends[-1] - (ends[block - 1] if block else 0.0)  # never below 0
    inside = np.cumsum(weights[block * _BLOCK : (block + 1) * _BLOCK], dtype=np.float64)
    return block * _BLOCK + _passed(inside, left / inside[-1])


def _passed(ends: Scores, share: float) -> int:
    """The first place whose end lies above `share` of the last end; a place that adds nothing is never taken."""
    index = int(np.searchsorted(ends, share * ends[-1], side="right"))
    if index == len(ends):  # rounding may point one past the end
        index = int(np.searchsorted(ends, ends[-1], side="left"))
    return index
