"""The drafts of one sequence: forced tokens first, then guesses that the grammar allows; what a step teaches."""

from __future__ import annotations

import pytest

from edgeformer.decoding.constraints.habits import Habits
from edgeformer.decoding.speculation.control import FIRST, DraftControl, DraftRecord
from edgeformer.decoding.speculation.drafts import MOST_DRAFTS
from edgeformer.decoding.speculation.sequence_drafts import FORCED_CHANCES, SequenceDrafts

TEXT = list(range(10, 40))


def chances(record):
    return [record.chance(match) for match in FIRST]


class Grammar:
    """Forces some tokens from the beginning, and after them allows all but `refused`."""

    framed = 0

    def __init__(self, forced=(), refused=(), habits=None, replacements=None):
        self._forced, self._refused = list(forced), set(refused)
        self._habits, self.replacements = habits or {}, replacements or Habits()
        self._last = None

    def likely(self, limit):
        return self._forced[:limit]

    @property
    def habit(self):
        return self._habits.get(self._last, (-1, 0.0))

    def valid(self, tokens):
        return next((i for i, token in enumerate(tokens) if token in self._refused), len(tokens))

    def accept(self, token):
        assert self.valid([token]) == 1 and token == (self._forced or [token])[0]
        self._forced, self._last = self._forced[1:], token

    def fork(self):
        copy = Grammar(self._forced, self._refused, self._habits, self.replacements)
        copy._last = self._last
        return copy


@pytest.fixture
def drafts():
    return SequenceDrafts(DraftControl())


def test_forced_tokens_come_first_and_lookup_goes_on_behind_them(drafts):
    assert drafts.plan([*TEXT, 10, 11], 0, 15, Grammar(forced=[12, 13])) == 0
    assert drafts.drafts[:4] == [12, 13, 14, 15]


def test_what_is_forced_behind_a_guess_follows_it():
    """A value that ends, a habit, a key: each guess puts the grammar where it forces the next ones."""

    class Object(Grammar):
        def likely(self, limit):
            return {91: [50, 51], 51: [52]}.get(self._last, [])[:limit]

        def accept(self, token):
            self._last = token

        def fork(self):
            copy = Object([], self._refused, self._habits)
            copy._last = self._last
            return copy

    drafts = SequenceDrafts(DraftControl())
    drafts._control._costs = [1.0] * 65  # rows cost nothing
    drafts.plan([*TEXT, 10, 11, 12, 13], 0, 15, Object(refused=[16], habits={15: (90, 0.9), 90: (91, 0.9)}))
    assert drafts.drafts == [14, 15, 90, 91, 50, 51, 52]


def test_a_habit_is_weighed_against_what_is_forced_and_found():
    for chance, token in ((0.99, 90), (0.1, 12)):
        drafts, grammar = SequenceDrafts(DraftControl()), Grammar(forced=[12, 13], habits={None: (90, chance)})
        assert drafts._next(grammar, [], 4, 0)[0].token == token
        drafts, grammar = SequenceDrafts(DraftControl()), Grammar(habits={None: (90, chance)})
        drafts._lookup.extend([*TEXT, 10, 11])
        assert drafts._next(grammar, [], 4, 0)[0].token == token


def test_what_ends_a_copied_text_replaces_what_follows_it_there():
    drafts, grammar = SequenceDrafts(DraftControl()), Grammar(habits={70: (71, 0.9)})
    ids = [*TEXT, 60, 61, 62, 63, 15, 64, 10, 11, 12, 13]
    drafts.plan(ids, 0, 15, grammar)
    assert drafts.drafts[:2] == [14, 15]
    grammar._last = 70  # and behind it few tokens may follow
    ids += [14, 70]
    drafts.plan(ids, 0, 15, grammar)
    assert grammar.replacements.guess(15)[0] == 70
    grammar._last = 63
    drafts.plan([*ids, 60, 61, 62, 63], 0, 15, grammar)
    assert drafts.drafts[:2] == [70, 71]


def test_the_first_token_of_a_value_does_not_count_as_a_copy():
    drafts, grammar = SequenceDrafts(DraftControl()), Grammar()
    grammar.framed = 3
    drafts.plan([*TEXT, 10, 11], 0, 15, grammar)
    assert drafts.drafts == []
    before = drafts._lookup_record.chance(2)
    drafts.plan([*TEXT, 10, 11, 99], 0, 15, grammar)
    assert drafts._lookup_record.chance(2) == before


