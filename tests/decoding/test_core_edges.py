"""Edges of the decoding core: beginnings that ran before, full contexts, arguments of odd types, abandoned answers."""

from __future__ import annotations

import gc
import os
import weakref

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


# ------------------------------------------------------------------------------------------------------------- drafts


@pytest.fixture(scope="module")
def draft(bundles):
    return load(bundles / "q8", "native", threads=1)


def test_a_draft_model_that_fails_ends_its_answers_alone(model, draft, monkeypatch):
    arguments = {"max_new_tokens": 30, "ignore_eos": True}
    expected = model.generate(PROMPT, **arguments).ids
    kind = type(model.engine)
    forward = kind.forward

    def scarce(engine, batch):
        if engine is draft.engine:
            raise MemoryError("no memory for drafts")
        return forward(engine, batch)

    monkeypatch.setattr(kind, "forward", scarce)
    with model.scheduler(4) as scheduler:
        drafted = scheduler.add(PROMPT, speculation=draft, **arguments)
        other = scheduler.add(PROMPT, **arguments)
        with pytest.raises(MemoryError, match="no memory for drafts"):
            drafted.result(timeout=20)
        assert other.result(timeout=20).ids == expected


def test_a_prompt_does_not_wait_until_drafts_leave_room(model, monkeypatch):
    from edgeformer.decoding.speculation.speculation import Speculation

    generator = model._task.generator
    scheduler = generator.scheduler(SchedulerOptions(max_sequences=2, token_budget=12, stretch=None))

    def fill(self, sequences, room):
        for sequence in sequences:
            sequence.draft([3] * max(0, room))

    monkeypatch.setattr(Speculation, "propose", fill)
    (first,) = generator.jobs(model._task.call(PROMPT, {"max_new_tokens": 200, "ignore_eos": True}))
    (second,) = generator.jobs(model._task.call(PROMPT, SHORT))
    scheduler.add([first])
    scheduler.step()
    scheduler.add([second])
    for _ in range(10):
        scheduler.step()
    assert second.reason == "length"
    assert first.reason is None


@pytest.mark.parametrize("max_new_tokens", [1, 2, 3, 9, 40])
def test_drafts_change_neither_the_end_nor_the_session(model, draft, max_new_tokens):
    """Stop strings, end tokens and lengths that a draft runs into: the same answer, and a state of just its tokens."""
    whole = model.generate(PROMPT, max_new_tokens=40, ignore_eos=True, speculation="off")
    ends = [{"stop": whole.text[at : at + 3], "ignore_eos": True} for at in range(1, 12)]
    ends += [{"eos_token_id": token} for token in sorted(set(whole.ids))]
    for end in ends:
        arguments = {"max_new_tokens": max_new_tokens, "logprobs": 1, **end}
        plain = model.generate(PROMPT, speculation="off", **arguments)
        session = model.session()
        drafted = model.generate(PROMPT, speculation=draft, session=session, **arguments)
        facts = [(one.text, one.ids, one.finish_reason, one.logprobs) for one in (plain, drafted)]
        assert facts[0] == facts[1]
        assert session.ids == [*PROMPT, *drafted.ids[:-1]]
        assert session.state.length == len(session.ids)


# -------------------------------------------------------------------------------------------------- schedulers that end


def test_a_loop_that_is_left_early_cancels_the_answer(model):
    with model.scheduler(1) as scheduler:
        answer = scheduler.stream(PROMPT, max_new_tokens=240, ignore_eos=True)
        for _ in answer:
            break
        assert answer.result(timeout=20).finish_reason == "cancel"


