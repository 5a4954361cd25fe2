"""The drafts of one sequence from all sources: a grammar's forced tokens, lookup, a draft model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from edgeformer.decoding.speculation.control import DraftControl, DraftRecord
from edgeformer.decoding.speculation.draft_model import CHANCES, ModelDrafts
from edgeformer.decoding.speculation.drafts import MOST_DRAFTS, NOTHING, Proposal
from edgeformer.decoding.speculation.lookup import Lookup, RecentAnswers

FIRST_REST = 16  # steps without a draft model that does not pay; doubled each time, at most to LAST_REST
LAST_REST = 256
PROBE = 2  # drafts after a rest, to see whether it pays now
# That a forced token is right: the grammar forces a text, and the model may write it in other tokens.
FORCED_CHANCES = (0.95,) * 6


class Shape(Protocol):
    """The part of a constraint that drafts need."""

    def forced(self, limit: int) -> list[int]:
        """The tokens that must follow now, at most `limit`."""
        ...

    def valid(self, tokens: Sequence[int]) -> int:
        """How many of the tokens, from the first, are allowed in turn."""
        ...


class SequenceDrafts:
    """The drafts of one sequence. In each step: `plan`, then `drafts`; the next `plan` sees what became of them.

    A guess of lookup is compared with what came also when it was not drafted: so a kind of guess that does not pay is
    tried again at no cost. A draft model has to run for that; one that does not pay rests, and is probed now and then.
    """

    def __init__(
        self, control: DraftControl, recent: RecentAnswers | None = None, model: ModelDrafts | None = None
    ) -> None:
        self.model = model
        self._control = control
        self._recent = recent
        self._lookup = Lookup(recent)
        self._lookup_record, self._model_record = DraftRecord(), DraftRecord(CHANCES)
        self._forced_record = DraftRecord(FORCED_CHANCES)
        self._seen = 0  # tokens of the sequence that the sources know
        self._forced: list[int] = []  # the drafts of this step: these first,
        self._guessed: Proposal = NOTHING  # then the first of these,
        self._drafted = 0  # so many
        self._is_model = False  # who guessed
        self._rest, self._next_rest = 0, FIRST_REST

    def plan(self, ids: Sequence[int], others: int, room: int, shape: Shape | None = None) -> int:
        """Decide on the drafts after `ids`, all tokens of the sequence; returns how many the draft model shall make.

        `others` are the rows of the other sequences in the step, `room` is the most drafts. If it is not 0, call
        `take` with what `model` made.
        """
        self._settle(ids)
        room = min(room, MOST_DRAFTS)
        control, record = self._control, self._lookup_record
        forced = shape.forced(room) if shape is not None and room > 0 else []
        certain = control.count(self._forced_record, others, 1, len(forced)) if forced else 0
        self._forced = forced[:certain]
        left = room - certain
        if left <= 0 or certain < len(forced):
            return 0
        guessed = self._lookup.propose(left, forced)
        if shape is not None and guessed.tokens:
            guessed = self._valid(guessed, shape)
        count, rate = control.plan(record, others, guessed.match, len(guessed.tokens), certain=certain)
        self._guessed, self._drafted = guessed, count
        return self._model_count(others, left, rate, certain)

    def take(self, tokens: list[int], shape: Shape | None = None) -> None:
        """The guesses that the draft model made for this step."""
        guessed = Proposal(tokens, 1)
        if shape is not None and tokens:
            guessed = self._valid(guessed, shape)
        if guessed.tokens:
            self._guessed, self._drafted, self._is_model = guessed, len(guessed.tokens), True

    @property
    def drafts(self) -> list[int]:
        """The drafts of this step."""
        return self._forced + self._guessed.tokens[: self._drafted]

    @property
    def forced(self) -> list[int]:
        """Of these, the ones that a grammar forces, which come first."""
        return self._forced

    def close(self, answer: Sequence[int]) -> None:
        """The answer has ended: remember it for others."""
        if self._recent is not None:
            self._recent.add(answer)

    def _settle(self, ids: Sequence[int]) -> None:
        """Learn from the tokens since the last step."""
        tokens = ids[self._seen :]
        forced, guessed = self._forced, self._guessed
        if forced:
            _count(self._forced_record, Proposal(forced, 1), len(forced), tokens)
        rest = tokens[len(forced) :] if tokens[: len(forced)] == forced else []
        record = self._model_record if self._is_model else self._lookup_record
        if guessed.tokens and rest:
            if self._drafted:
                _count(record, guessed, self._drafted, rest)
            else:
                record.learn(guessed.match, guessed.tokens[0] == rest[0])
        self._seen = len(ids)
        self._forced, self._guessed, self._drafted, self._is_model = [], NOTHING, 0, False
        self._lookup.extend(tokens)
        if self.model is not None:
            self.model.extend(tokens)

    def _valid(self, guessed: Proposal, shape: Shape) -> Proposal:
        tokens = guessed.tokens[: shape.valid(self._forced + guessed.tokens) - len(self._forced)]
        return Proposal(tokens, guessed.match) if tokens else NOTHING

    def _model_count(self, others: int, room: int, rate: float, certain: int) -> int:
        """How many drafts the draft model shall make: 0 if it gives fewer tokens than `rate`, those of lookup."""
        if self.model is None:
            return 0
        if self._rest > 0:
            self._rest -= 1
            return 0
        control, record = self._control, self._model_record
        count, own = control.plan(record, others, 1, room, seconds=self.model.seconds, certain=certain)
        if own > rate and count > 0:
            self._next_rest = FIRST_REST
            return count
        if self._drafted:
            return 0  # lookup is better now
        self._rest, self._next_rest = self._next_rest, min(2 * self._next_rest, LAST_REST)
        return min(PROBE, room)


def _count(record: DraftRecord, guessed: Proposal, drafted: int, tokens: Sequence[int]) -> None:
    """Count the first `drafted` guesses, against the `tokens` that came."""
    right = 0
    while right < min(drafted, len(tokens)) and guessed.tokens[right] == tokens[right]:
        right += 1
    record.settle(guessed.match, drafted if right < len(tokens) else right, right)  # what is behind an end is not tried
