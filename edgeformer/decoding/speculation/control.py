"""How many drafts pay: the measured cost of rows against the measured chance that a guess is right."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise

from edgeformer.decoding.speculation.drafts import LONGEST, MOST_DRAFTS

# Kinds of guesses by the tokens that they rest on: 1, 2, 3, 4 to 7, 8 to 15, 16 and more.
FIRST = (1, 2, 3, 4, 8, 16)
KINDS = tuple(sum(match >= first for first in FIRST) - 1 for match in range(LONGEST + MOST_DRAFTS + 1))
LOOKUP_CHANCES = (0.25, 0.5, 0.72, 0.78, 0.89, 0.96)  # measured with SmolLM2 on edits, summaries, JSON and stories
PRIOR_WEIGHT = 16.0  # guesses that these count as in the beginning
DECAY = 0.97  # what a guess weighs after the next one of its kind: a window of about 33 guesses
LEAST_CHANCE = 0.002  # drafts that are reached more rarely give less than 0.03 tokens together
ROWS = 64  # costs are measured up to so many rows, and extrapolated beyond


class DraftRecord:
    """What became of the drafts of one sequence. Mutable; kept as long as the sequence.

    For each kind of guess it holds the share of right ones among the recent ones, which begins with `chances`.
    """

    __slots__ = ("_chances", "_right", "_tried")

    def __init__(self, chances: Sequence[float] = LOOKUP_CHANCES) -> None:
        self._right = [chance * PRIOR_WEIGHT for chance in chances]
        self._tried = [PRIOR_WEIGHT] * len(chances)
        self._chances = list(chances)

    def chance(self, match: int) -> float:
        """The chance that a guess that rests on `match` tokens is right, given that the guesses before it are."""
        return self._chances[KINDS[match]]

    def learn(self, match: int, is_right: bool) -> None:
        """Count a guess that was compared with the next token, whether it was drafted or not."""
        kind = KINDS[match]
        self._right[kind] = right = DECAY * self._right[kind] + is_right
        self._tried[kind] = tried = DECAY * self._tried[kind] + 1
        self._chances[kind] = right / tried


class DraftControl:
    """The cost of a step by its number of rows, and the number of drafts that gives the most tokens a second.

    The cost of r rows is `prior(r) * correction(r)` in units that follow the speed of the machine: a busy neighbour or
    a growing context slows all steps alike, and only what remains changes a correction. Threads may share a control:
    what one writes over another's is one measurement of many.
    """

    def __init__(self) -> None:
        self._corrections: dict[int, float] = {}  # rows -> measured cost / prior cost
        self._counts: dict[int, int] = {}
        self._unit = 0.0  # seconds of a step of cost 1, lately; 0 before the first step
        self._costs: list[float] = _costs(self._corrections)
        self._least: dict[int, float] = {}  # rows of others -> `least_chance`, by these costs

    @property
    def unit(self) -> float:
        """Seconds of a step of cost 1; 0 before the first step."""
        return self._unit

    def cost(self, rows: int) -> float:
        """The cost of a step of `rows` rows in all. Only ratios of costs mean something."""
        if rows <= ROWS:
            return self._costs[rows]
        return self._costs[ROWS] + (rows - ROWS) * (self._costs[ROWS] - self._costs[ROWS - 16]) / 16

    def observe(self, rows: int, seconds: float) -> None:
        """A step of `rows` rows in all, without a chunk of a prompt, took so long."""
        if not 0 < rows <= ROWS or seconds <= 0:
            return
        ratio = seconds / self._costs[rows]
        if not self._unit:
            self._unit = ratio
            return
        excess = min(max(ratio / self._unit, 0.5), 2.0)  # an interruption must not count as a cost of rows
        self._unit *= 1 + 0.2 * (excess - 1)
        seen = self._counts[rows] = self._counts.get(rows, 0) + 1
        known = self._corrections.get(rows, self._costs[rows] / PRIOR[rows])
        self._corrections[rows] = known * (1 + max(0.05, 0.5 / seen) * (excess - 1))
        if seen <= 8 or seen % 8 == 0:
            self._costs, self._least = _costs(self._corrections), {}

    def least_chance(self, others: int) -> float:
        """What the chance of each draft must be at least, for any number of them to pay beside `others` rows of other
        sequences; 1 and more: none pays.
        """
        found = self._least.get(others)
        if found is None:
            rows = others + 1
            found = min(
                rows * (self.cost(rows + count) / self.cost(rows) - 1) / count for count in range(1, MOST_DRAFTS + 1)
            )
            self._least[others] = found
        return found

    def count(self, record: DraftRecord, others: int, match: int, limit: int = MOST_DRAFTS) -> int:
        """How many drafts to verify of at most `limit`, the first of which rests on `match` tokens."""
        return self.plan(record, others, match, limit)[0]

    def plan(self, record: DraftRecord, others: int, match: int, limit: int, seconds: float = 0.0) -> tuple[int, float]:
        """As `best`, for `limit` guesses of one kind, the first of which rests on `match` tokens."""
        return self.best((record.chance(match + i) for i in range(limit)), others, seconds)

    def best(self, chances: Iterable[float], others: int, seconds: float = 0.0) -> tuple[int, float]:
        """(the number of drafts that gives the most tokens a cost, that many tokens a cost)

        `chances` are those of the guesses, each given that the ones before it are right. `others` are the rows of the
        other sequences of the step; each is taken to give one token, so that a draft must be worth the delay of the
        others too. `seconds` is what making one draft takes.
        """
        rows, reached, cost = others + 1, 1.0, self.cost
        tokens = float(rows)
        best, most = 0, tokens / cost(rows)
        making = seconds / self._unit if self._unit else 0.0
        for count, chance in enumerate(chances, 1):
            reached *= chance
            if reached < LEAST_CHANCE:
                break
            tokens += reached
            rate = tokens / (cost(rows + count) + count * making)
            if rate > most:
                best, most = count, rate
        return best, most


def _prior(rows: int) -> float:
    """The cost of `rows` rows before it is measured, in steps of one row; measured with SmolLM2 (q4a, AVX-512 VNNI)."""
    few = min(rows, 8) - 1
    return 1 + 0.08 * few + 0.01 * few * few + 0.25 * (rows - 1 - few)


def _costs(corrections: dict[int, float]) -> list[float]:
    """Cost by rows, 0 to ROWS: the prior, times a correction that is interpolated between the measured ones."""
    found = list(PRIOR)
    known = sorted(corrections)
    if not known:
        return found
    for rows in (*range(known[0]), *range(known[-1], ROWS + 1)):
        found[rows] *= corrections[known[0] if rows < known[0] else known[-1]]
    for below, above in pairwise(known):
        step = (corrections[above] - corrections[below]) / (above - below)
        for rows in range(below, above):
            found[rows] *= corrections[below] + (rows - below) * step
    return found


PRIOR = (0.0, *(_prior(rows) for rows in range(1, ROWS + 1)))