def test_a_dropped_scheduler_finishes_its_answers_and_is_freed(model):
    scheduler = model.scheduler(1)
    answer = scheduler.add(PROMPT, max_new_tokens=100, ignore_eos=True)
    thread, worker = scheduler._worker._thread, weakref.ref(scheduler._worker)
    del scheduler
    assert len(answer.result(timeout=20).ids) == 100
    thread.join(timeout=20)
    assert not thread.is_alive()
    del answer
    gc.collect()
    assert worker() is None


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child_says_that_the_scheduler_is_the_parents(model):
    with model.scheduler(1) as scheduler:
        answer = scheduler.add(PROMPT, max_new_tokens=240, ignore_eos=True)
        child = os.fork()
        if child == 0:
            problems = 0
            for ask in (lambda: scheduler.add(PROMPT, **SHORT), lambda: answer.result(timeout=20)):
                try:
                    ask()
                except EdgeformerError:
                    problems += 1
            scheduler.close()
            os._exit(problems)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) in (1, 2)  # 1: the answer had ended before
        assert len(answer.result(timeout=20).ids) == 240


def test_a_listener_may_close_the_scheduler(model):
    scheduler = model.scheduler(1)
    answer = scheduler.add(PROMPT, max_new_tokens=240, ignore_eos=True)
    answer._listeners.append(scheduler.close)  # called by the worker's own thread
    assert answer.result(timeout=20).finish_reason in ("cancel", "length")
    scheduler.close()


def test_a_closed_stream_says_why_it_has_no_result(model):
    stream = model.stream(PROMPT, max_new_tokens=20, ignore_eos=True)
    next(stream)
    stream.close()
    assert list(stream) == []
    with pytest.raises(InputError, match="was closed before its end"):
        _ = stream.result
    whole = model.stream(PROMPT, **SHORT)
    ids = [piece.id for piece in whole]
    whole.close()
    assert whole.result.ids == ids


# -------------------------------------------------------------------------------------------------------- beam searches


@pytest.mark.parametrize("option", ["session", "slide", "error"])
def test_a_beam_search_refuses_what_it_would_ignore(model, option):
    arguments = {"session": model.session()} if option == "session" else {"context_policy": option}
    with pytest.raises(InputError, match=r"[Ll]eave out (session|context_policy), or pass num_beams=1"):
        model.generate(PROMPT, num_beams=2, **arguments)


def test_a_beam_search_whose_context_is_full_says_so(model):
    result = model.generate((PROMPT * 40)[:253], num_beams=2, max_new_tokens=20, ignore_eos=True)
    assert result.finish_reason == "context"
    assert len(result.ids) == 3


def test_a_beam_search_that_gets_no_state_ends_alone(model, monkeypatch):
    expected = model.generate(PROMPT, **SHORT).ids
    generator = model._task.generator
    scheduler = generator.scheduler(SchedulerOptions(max_sequences=4))
    (search,) = generator.jobs(model._task.call(PROMPT, {"num_beams": 3, **SHORT}))
    monkeypatch.setattr(search, "start", lambda: (_ for _ in ()).throw(MemoryError("no memory for a state")))
    (other,) = generator.jobs(model._task.call(PROMPT, SHORT))
    scheduler.add([search])
    scheduler.add([other])
    while not scheduler.is_idle:
        scheduler.step()
    assert isinstance(search.error, MemoryError)
    assert other.result().ids == expected


def test_a_forced_end_token_does_not_break_a_constraint(model):
    result = model.generate(PROMPT, regex="[a-c]{10}", forced_eos_token_id=2, max_new_tokens=3)
    assert (len(result.ids), result.finish_reason) == (3, "length")
    assert set(result.text) <= set("abc")
    plain = model.generate(PROMPT, forced_eos_token_id=2, max_new_tokens=3)
    assert (plain.ids[-1], plain.finish_reason) == (2, "eos")


@pytest.mark.parametrize("max_new_tokens", [1, 2, 3, 4])
@pytest.mark.parametrize("ignore_eos", [False, True])
def test_a_constraint_that_ends_with_the_last_token_is_whole(model, max_new_tokens, ignore_eos):
    result = model.generate(PROMPT, regex="[a-c]{3}", max_new_tokens=max_new_tokens, ignore_eos=ignore_eos)
    is_whole = len(result.text) == 3
    assert result.finish_reason == ("stop" if is_whole else "length")
    assert is_whole == (max_new_tokens >= 3)
