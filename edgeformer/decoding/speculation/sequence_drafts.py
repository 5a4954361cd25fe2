"""The drafts of one sequence from all sources: what a grammar forces and answers to it share, lookup, a draft model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from edgeformer.decoding.constraints.constraint import Constraint
from edgeformer.decoding.speculation.control import DraftControl, DraftRecord
from edgeformer.decoding.speculation.draft_model import CHANCES, ModelDrafts
from edgeformer.decoding.speculation.drafts import MOST_DRAFTS
from edgeformer.decoding.speculation.lookup import Lookup, RecentAnswers

FIRST_REST = 16  # steps without a draft model that does not pay; doubled each time, at most to LAST_REST
LAST_REST = 256
PROBE = 2  # drafts after a rest, to see whether it pays now
# That a forced token is right: the grammar forces a text, and the model may write it in other tokens.
FORCED_CHANCES = (0.95,) * 6
# That the first token of a value is what lookup finds: its match is the key and punctuation, which say little.
VALUE_CHANCES = (0.05, 0.05, 0.1, 0.2, 0.4, 0.6)
MOST_CHANCE = 0.97  # that guesses are right for long
LEAST_REACHED = 0.02  # guesses that are reached more rarely are not looked for


class Guess(NamedTuple):
    """A guess of a token: the chance that it is right if those before it are, and who learns from what comes."""

    token: int
    chance: float
    record: DraftRecord | None
    match: int
    found: int = -1  # what lookup found here


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
        self._forced_record, self._value_record = DraftRecord(FORCED_CHANCES), DraftRecord(VALUE_CHANCES)
        self._seen = 0  # tokens of the sequence that the sources know
        self._guesses: list[Guess] = []  # of this step;
        self._drafted = 0  # so many of them are drafts
        self._rest, self._next_rest = 0, FIRST_REST

    def plan(self, ids: Sequence[int], others: int, room: int, shape: Constraint | None = None) -> int:
        """Decide on the drafts after `ids`, all tokens of the sequence; returns how many the draft model shall make.

        `others` are the rows of the other sequences in the step, `room` is the most drafts. If it is not 0, call
        `take` with what `model` made.
        """
        if not self._guesses and self._control.least_chance(others) > MOST_CHANCE:
            return 0  # whatever is found would not pay: many sequences share the step. `_settle` catches up later
        self._settle(ids, shape)
        room = min(room, MOST_DRAFTS)
        if room <= 0:
            return 0
        if shape is None:
            self._guesses = self._looked_up([], room)
        else:
            self._guesses = self._shaped(shape, room)
        self._drafted, rate = self._control.best((guess.chance for guess in self._guesses), others)
        if self._guesses and self._guesses[0].record is not self._lookup_record and self._drafted:
            return 0  # the draft model knows nothing of what is forced
        return self._model_count(others, room, rate)

    def take(self, tokens: list[int], shape: Constraint | None = None) -> None:
        """The guesses that the draft model made for this step."""
        if shape is not None and tokens:
            tokens = tokens[: shape.valid(tokens)]
        if tokens:
            record = self._model_record
            self._guesses = [Guess(token, record.chance(1 + i), record, 1 + i) for i, token in enumerate(tokens)]
            self._drafted = len(tokens)

    @property
    def drafts(self) -> list[int]:
        """The drafts of this step."""
        return [guess.token for guess in self._guesses[: self._drafted]]

    def close(self, answer: Sequence[int]) -> None:
        """The answer has ended: remember it for others."""
        if self._recent is not None:
            self._recent.add(answer)

    def _settle(self, ids: Sequence[int], shape: Constraint | None) -> None:
        """Learn from the tokens since the last step, up to the first wrong guess: what comes after was not tried.

        Where all drafts were right, the token behind them says something about the guess behind them too.
        """
        tokens = ids[self._seen :]
        for guess, token in zip(self._guesses, tokens, strict=False):
            is_right = guess.token == token
            if guess.record is not None:
                guess.record.learn(guess.match, is_right)
            if guess.found >= 0 and shape is not None:
                # A wrong guess was for the last token. It ends the copied text if the grammar leaves few choices then.
                ends = guess.record is None if is_right else shape.habit[1] > 0 or shape.likely(1) != []
                shape.replacements.learn(guess.found, token if ends else None)
            if not is_right:
                break
        self._seen = len(ids)
        self._guesses, self._drafted = [], 0
        self._lookup.extend(tokens)
        if self.model is not None:
            self.model.extend(tokens)

    def _looked_up(self, after: list[int], room: int, framed: int = 0) -> list[Guess]:
        """Guesses of lookup behind `after`. A match of the last `framed` tokens alone says little about a value."""
        tokens, match = self._lookup.propose(room, after)
        first = self._value_record if 0 < match <= framed else self._lookup_record
        records = [first] + [self._lookup_record] * (len(tokens) - 1)
        return [
            Guess(token, record.chance(match + place), record, match + place, token)
            for place, (token, record) in enumerate(zip(tokens, records, strict=False))
        ]

    def _shaped(self, shape: Constraint, room: int) -> list[Guess]:
        """Guesses that the grammar allows: in turn what it forces, the habit of its answers, and lookup.

        Behind each of them the grammar stands at another place, and may force the next tokens. So one step can write
        the end of a value, the next key and the punctuation around it.
        """
        guesses: list[Guess] = []
        ahead, framed, reached = shape, shape.framed, 1.0
        while len(guesses) < room and reached > LEAST_REACHED:
            found = self._next(ahead, [guess.token for guess in guesses], room - len(guesses), framed)
            found = found[: ahead.valid([guess.token for guess in found])]
            if not found:
                break
            if len(guesses) + len(found) < room:
                ahead = ahead.fork() if ahead is shape else ahead
                for guess in found:
                    ahead.accept(guess.token)
            for guess in found:
                reached *= guess.chance
            framed = framed + len(found) if found[0].found < 0 else 0
            guesses += found
        return guesses

    def _next(self, ahead: Constraint, after: list[int], room: int, framed: int) -> list[Guess]:
        """The guesses of the source with the best chance that its first one is right."""
        token, chance = ahead.habit
        forced, record = ahead.likely(room), self._forced_record
        if forced and (token == forced[0] or chance <= record.chance(1)):
            return [Guess(token, record.chance(1), record, 1) for token in forced]
        found = self._looked_up(after, room, framed)
        if chance and (not found or chance >= found[0].chance):
            return [Guess(token, chance, None, 0)]
        for place, guess in enumerate(found):
            token, chance = ahead.replacements.guess(guess.token)
            if chance > 0.5:  # the token says more than the length of the match
                return [*found[:place], Guess(token, chance, None, 0, guess.token)]
        return found

    def _model_count(self, others: int, room: int, rate: float) -> int:
        """How many drafts the draft model shall make: 0 if it gives fewer tokens than `rate`, those of lookup."""
        if self.model is None:
            return 0
        if self._rest > 0:
            self._rest -= 1
            return 0
        control, record = self._control, self._model_record
        count, own = control.plan(record, others, 1, room, seconds=self.model.seconds)
        if own > rate and count > 0:
            self._next_rest = FIRST_REST
            return count
        if self._drafted:
            return 0  # lookup is better now
        self._rest, self._next_rest = self._next_rest, min(2 * self._next_rest, LAST_REST)
        return min(PROBE, room)
