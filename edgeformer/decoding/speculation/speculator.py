"""The drafts of one sequence from all sources: a grammar's forced tokens, lookup, a draft model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from edgeformer.decoding.speculation.control import DraftControl, DraftRecord
from edgeformer.decoding.speculation.draft_model import CHANCES, DraftModel, ModelDrafts
from edgeformer.decoding.speculation.drafts import MOST_DRAFTS, NOTHING, Proposal
from edgeformer.decoding.speculation.lookup import Lookup, RecentAnswers

FIRST_REST = 16  # steps without a draft model that does not pay; doubled each time, at most to LAST_REST
LAST_REST = 256
PROBE = 2  # drafts after a rest, to see whether it pays now


class Shape(Protocol):
    """The part of a constraint that drafts need."""

    def forced(self, limit: int) -> list[int]:
        """The tokens that must follow now, at most `limit`."""
        ...

    def valid(self, tokens: Sequence[int]) -> int:
        """How many of the tokens, from the first, are allowed in turn."""
        ...


@dataclass(frozen=True)
class Speculation:
    """What the sequences of one scheduler speculate with. Made once; `speculator` is called for each sequence."""

    control: DraftControl
    recent: RecentAnswers | None = None
    model: DraftModel | None = None
    lookup: bool = True

    def speculator(self, prompt: Sequence[int]) -> Speculator:
        """The drafts of a new sequence."""
        return Speculator(self, prompt)


class Speculator:
    """The drafts of one sequence. In each step: `propose`, then the model verifies, then `extend`.

    A proposal is compared with what came also when no draft of it was verified: so a kind of guess that does not pay
    is noticed when it begins to, at no cost. Only a draft model has to be tried for that, now and then.
    """

    def __init__(self, speculation: Speculation, prompt: Sequence[int]) -> None:
        self._control = speculation.control
        self._recent = speculation.recent
        self._lookup = Lookup(speculation.recent) if speculation.lookup else None
        self._model: ModelDrafts | None = speculation.model.drafts() if speculation.model else None
        self._prompt = prompt
        self._answer: list[int] = []
        self._records = DraftRecord(), DraftRecord(CHANCES)  # of lookup, of the draft model
        self._from_model = False
        self._forced = 0  # of the drafts of this step: they say nothing about a source
        self._guessed = NOTHING  # what came after them
        self._drafted = 0  # so many of these are drafts
        self._rest, self._next_rest = 0, FIRST_REST
        self.proposed = 0  # drafts that were verified, forced ones included
        self.accepted = 0

    def propose(self, others: int, room: int, shape: Shape | None = None) -> list[int]:
        """The drafts for the next step, at most `room`; `others` are the rows of the other sequences in it."""
        room = min(room, MOST_DRAFTS)
        forced = shape.forced(room) if shape is not None and room > 0 else []
        self._forced, self._drafted, self._guessed, self._from_model = len(forced), 0, NOTHING, False
        left = room - len(forced)
        if left > 0:
            self._guess(others, left, forced)
            if shape is not None and self._drafted:
                self._cut(forced, shape)
        return forced + self._guessed.tokens[: self._drafted]

    def extend(self, tokens: Sequence[int]) -> None:
        """The tokens that the step gave: the drafts that were right, and one more."""
        if not self._answer:
            self._begin()
        self._answer.extend(tokens)
        guessed, record = self._guessed, self._records[self._from_model]
        rest = tokens[self._forced :]
        right = 0
        while right < min(self._drafted, len(rest)) and guessed.tokens[right] == rest[right]:
            right += 1
        self.proposed += self._forced + self._drafted
        self.accepted += min(self._forced, len(tokens)) + right
        if self._drafted and rest:
            record.settle(guessed.match, min(self._drafted, max(right + 1, len(rest))), right)
        elif guessed.tokens and rest:
            record.learn(guessed.match, guessed.tokens[0] == rest[0])
        self._forced, self._drafted, self._guessed = 0, 0, NOTHING
        for drafts in (self._lookup, self._model):
            if drafts is not None:
                drafts.extend(tokens)

    def close(self) -> None:
        """The answer has ended: remember it for others."""
        if self._recent is not None and self._answer:
            self._recent.add(self._answer)

    def _begin(self) -> None:
        """The prompt is indexed after the first token came, not before: so it does not wait for this."""
        for drafts in (self._lookup, self._model):
            if drafts is not None:
                drafts.extend(self._prompt)
