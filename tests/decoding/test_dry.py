"""DRY, compared with its author's definition written with plain loops; breakers, compared with texts."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeformer.decoding.dry import Dry, breaker_ids, by_first_token


def reference(ids, allowed, breakers, longest=50):
    """token -> length of the longest repetition that it would prolong (p-e-w, text-generation-webui PR 5677).

    `breakers` are sequences of tokens. A repetition holds no token up to the end of the last breaker.
    """
    ends = [
        end
        for end in range(1, len(ids) + 1)
        if any(ids[max(0, end - len(breaker)) : end] == list(breaker) for breaker in breakers)
    ]
    # llama.cpp takes, of the breakers that begin last, the longest.
    starts = [
        (start, max(len(b) for b in breakers if ids[start : start + len(b)] == list(b)))
        for start in range(len(ids))
        if any(ids[start : start + len(b)] == list(b) for b in breakers)
    ]
    unbroken = len(ids) - (starts[-1][0] + starts[-1][1]) if starts else len(ids)
    assert bool(ends) == bool(starts)
    found = {}
    for place in range(len(ids) - 1):
        length = 0
        while length < min(longest, unbroken, place + 1) and ids[place - length] == ids[len(ids) - 1 - length]:
            length += 1
        token = ids[place + 1]
        if length >= max(allowed, 1) and (token,) not in {tuple(b) for b in breakers}:
            found[token] = max(length, found.get(token, 0))
    return found


def dry(allowed=2, breakers=(), multiplier=0.8, base=1.75, last=-1):
    return Dry(multiplier, base, allowed, last, by_first_token(tuple(map(tuple, breakers))))


@given(
    st.lists(st.integers(0, 3), max_size=90),
    st.integers(1, 6),
    st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=3), max_size=3),
)
@settings(max_examples=500, deadline=None)
def test_repetitions_are_those_of_the_definition(ids, allowed, breakers):
    found = dict(dry(allowed, breakers).repetitions(np.array(ids, np.int64)))
    assert found == reference(ids, allowed, breakers)


@pytest.mark.parametrize("length", [3, 49, 50, 51, 300, 2000])
def test_long_repetitions_count_up_to_fifty_tokens(length):
    rng = np.random.default_rng(length)
    for ids in ([7] * length, [*rng.integers(0, 900, length).tolist()] * 2, [1, 2, 3] * length):
        assert dict(dry().repetitions(np.array(ids))) == reference(ids, 2, ())


def test_the_penalty_grows_with_the_length():
    ids = np.array([1, 2, 3, 4, 9, 2, 3, 5, 8, 1, 2, 3])  # 4 would prolong `1 2 3`, 5 would prolong `2 3`
    scores = np.zeros(12, np.float32)
    found = dry(allowed=2, multiplier=0.8, base=1.75)(ids, scores)
    assert found[4] == np.float32(-0.8 * 1.75) and found[5] == np.float32(-0.8) and np.count_nonzero(found) == 2
    found = dry(allowed=3)(ids, np.zeros(12, np.float32))
    assert found[4] == np.float32(-0.8) and np.count_nonzero(found) == 1


def test_penalties_never_overflow():
    ids = np.array([5] * 200)
    found = dry(base=1e9)(ids, np.zeros(8, np.float32))
    assert np.isfinite(found).all() and found[5] < -1e38


def test_only_the_last_tokens_are_looked_at():
    ids = np.array([1, 2, 3, 0, 0, 0, 1, 2])
    assert dry(last=8)(ids, np.zeros(9, np.float32))[3] < 0
    assert dry(last=7)(ids, np.zeros(9, np.float32))[3] == 0, "the first token of the earlier `1 2` is out of sight"
    assert not dry(last=0)(ids, np.zeros(9, np.float32)).any()


def test_a_breaker_ends_repetitions_and_is_never_penalized():
    ids = [1, 2, 7, 3, 4, 9, 1, 2, 7, 3]
    assert dict(dry(allowed=2).repetitions(np.array(ids))) == {4: 4}
    assert dict(dry(allowed=1, breakers=[[7]]).repetitions(np.array(ids))) == {4: 1}
    assert dict(dry(allowed=2, breakers=[[7]]).repetitions(np.array(ids))) == {}
    assert dict(dry(allowed=2, breakers=[[2, 7]]).repetitions(np.array(ids))) == {}
    assert dict(dry(allowed=2, breakers=[[7, 2]]).repetitions(np.array(ids))) == {4: 4}
    assert dict(dry(allowed=2, breakers=[[4]]).repetitions(np.array(ids))) == {}, "4 is a breaker itself"
    assert dict(dry(allowed=2, breakers=[[4, 5]]).repetitions(np.array(ids))) == {4: 4}, "4 is half of one"


VOCABULARY = [
    b"a",
    b"\n",
    b":",
    b"a:",
    b"::",
    b"\n\n a",
    b"STOP",
    b"ST",
    b"OP",
    b"xST",
    b"S",
    b"T",
    b"P",
    b"TOP",
    b"\xe3",
    b"",
]


def encode(text):
    """The longest tokens first."""
    ids = []
    data = text.encode()
    while data:
        token = max(
            (i for i, piece in enumerate(VOCABULARY) if piece and data.startswith(piece)),
            key=lambda i: len(VOCABULARY[i]),
        )
        ids.append(token)
        data = data[len(VOCABULARY[token]) :]
    return ids


def test_every_token_that_holds_a_breaker_is_one():
    assert set(breaker_ids(["\n"], VOCABULARY, encode)) == {(1,), (5,)}
    assert set(breaker_ids([":"], VOCABULARY, encode)) == {(2,), (3,), (4,)}
    assert set(breaker_ids(["::"], VOCABULARY, encode)) == {(4,), (2, 2), (3, 2)}


def test_a_breaker_in_several_tokens_is_found_in_all_its_parts():
    found = set(breaker_ids(["STOP"], VOCABULARY, encode))
    assert found == {(6,), (7, 8), (9, 8), (10, 13)}
    for first, *tail in found - {(6,)}:
        text = VOCABULARY[first] + b"".join(VOCABULARY[token] for token in tail)
        assert text.endswith(b"STOP")


def test_a_breaker_cut_within_a_character_is_left_out():
    assert breaker_ids(["\N{IDEOGRAPHIC FULL STOP}"], VOCABULARY, encode) == ()
