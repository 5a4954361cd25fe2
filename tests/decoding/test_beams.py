"""Beam search as a job: its prompt runs once, its beams share the cache, and the prefix cache serves it."""

from __future__ import annotations

import numpy as np
import pytest
from support import tiny

from edgeformer.decoding.scheduler import SchedulerOptions
from edgeformer.model import load

PROMPT = [int(i) for i in np.random.default_rng(2).integers(3, 299, 390)]
BEAMS = 4


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    """A tiny decoder with room for the prompt."""
    return tiny.write_lm(tmp_path_factory.mktemp("beams") / "q8", positions=512, scheme="q8")


def start(model, prompt, **arguments):
    """(a scheduler, the job of a beam search in it)."""
    generator = model._task.generator
    scheduler = generator.scheduler(SchedulerOptions(BEAMS))
    call = model._task.call(prompt, {"num_beams": BEAMS, "max_new_tokens": 8, "eos_token_id": [], **arguments})
    (job,) = group = generator.jobs(call)
    scheduler.add(group)
    return scheduler, job


@pytest.mark.parametrize("engine", ["native", "cpu"])
def test_a_prompt_runs_as_one_row_and_then_each_beam_does(engine, bundle, monkeypatch):
    model = load(bundle, engine, threads=1, prefix_cache=False)
    scheduler, job = start(model, PROMPT[:20])
    shapes, forward = [], model.engine.forward
    monkeypatch.setattr(
        type(model.engine),
        "forward",
        lambda _, batch: shapes.append([inputs["input_ids"].shape for inputs, _ in batch]) or forward(batch),
    )
    while not scheduler.is_idle:
        scheduler.step()
    assert shapes == [[(1, 20)]] + [[(BEAMS, 1)]] * 7
    assert len(job.result().ids) == 8


def test_beams_hold_their_own_tokens_alone(bundle):
    """Of a prompt of 390 tokens, three chunks of 128 are shared by all; a beam has a copy of the last one at most."""
    model = load(bundle, "native", threads=1, prefix_cache=False)
    scheduler, job = start(model, PROMPT)
    chunk = model.engine.kv_bytes(128)
    for _ in range(7):
        scheduler.step()
        state = job.session.state
        assert state.nbytes <= BEAMS * chunk
        assert state.nbytes_shared >= BEAMS * 3 * chunk
        assert state.nbytes + state.nbytes_shared <= BEAMS * 4 * chunk
    scheduler.step()
    assert job.reason == "length" and job._session is None


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "seed": 4}])
def test_beams_begin_from_the_prefix_cache(bundle, sampling):
    model = load(bundle, "native", threads=1)
    arguments = {"num_beams": BEAMS, "max_new_tokens": 8, "eos_token_id": [], **sampling}
    first, second = (model.generate(PROMPT, **arguments) for _ in range(2))
    assert (first.cached_tokens, second.cached_tokens) == (0, 384)
    assert first.ids == second.ids == load(bundle, "native", prefix_cache=False).generate(PROMPT, **arguments).ids
    assert model.generate(PROMPT, max_new_tokens=1).cached_tokens == 384
