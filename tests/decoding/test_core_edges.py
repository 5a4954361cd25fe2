"""Edges of the decoding core: beginnings that ran before, full contexts, arguments of odd types, abandoned answers."""

from __future__ import annotations

import numpy as np
import pytest

from edgeformer.decoding.scheduler import SchedulerOptions
from edgeformer.errors import ContextError, EdgeformerError, InputError
from edgeformer.model import load

PROMPT = [5, 17, 90, 200, 31, 8, 44, 101]
LONG = [int(number) for number in np.random.default_rng(1).integers(3, 299, 200)]
SHORT = {"max_new_tokens": 4, "ignore_eos": True}


@pytest.fixture(scope="module")
def model(bundles):
    return load(bundles / "q8", "native", threads=1)


def _log_probabilities(model, ids):
    """Of each token of `ids` but the first, from the logits of all at once."""
    logits = model.logits(ids).astype(np.float64)[:-1]
    shifted = logits - logits.max(1, keepdims=True)
    return (shifted - np.log(np.exp(shifted).sum(1, keepdims=True)))[np.arange(len(ids) - 1), ids[1:]]


def _check_prompt_logprobs(model, result, ids):
    assert [one.id for one in result.prompt_logprobs] == ids
    assert result.prompt_logprobs[0].logprob is None
    found = [one.logprob for one in result.prompt_logprobs[1:]]
    np.testing.assert_allclose(found, _log_probabilities(model, ids), atol=1e-4)


# ------------------------------------------------------------------------------------- log probabilities of the prompt


def test_prompt_logprobs_hold_all_tokens_of_a_cached_beginning(model):
    model.generate(LONG, **SHORT)
    assert model.generate(LONG, **SHORT).cached_tokens == 128  # or this test shows nothing
    result = model.generate(LONG, prompt_logprobs=0, **SHORT)
    assert result.cached_tokens == 0
    _check_prompt_logprobs(model, result, LONG)


def test_prompt_logprobs_hold_all_tokens_that_a_session_knows(model):
    session = model.session()
    model.generate(PROMPT, session=session, **SHORT)
    _check_prompt_logprobs(model, model.generate(PROMPT, session=session, prompt_logprobs=0, **SHORT), PROMPT)
    assert model.generate(PROMPT, session=session, **SHORT).cached_tokens == len(PROMPT) - 1


def test_an_answer_that_takes_over_a_prompt_takes_over_its_logprobs(model):
    generator = model._task.generator
    scheduler = generator.scheduler(SchedulerOptions(max_sequences=2, token_budget=3, stretch=None))
    first, second = group = generator.jobs(model._task.call(PROMPT, {"n": 2, "prompt_logprobs": 0, **SHORT}))
    scheduler.add(group)
    scheduler.step()
    scheduler.cancel(first)
    while not scheduler.is_idle:
        scheduler.step()
    _check_prompt_logprobs(model, second.result(), PROMPT)


def test_prompt_logprobs_of_a_prompt_that_does_not_fit_are_refused(model):
    with pytest.raises(ContextError, match=r"prompt_logprobs needs .* 400 tokens; the limit is 256"):
        model.generate(LONG * 2, prompt_logprobs=0, context_policy="slide", **SHORT)
