"""Prompt lookup against a plain search of the whole sequence; the store of recent answers against its limits."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeformer.decoding.speculation.drafts import LONGEST
from edgeformer.decoding.speculation.lookup import ORDERS, STORE_ORDER, Lookup, RecentAnswers


def occurrences(tokens, length):
    """Positions after which the last `length` tokens occurred before, each with a token there; found by comparing."""
    last = tokens[len(tokens) - length :]
    return [at for at in range(length, len(tokens)) if tokens[at - length : at] == last]


def longest_suffix(tokens):
    """The length of the longest suffix that occurred before, at most LONGEST."""
    return max((n for n in range(1, min(LONGEST, len(tokens) - 1) + 1) if occurrences(tokens, n)), default=0)


def continued(tokens, at, count):
    """`count` tokens from position `at` on, as if the guesses themselves followed the sequence."""
    made = list(tokens)
    for i in range(count):
        made.append(made[at + i])
    return made[len(tokens) :]


small = st.lists(st.integers(0, 3), min_size=1, max_size=60)
pieces = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=5), min_size=1, max_size=20)


@settings(max_examples=300, deadline=None)
@given(prompt=small, steps=pieces, count=st.integers(1, 15))
def test_guesses_continue_an_earlier_match_of_the_length_that_is_said(prompt, steps, count):
    lookup, tokens = Lookup(), []
    for step in [prompt, *steps]:
        lookup.extend(step)
        tokens += step
        found = lookup.propose(count)
        longest = longest_suffix(tokens)
        assert bool(found.tokens) == (longest > 0)
        if not found.tokens:
            continue
        places = [at for at in occurrences(tokens, found.match) if continued(tokens, at, count) == found.tokens]
        assert places, "no occurrence of so long a match is followed by these tokens"
        assert found.match <= longest
        # as long as a suffix tree would find it, up to the longest n-gram of the index
        assert found.match >= next(order for order in ORDERS if order <= longest)


@settings(max_examples=200, deadline=None)
@given(prompt=small)
def test_a_new_match_is_the_most_recent_one(prompt):
    lookup = Lookup()
    lookup.extend(prompt)
    longest = longest_suffix(prompt)
    if longest:
        order = next(order for order in ORDERS if order <= longest)
        assert lookup.propose(8).tokens == continued(prompt, occurrences(prompt, order)[-1], 8)


def test_a_match_goes_on_although_a_more_recent_one_is_shorter():
    lookup = Lookup()
    lookup.extend([1, 2, 3, 4, 5, 6, 7, 8, 9, 3, 4, 5, 6, 0, 1, 2])
    for token in (3, 4, 5, 6):
        assert lookup.propose(1).tokens == [token]
        lookup.extend([token])
    assert lookup.propose(3) == ([7, 8, 9], 6)


@settings(max_examples=200, deadline=None)
@given(prompt=small, after=st.lists(st.integers(0, 3), min_size=1, max_size=6), count=st.integers(1, 8))
def test_a_proposal_after_other_tokens_changes_nothing(prompt, after, count):
    lookup = Lookup()
    lookup.extend(prompt)
    before = lookup.propose(count)
    found = lookup.propose(count, after)
    whole = prompt + after
    if found.tokens:
        assert occurrences(whole, min(found.match, len(whole) - 1))
        assert any(whole[at : at + len(found.tokens)] == found.tokens for at in occurrences(whole, found.match))
    assert lookup.propose(count) == before


def test_extending_at_once_is_as_extending_one_by_one():
    rng = random.Random(1)
    tokens = [rng.randrange(6) for _ in range(500)]
    one, many = Lookup(), Lookup()
    for token in tokens:
        one.extend([token])
    many.extend(tokens)
    assert {n: dict(index) for n, index in one._index.items()} == {n: dict(index) for n, index in many._index.items()}


def test_a_recent_answer_gives_guesses_where_it_matches_longer():
    recent = RecentAnswers()
    recent.add([50, 51, 52, 53, 54, 55])
    lookup = Lookup(recent)
    lookup.extend([1, 53, 9, 51, 52, 53])
    assert lookup.propose(5) == ([54, 55], 3)
    lookup.extend([54])
    assert lookup.propose(5) == ([55], 4)
    lookup.extend([1])
    assert lookup.propose(2) == ([53, 9], 1)


def test_the_sequence_goes_before_a_recent_answer_with_an_equal_match():
    recent = RecentAnswers()
    recent.add([1, 2, 3, 9])
    lookup = Lookup(recent)
    lookup.extend([1, 2, 3, 4, 1, 2, 3])
    assert lookup.propose(1).tokens == [4]


@pytest.mark.parametrize("limit", [10, 50, 1000])
def test_the_store_keeps_its_limit_and_indexes_only_what_it_holds(limit):
    rng = random.Random(limit)
    store = RecentAnswers(limit)
    for _ in range(200):
        store.add([rng.randrange(5) for _ in range(rng.randrange(1, 40))])
        assert store.tokens == sum(map(len, store._answers.values())) <= limit
        for ngram, (number, place) in store._index.items():
            assert tuple(store._answers[number][place - STORE_ORDER : place]) == ngram
            assert place < len(store._answers[number])
    assert not RecentAnswers(limit)._index


def test_the_least_recently_used_answer_goes_first():
    store = RecentAnswers(12)
    for start in (10, 20, 30):
        store.add(range(start, start + 4))
    assert store.find([10, 11, 12])[0]
    store.add(range(40, 44))
    assert store.find([10, 11, 12])[0]
    assert not store.find([20, 21, 22])[0]


def test_an_answer_longer_than_the_store_keeps_its_end():
    store = RecentAnswers(6)
    store.add(range(100))
    assert store.tokens == 6
    assert store.find([95, 96, 97]) == ([94, 95, 96, 97, 98, 99], 4)
