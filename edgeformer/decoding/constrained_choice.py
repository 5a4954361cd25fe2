"""The next token of an answer that follows a grammar, mostly without the mask of all tokens that may follow.

A mask of a grammar with free text takes up to half a millisecond for 50,000 tokens; whether one token may follow takes
half a microsecond. So the grammar is asked about tokens one by one where few of them decide:

- A greedy answer takes the likeliest token that may follow. They are asked in the order of their scores.
- Without filters, or with top-k alone: rejection sampling, draws from all tokens until one may follow and is among the
  k likeliest that may. A drawn token that fewer than k are likelier than is among them, whatever may follow; one behind
  these is looked up among the candidates of the next line. The distribution is exactly that of a draw from the tokens
  that the mask and the filter leave.
- Where top-k or min-p is the first of several filters, only the likeliest of the tokens that may follow reach the
  others. These are asked too. The candidates are those that the mask would leave, so a seed gives the same tokens.

Other filters (such as top-p without top-k) need the total of all tokens that may follow, and so the mask. The mask is
also made where the grammar refuses most of the tokens that are asked: few may follow then, and a mask of few is cheap.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from edgeformer.bundle.signature import Array
from edgeformer.decoding import sampling
from edgeformer.decoding.constraints.constraint import Constraint
from edgeformer.decoding.filters import Reach, filters, reach
from edgeformer.decoding.generation_config import GenerationConfig
from edgeformer.decoding.logits_processors import Processor, Step, changed, filtered
from edgeformer.decoding.sampling import Candidates, Random
from edgeformer.decoding.selection import at_least_kth

_MOST = 192  # tokens that are asked: 0.1 ms
_REFUSALS = 48  # refused tokens, beyond one for each that may follow, after which the mask is made
_TRIES = 8  # draws that may be refused before the mask is made
_ROUNDING = 1e-6  # of a score that a temperature divides, in float32: 2 ** -23 with every other error


class ConstrainedChoice:
    """Chooses the tokens of one answer under its constraint."""

    def __init__(self, processors: Sequence[Processor], config: GenerationConfig, constraint: Constraint) -> None:
        self.constraint = constraint
        self._processors = processors
        self._reach = reach(config) if config.do_sample else Reach(best=1)
        best = self._reach.best
        self._asks = best <= _MOST // 2 if best is not None else self._reach.distance is not None
        self._heat = [Step(each) for each in filters(replace(config, top_k=0))] if self._reach.is_alone else []

    @property
    def needs_mask(self) -> bool:
        """Whether each token needs a whole mask."""
        return not (self._asks or self._reach.is_alone)

    def token(self, ids: Array, scores: Array, rng: Random | None, best: int | None = None) -> int:
        """The token that follows `ids` and may do so: a draw with `rng`, the likeliest without. The constraint does
        not advance. `scores` [vocab] hold no NaN; `best` is the place of the largest where it is known and no
        processor changes it.

        Raises:
            StateError: the constraint allows no token.
            EdgeformerError: the processors leave no token that it allows.
        """
        scores = changed(self._processors, ids, scores)
        if rng is None:
            best = int(scores.argmax()) if best is None else best
            # Before `only`: a forced text may be written in other tokens than the tokenizer's own.
            if scores[best] > -np.inf and self.constraint.allows([best])[0]:
                return best
        only = None if self.needs_mask else self.constraint.only()
        if only is not None:
            return self._chosen(_one(scores, only), rng)
        if rng is not None and self._reach.is_alone:
            return self._token_by_rejection(scores, rng)
        return self._chosen(self._allowed(scores), rng)

    def _chosen(self, allowed: Candidates, rng: Random | None) -> int:
        return sampling.choose(filtered(self._processors, allowed, rng), rng)

    def _allowed(self, scores: Array) -> Candidates:
        """Of the tokens that may follow, those that decide, and perhaps more; no text is forced."""
        few = _likeliest(self.constraint, scores, self._reach) if self._asks else None
        return self.constraint.apply(scores) if few is None else few

    def _token_by_rejection(self, scores: Array, rng: Random) -> int:
        best, largest = self._reach.best, scores.max()
        sampling.check_some_left(largest)
        heated = filtered(self._heat, Candidates(scores, None, largest), rng)
        draws = sampling.Draws(sampling.weights(heated.scores, heated.largest))
        for _ in range(_TRIES):
            token = draws.next(rng)
            if not self.constraint.allows([token])[0]:
                continue
            if best is None or np.count_nonzero(scores > scores[token]) < best:
                return token
            left = filtered(self._processors, self._allowed(scores), rng)
            return token if left.holds(token) else sampling.choose(left, rng)
        return self._chosen(self._allowed(scores), rng)


def _one(scores: Array, token: int) -> Candidates:
    place = np.array([token], np.intp)
    return Candidates(scores[place], place)


def _likeliest(constraint: Constraint, scores: Array, wanted: Reach) -> Candidates | None:
    """The tokens that may follow, from the likeliest on, at least those in `wanted`; None where it takes a mask."""
    most = min(_MOST, len(scores))
    places = at_least_kth(scores, most)
    order = np.argsort(-scores[places], kind="stable")
    tokens, values = places[order].tolist(), scores[places][order].tolist()
    chunk = 16
    allowed: list[int] = []
    asked = 0
    while not _is_enough(wanted, values, asked, [values[place] for place in allowed]):
        if asked == len(tokens):
            if asked >= most:
                return None
            break  # no other token has a score
        if asked - len(allowed) > _REFUSALS + len(allowed):
            return None
        found = constraint.allows(tokens[asked : asked + chunk])
        allowed += [asked + place for place, may in enumerate(found) if may]
        asked += len(found)
        chunk = max(8, (wanted.best or 0) - len(allowed))
    if not allowed:
        return None
    left = np.sort(np.array([tokens[place] for place in allowed], np.intp))
    return Candidates(scores[left], left)


def _is_enough(wanted: Reach, values: list[float], asked: int, allowed: list[float]) -> bool:
    """Whether no token behind the first `asked` of `values` (descending) is in `wanted`; `allowed`: of the values."""
    if len(allowed) < (wanted.best or 1) or asked == len(values):
        return False
    if wanted.best is not None:
        bound = allowed[wanted.best - 1]
    else:
        assert wanted.distance is not None
        bound = allowed[0] - wanted.distance
    return values[asked] < bound - _ROUNDING * max(abs(allowed[0]), abs(bound))
