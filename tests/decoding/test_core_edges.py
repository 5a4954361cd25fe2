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


# ---------------------------------------------------------------------------------------------------- several answers


@pytest.mark.parametrize("length", [254, 255, 256, 300])
def test_the_context_of_each_of_several_answers_slides(model, length):
    prompt = (LONG * 2)[:length]
    arguments = {"context_policy": "slide", "temperature": 1.0, **SHORT}
    expected = [model.generate(prompt, seed=3 + i, **arguments).ids for i in range(3)]
    assert [result.ids for result in model.generate(prompt, n=3, seed=3, **arguments)] == expected


def test_answers_that_get_no_memory_for_their_state_end_alone(model, monkeypatch):
    generator = model._task.generator
    scheduler = generator.scheduler(SchedulerOptions(max_sequences=4))
    group = generator.jobs(model._task.call(PROMPT, {"n": 3, **SHORT}))
    scheduler.add(group)
    forked = []

    def scarce(state):
        forked.append(state)
        if len(forked) == 1:
            raise MemoryError("no memory for a state")
        return fork(state)

    kind = type(model.engine.new_state())
    fork = kind.fork
    monkeypatch.setattr(kind, "fork", scarce)
    for _ in range(20):
        scheduler.step()
    assert scheduler.is_idle
    assert [type(job.error).__name__ for job in group] == ["NoneType", "MemoryError", "NoneType"]


def test_an_answer_that_is_cancelled_within_its_prompt_has_no_negative_times(model):
    generator = model._task.generator
    scheduler = generator.scheduler(SchedulerOptions(max_sequences=1, token_budget=3))
    (job,) = group = generator.jobs(model._task.call(PROMPT, SHORT))
    scheduler.add(group)
    scheduler.step()
    scheduler.cancel(job)
    timings = job.result().timings
    assert min(timings.prompt_seconds, timings.first_token_seconds, timings.decode_seconds) >= 0


# ----------------------------------------------------------------------------------------------------------- sessions


def test_an_answer_whose_session_another_took_says_so(model):
    session = model.session()
    arguments = {"max_new_tokens": 12, "ignore_eos": True, "speculation": "off"}
    expected = model.generate(PROMPT[:3], **arguments).ids
    stream = model.stream(PROMPT, session=session, **arguments)
    next(stream)
    assert model.generate(PROMPT[:3], session=session, **arguments).ids == expected
    with pytest.raises(EdgeformerError, match="Another answer runs in this session"):
        list(stream)
    assert model.generate(PROMPT[:3], session=session, **arguments).ids == expected


def test_a_session_goes_on_after_a_stream_that_was_closed_or_interrupted(model, monkeypatch):
    session = model.session()
    arguments = {"max_new_tokens": 12, "ignore_eos": True}
    expected = model.generate(PROMPT, **arguments).ids
    stream = model.stream(PROMPT, session=session, **arguments)
    next(stream)
    stream.close()
    assert model.generate(PROMPT, session=session, **arguments).ids == expected
    kind, forward = type(model.engine), model.engine.forward

    def interrupted(_, batch):
        forward(batch)
        raise KeyboardInterrupt

    stream = model.stream([*PROMPT, 9], session=session, **arguments)
    next(stream)
    with monkeypatch.context() as patch:
        patch.setattr(kind, "forward", interrupted)
        with pytest.raises(KeyboardInterrupt):
            next(stream)
    assert model.generate(PROMPT, session=session, **arguments).ids == expected


@pytest.mark.parametrize("session", [5, "a", {}])
def test_what_is_no_session_is_refused(model, session):
    with pytest.raises(InputError, match=r"session is .*, expected one that Model.session\(\) made"):
        model.generate(PROMPT, session=session)


# ------------------------------------------------------------------------------------------------- forms of arguments


def test_many_prompts_share_no_session(model):
    with pytest.raises(InputError, match="holds one conversation"):
        list(model.generate_each([PROMPT, PROMPT[:3]], session=model.session()))


def test_tuples_are_prompts(model):
    ids = [(5, 17), (5, 17, 90), (200, 31)]
    assert [result.ids for result in model.generate(ids, **SHORT)] == [model.generate(i, **SHORT).ids for i in ids]
    turns = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"})
    (ended,) = model.generate_each([turns], **SHORT)
    assert ended.answers()[0].ids == model.generate(list(turns), **SHORT).ids


def test_a_prompt_in_a_list_has_arguments_of_its_own(model):
    found = {one.index: one.answers()[0] for one in model.generate_each([((5, 17), {"max_new_tokens": 2}), PROMPT])}
    assert len(found[0].ids) == 2
    assert found[1].ids == model.generate(PROMPT).ids


@pytest.mark.parametrize("arguments", [{"n": "2"}, {"n": None}, {"num_beams": "a"}, {"max_sequences": "x"}])
def test_wrong_counts_for_a_list_are_refused(model, arguments):
    with pytest.raises(InputError, match=next(iter(arguments))):
        model.generate([PROMPT, PROMPT], **arguments)


def test_a_text_is_no_list_of_prompts(model):
    with pytest.raises(InputError, match=r"use generate\(\) for one"):
        model.generate_each("abc")


def test_a_list_of_prompts_may_have_more_beams_than_run_together_by_default(model):
    together = model.generate([PROMPT, PROMPT[:2]], num_beams=20, max_new_tokens=2)
    alone = [model.generate(prompt, num_beams=20, max_new_tokens=2) for prompt in (PROMPT, PROMPT[:2])]
    assert [result.ids for result in together] == [result.ids for result in alone]


@pytest.mark.parametrize(
    "shape",
    [
        {"regex": "a\ud800"},
        {"grammar": 'start: "\ud800"'},
        {"grammar": 'root ::= "\ud800"'},
        {"grammar": 'start: %json {"const": "\ud800"}'},
        {"json_schema": {"const": "\ud800"}},
        {"json_schema": {"type": "object", "properties": {"\ud800": {}}}},
        {"choices": ["\ud800"]},
    ],
)
def test_a_constraint_with_a_lone_surrogate_is_refused(model, shape):
    with pytest.raises(InputError):
        model.generate(PROMPT, **shape)
