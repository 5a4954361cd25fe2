"""Habits: against counts of a whole history with the same weights, and what a constraint learns from an answer."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeformer.decoding.constraints.habits import DECAY, MOST_KEYS, Habits


@given(st.lists(st.sampled_from([5, 6, None]), min_size=1, max_size=60))
def test_the_chance_is_the_weighted_share_of_the_known_follower(history):
    habits = Habits()
    for follower in history:
        habits.learn(1, follower)
    known = next((i for i, follower in enumerate(history) if follower is not None), None)
    token, chance = habits.guess(1)
    if known is None:
        assert chance == 0
        return
    rest = history[known:]
    weights = [DECAY ** (len(rest) - 1 - i) for i in range(len(rest))]
    share = sum(w for w, follower in zip(weights, rest, strict=True) if follower == token) / (sum(weights) + 0.5)
    # One that replaced another begins with a weight of 1, whatever it had before.
    assert chance <= share + 1e-9
    if set(rest) <= {token, None}:
        assert chance == pytest.approx(share)


def test_a_new_habit_replaces_the_old_one():
    habits = Habits()
    for _ in range(50):
        habits.learn(1, 5)
    for _ in range(50):
        habits.learn(1, 6)
    token, chance = habits.guess(1)
    assert token == 6 and chance > 0.9


def test_memory_is_bounded():
    habits = Habits()
    for token in range(2 * MOST_KEYS):
        habits.learn(token, 0)
    assert sum(habits.guess(token)[1] > 0 for token in range(2 * MOST_KEYS)) == MOST_KEYS


def written(constraint, tokenizer, text):
    """Writes `text` as `Sequence` does, and returns the tokens that a habit or a forced text guessed, with these."""
    import numpy as np

    guessed = []
    for token in tokenizer.encode(text):
        habit, chance = constraint.habit
        guessed.append((constraint.likely(1) or [habit if chance else None])[0] == token)
        constraint.apply(np.zeros(tokenizer.size, np.float32))
        constraint.accept(token)
    return guessed


def test_the_second_answer_to_a_schema_knows_the_spaces_of_the_first():
    pytest.importorskip("llguidance")
    pytest.importorskip("transformers")
    from support.json_schema_suite import letters

    from edgeformer.decoding.constraints import ConstraintSpec, compile_constraint

    tokenizer = letters()
    schema = {
        "type": "object",
        "properties": {"first": {"type": "string"}, "second": {"type": "string"}},
        "required": ["first", "second"],
        "additionalProperties": False,
        "title": "of this test alone",
    }
    grammar = compile_constraint(tokenizer, (0,), tokenizer.size, ConstraintSpec.of(json_schema=schema))
    answers = [json.dumps({"first": a, "second": b}) for a, b in (("xy", "z"), ("uv", "wxyz"))]
    cold, warm = (sum(written(grammar.start(), tokenizer, answer)) for answer in answers)
    frame = len(tokenizer.encode(json.dumps({"first": "", "second": ""})))
    assert cold < warm
    assert warm >= frame - 4  # not the ends of the two texts


def test_a_copy_that_runs_ahead_learns_nothing():
    pytest.importorskip("llguidance")
    pytest.importorskip("transformers")
    from support.json_schema_suite import letters

    from edgeformer.decoding.constraints import ConstraintSpec, compile_constraint

    tokenizer = letters()
    grammar = compile_constraint(tokenizer, (0,), tokenizer.size, ConstraintSpec.of(regex="a( b|b|, c)*d"))
    ahead = grammar.start().fork()
    for token in tokenizer.encode("a b b"):
        ahead.accept(token)
    assert all(grammar.followers.guess(token)[1] == 0 for token in range(-1, tokenizer.size))
