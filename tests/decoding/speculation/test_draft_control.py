"""The number of drafts against a search of all numbers; measured costs against simulated machines."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeformer.decoding.speculation.control import FIRST, KINDS, LEAST_CHANCE, ROWS, DraftControl, DraftRecord
from edgeformer.decoding.speculation.drafts import LONGEST, MOST_DRAFTS


def trained(chances):
    """A record that has seen many guesses of each kind, right with these chances."""
    record = DraftRecord(chances)
    for kind, chance in enumerate(chances):
        assert record.chance(FIRST[kind]) == pytest.approx(chance)
    return record


def measured(cost, steps=4000, seed=0, slow=lambda step: 1.0):
    """A control that has seen steps of 1 to 16 rows that take `cost(rows)` ms, on a machine of changing speed."""
    rng, control = random.Random(seed), DraftControl()
    for step in range(steps):
        rows = rng.randint(1, 16)
        control.observe(rows, cost(rows) * 1e-3 * slow(step) * rng.uniform(0.95, 1.05))
    return control


def expected(chances, match, others, drafts, cost):
    """Tokens a cost with so many drafts, by adding the chance of each number of right ones."""
    reached, tokens = 1.0, 1.0 + others
    for i in range(drafts):
        reached *= chances[sum(first <= match + i for first in FIRST) - 1]
        tokens += reached
    return tokens / cost(others + 1 + drafts)


COSTS = {
    "steps of 4": lambda rows: 2.0 + 1.0 * -(-rows // 4),
    "flat": lambda rows: 3.0 + 0.01 * rows,
    "linear": lambda rows: 1.0 * rows,
    "few are cheap": lambda rows: 2.4 + 0.1 * rows + (0.6 * (rows - 8) if rows > 8 else 0),
}
chances = st.lists(st.floats(0.06, 0.99), min_size=len(FIRST), max_size=len(FIRST))


@settings(max_examples=150, deadline=None)
@given(chances=chances, match=st.integers(1, LONGEST), others=st.integers(0, 10), limit=st.integers(0, MOST_DRAFTS))
@pytest.mark.parametrize("cost", COSTS)
def test_the_number_of_drafts_is_the_best_of_all(cost, chances, match, others, limit):
    control = DraftControl()
    control._costs = [0.0, *(COSTS[cost](rows) for rows in range(1, ROWS + 1))]
    found = control.count(trained(chances), others, match, limit)
    rates = [expected(chances, match, others, k, COSTS[cost]) for k in range(limit + 1)]
    # The search ends where a draft would be reached too rarely: what it loses is less than LEAST_CHANCE a draft.
    assert rates[found] >= max(rates) * (1 - LEAST_CHANCE * MOST_DRAFTS)
    assert rates[found] >= rates[0]
    if max(chances) <= control.least_chance(others):
        assert found == 0


@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("slow", [lambda _: 1.0, lambda step: 1.0 + step / 2000, lambda step: 1 + step // 500 % 2])
def test_measured_costs_are_the_machines_whatever_its_speed(cost, slow):
    control = measured(COSTS[cost], slow=slow)
    for rows in range(1, 17):
        assert control.cost(rows) / control.cost(1) == pytest.approx(COSTS[cost](rows) / COSTS[cost](1), rel=0.12)


def test_a_cost_between_measured_ones_is_interpolated():
    control = DraftControl()
    for _ in range(500):
        for rows, seconds in ((1, 1.0), (4, 1.5), (12, 3.0)):
            control.observe(rows, seconds)
    assert control.cost(4) / control.cost(1) == pytest.approx(1.5, rel=0.1)
    assert control.cost(4) < control.cost(7) < control.cost(12)
    assert control.cost(200) > control.cost(ROWS) > control.cost(12)


def test_an_interruption_is_no_cost_of_rows():
    control = measured(COSTS["flat"])
    before = control.cost(5)
    control.observe(5, 10.0)
    assert control.cost(5) == pytest.approx(before, rel=0.06)


def test_nothing_pays_where_rows_cost_as_much_as_steps():
    control = measured(lambda rows: 3.0 * rows)
    assert control.count(DraftRecord(), 0, 1) == 0
    assert control.count(DraftRecord(), 0, LONGEST) == 0


def test_drafts_must_be_worth_the_delay_of_the_others():
    control = DraftControl()
    record = trained([0.4] * len(FIRST))
    alone, beside = control.count(record, 0, 1), control.count(record, 15, 1)
    assert alone > beside


def test_a_loser_is_switched_off_and_on_again_when_its_guesses_are_right():
    control, record = DraftControl(), DraftRecord()
    assert control.count(record, 0, 1) > 0
    steps = 0
    while control.count(record, 0, 1):
        record.learn(1, False)
        steps += 1
        assert steps < 60
    for _ in range(40):
        record.learn(1, True)  # not drafted, but compared
    assert control.count(record, 0, 1) > 0


def test_every_guess_has_a_kind():
    assert len(KINDS) > LONGEST + MOST_DRAFTS - 1


def test_a_recent_window_forgets_the_beginning():
    record = DraftRecord()
    for _ in range(500):
        record.learn(20, True)
    for _ in range(60):
        record.learn(20, False)
    assert record.chance(20) < 0.65
