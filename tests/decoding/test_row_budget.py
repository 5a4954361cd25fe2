"""How many rows of prompts run beside sequences that decode."""

from __future__ import annotations

from edgeformer.decoding.row_budget import REMEASURED, SMALLEST, RowBudget


def test_a_long_prompt_takes_small_bites_beside_others_but_not_alone():
    budget = RowBudget(512, stretch=2.0)
    assert budget.prompt_rows(0, 1) == 512
    assert budget.prompt_rows(7, 1) == 0  # the step without prompts is measured first
    for _ in range(5):
        budget.observe(7, 0, 0.004)
    assert budget.prompt_rows(7, 1) == SMALLEST  # the cost of a prompt's row is unknown
    for _ in range(REMEASURED - 1):  # it is 0.1 ms: 40 of them stretch the step of 4 ms to 8 ms
        rows = budget.prompt_rows(7, 1)
        budget.observe(7, rows, 0.004 + rows * 1e-4)
    assert 32 <= budget.prompt_rows(7, 1) <= 40
    assert budget.prompt_rows(0, 1) == 512
    assert RowBudget(512, stretch=None).prompt_rows(7, 1) == 505


def test_prompts_have_more_time_the_more_of_them_wait():
    budget = RowBudget(512, stretch=2.0)
    budget.observe(2, 0, 0.004)
    budget.observe(0, 500, 0.05)  # 0.1 ms a row
    rows = [budget.prompt_rows(2, prompts) for prompts in (1, 2, 4, 8, 40)]
    assert rows == [40, 320, 510, 510, 510]
    budget.observe(14, 0, 0.004)
    rows = [budget.prompt_rows(14, prompts) for prompts in (1, 2, 3, 4)]
    assert rows == [40, 44, 88, 136]  # of 1, 8/7, 16/7 and 24/7 steps without prompts


def test_the_step_without_prompts_is_measured_again_and_interruptions_do_not_count():
    budget = RowBudget(512, stretch=2.0)
    budget.observe(0, 500, 0.05)
    for seconds in (0.004, 0.4):
        budget.observe(2, 0, seconds)
    for _ in range(REMEASURED):
        assert budget.prompt_rows(2, 1) == 40
        budget.observe(2, 40, 0.008)
    assert budget.prompt_rows(2, 1) == 0 and budget.prompt_rows(1, 1) == 0
