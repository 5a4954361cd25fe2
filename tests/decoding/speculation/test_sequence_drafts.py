"""The drafts of one sequence: forced tokens first, then guesses that the grammar allows; what a step teaches."""

from __future__ import annotations

import pytest

from edgeformer.decoding.speculation.control import DraftControl
from edgeformer.decoding.speculation.drafts import MOST_DRAFTS, Proposal
from edgeformer.decoding.speculation.sequence_drafts import SequenceDrafts

TEXT = list(range(10, 40))


class Grammar:
    """Forces some tokens, and after them allows all but `refused`."""

    def __init__(self, forced=(), refused=()):
        self._forced, self._refused = list(forced), set(refused)

    def forced(self, limit):
        return self._forced[:limit]

    def valid(self, tokens):
        return next((i for i, token in enumerate(tokens) if token in self._refused), len(tokens))


@pytest.fixture
def drafts():
    return SequenceDrafts(DraftControl())


def test_forced_tokens_come_first_and_lookup_goes_on_behind_them(drafts):
    assert drafts.plan([*TEXT, 10, 11], 0, 15, Grammar(forced=[12, 13])) == 0
    assert drafts.drafts[:4] == [12, 13, 14, 15]
    assert drafts.forced == [12, 13]


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


def test_a_step_teaches_about_guesses_and_not_about_forced_tokens(drafts):
    record = drafts._lookup_record
    ids = [*TEXT, 10, 11]
    drafts.plan(ids, 0, 15, Grammar(forced=[12, 13]))
    guessed = drafts.drafts[2:]
    drafts.plan([*ids, 12, 13, 14, 99], 0, 15)
    assert (record.proposed, record.accepted) == (len(guessed), 1)


def test_an_answer_that_ends_in_its_drafts_says_nothing_about_the_rest(drafts):
    record = drafts._lookup_record
    ids = [*TEXT, *TEXT[:20]]
    drafts.plan(ids, 0, 15)
    assert len(drafts.drafts) > 2
    drafts.plan([*ids, 30, 31], 0, 15)
    assert (record.proposed, record.accepted) == (2, 2)


def test_a_guess_that_was_no_draft_is_compared_too(drafts):
    ids = [*TEXT, 10]
    drafts._control._costs = [100.0**rows for rows in range(65)]  # nothing pays
    drafts.plan(ids, 0, 15)
    assert drafts.drafts == []
    before = drafts._lookup_record.chance(1)
    drafts.plan([*ids, 11], 0, 15)
    assert drafts._lookup_record.chance(1) > before


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
    assert fresh._guessed == Proposal([7] * count, 1)