def test_forced_tokens_without_a_match_are_drafts(drafts):
    drafts.plan(TEXT, 0, 15, Grammar(forced=[90, 91]))
    assert drafts.drafts == [90, 91]


def test_guesses_are_cut_where_the_grammar_refuses(drafts):
    drafts.plan([*TEXT, 10, 11, 12, 13], 0, 15, Grammar(refused=[16]))
    assert drafts.drafts == [14, 15]


@pytest.mark.parametrize("room", [0, 1, 3, 100])
def test_drafts_have_room(drafts, room):
    drafts.plan([*TEXT, *TEXT[:-1]], 0, room, Grammar(forced=[39, 10, 11, 12]))
    assert len(drafts.drafts) <= min(room, MOST_DRAFTS)
    assert drafts.drafts[:4] == [39, 10, 11, 12][: min(room, 4)]


def test_a_step_teaches_about_each_kind_of_guess_up_to_the_first_wrong_one(drafts):
    ids, expected = [*TEXT, 10, 11], DraftRecord()
    drafts.plan(ids, 0, 15, Grammar(forced=[12, 13]))
    assert drafts.drafts[:4] == [12, 13, 14, 15]
    drafts.plan([*ids, 12, 13, 14, 99], 0, 15)
    expected.learn(4, True)
    expected.learn(5, False)
    assert chances(drafts._lookup_record) == chances(expected)
    expected = DraftRecord(FORCED_CHANCES)
    expected.learn(1, True)
    expected.learn(1, True)
    assert chances(drafts._forced_record) == chances(expected)


def test_an_answer_that_ends_in_its_drafts_says_nothing_about_the_rest(drafts):
    ids, expected = [*TEXT, *TEXT[:20]], DraftRecord()
    drafts.plan(ids, 0, 15)
    assert len(drafts.drafts) > 2
    drafts.plan([*ids, 30, 31], 0, 15)
    expected.learn(20, True)
    expected.learn(21, True)
    assert chances(drafts._lookup_record) == chances(expected)


def test_a_guess_that_was_no_draft_is_compared_too(drafts):
    ids = [*TEXT, 10]
    drafts._control._costs = [1.0 + 0.9 * rows for rows in range(65)]  # a chance of 0.47 is needed, these have 0.25
    drafts.plan(ids, 0, 15)
    assert drafts.drafts == []
    before = drafts._lookup_record.chance(1)
    drafts.plan([*ids, 11], 0, 15)
    assert drafts._lookup_record.chance(1) > before


def test_nothing_is_looked_up_while_nothing_can_pay(drafts):
    """Many sequences share the step; when fewer do, all tokens since then are known."""
    costs = drafts._control._costs
    drafts._control._costs = [2.0 * rows for rows in range(65)]  # a row costs what each costs
    ids = [*TEXT, 10]
    for token in (11, 12, 13):
        drafts.plan(ids, 15, 15)
        assert drafts.drafts == [] and drafts._seen == 0
        ids.append(token)
    drafts._control._costs, drafts._control._least = costs, {}
    drafts.plan(ids, 0, 15)
    assert drafts.drafts[:3] == [14, 15, 16]


class Rests:
    """A draft model whose guesses are never right."""

    seconds = 1e-4

    def extend(self, tokens):
        pass


def test_a_draft_model_that_does_not_pay_rests_longer_and_longer():
    drafts = SequenceDrafts(DraftControl(), model=Rests())
    drafts._control.observe(1, 1e-3)
    ids, tried = [1], []
    for step in range(600):
        count = drafts.plan(ids, 0, 15)
        if count:
            tried.append(step)
            drafts.take([5] * count)
        ids = [*ids, 1000 + step]
    gaps = [after - before for before, after in zip(tried[-3:], tried[-2:], strict=False)]
    assert len(tried) < 60
    assert gaps[0] >= 64


def test_the_source_with_more_tokens_a_cost_drafts():
    drafts = SequenceDrafts(DraftControl(), model=Rests())
    drafts._control.observe(1, 1e-3)
    assert drafts.plan([*TEXT, *TEXT[:20]], 0, 15) == 0  # a long match is better than a model
    assert drafts.drafts
    fresh = SequenceDrafts(DraftControl(), model=Rests())
    fresh._control.observe(1, 1e-3)
    count = fresh.plan(TEXT, 0, 15)
    assert count > 0
    fresh.take([7] * count)
    assert fresh.drafts == [7] * count
