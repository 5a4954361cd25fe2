"""The same tokens with and without drafts: greedy and seeded, alone and together, whatever is drafted."""

from __future__ import annotations

import random

import pytest

import edgeformer
from edgeformer.decoding.scheduler import Scheduler, SchedulerOptions
from edgeformer.decoding.sequence import Sequence
from edgeformer.decoding.session import StateSource
from edgeformer.decoding.speculation.control import DraftControl
from edgeformer.decoding.speculation.speculation import Speculation
from edgeformer.errors import InputError
from edgeformer.model import load

NEW = 150
PROMPTS = ([5, 17, 90, 200, 31], [8, 8, 8], [40, 41, 42, 43] * 4, [100, 7, 100, 7, 99, 100])
SAMPLED = ({}, {"temperature": 0.8, "seed": 3}, {"temperature": 1.5, "top_k": 4, "seed": 11})


@pytest.fixture(scope="module")
def model(q8):
    return load(q8, "native", threads=1)


@pytest.fixture(scope="module")
def drafter(lm):
    return load(lm, "native", threads=1)  # the same weights before quantization: often right, sometimes not


@pytest.fixture(autouse=True)
def drafts_are_cheap(monkeypatch):
    """So that drafts are tried often, whatever the machine does."""
    monkeypatch.setattr(DraftControl, "observe", lambda self, rows, seconds: None)
    monkeypatch.setattr(DraftControl, "cost", lambda self, rows: 1 + 0.01 * rows)


def answer(model, prompt, speculation, **arguments):
    return model.generate(prompt, max_new_tokens=NEW, ignore_eos=True, speculation=speculation, **arguments)


@pytest.mark.parametrize("sampled", SAMPLED, ids=str)
@pytest.mark.parametrize("prompt", PROMPTS, ids=str)
def test_drafts_change_no_token(model, drafter, prompt, sampled):
    expected = answer(model, prompt, "off", **sampled)
    assert expected.drafts == (0, 0)
    for speculation in ("auto", "lookup", drafter, "auto"):
        result = answer(model, prompt, speculation, **sampled)
        assert result.ids == expected.ids
        assert result.text == expected.text
        assert 0 <= result.drafts.accepted <= result.drafts.proposed
        assert result.drafts.proposed > 0


def test_drafts_are_right_where_the_text_repeats(model, drafter):
    results = [answer(model, prompt, s) for prompt in PROMPTS for s in ("lookup", drafter)]
    assert all(r.drafts.accepted > 20 for r in results)
    again = answer(model, PROMPTS[0], "auto"), answer(model, PROMPTS[0], "auto")
    assert again[1].drafts.accepted > 0.8 * NEW  # the recent answer


@pytest.mark.parametrize("arguments", [{"repetition_penalty": 1.3}, {"no_repeat_ngram_size": 3}, {"stop": "e"}])
def test_drafts_obey_processors_and_stop_strings(model, arguments):
    for prompt in PROMPTS:
        plain, drafted = (
            model.generate(prompt, max_new_tokens=60, speculation=s, **arguments) for s in ("off", "lookup")
        )
        assert (plain.ids, plain.text, plain.finish_reason) == (drafted.ids, drafted.text, drafted.finish_reason)


@pytest.mark.parametrize("count", [1, 2, 3, 5, 16])
def test_an_answer_ends_at_its_length(model, count):
    results = [model.generate([8, 8, 8], max_new_tokens=count, ignore_eos=True, speculation=s) for s in ("off", "auto")]
    assert results[0].ids == results[1].ids
    assert len(results[1].ids) == count


def test_an_answer_ends_with_the_context(model):
    prompt = [40, 41, 42, 43] * 50
    results = [model.generate(prompt, max_new_tokens=999, ignore_eos=True, speculation=s) for s in ("off", "auto")]
    assert results[0].ids == results[1].ids
    assert results[1].finish_reason == "context"


class RandomDrafts(Speculation):
    """Drafts of any quality: some tokens of the right answer, some not; any number."""

    def __init__(self, rng, right):
        self._rng, self._right = rng, right

    def propose(self, sequences, room):
        for sequence in sequences:
            known = self._right[sequence.index]
            guessed = known[sequence.count : sequence.count + self._rng.randint(0, 9)]
            guessed = [t if self._rng.random() < 0.8 else self._rng.randrange(300) for t in guessed]
            sequence.draft(guessed[:room])
            room -= len(guessed[:room])

    def observe(self, rows, seconds):
        pass

    def end(self, sequence):
        pass


@pytest.mark.parametrize("seed", range(4))
def test_any_drafts_change_no_token_in_a_changing_batch(model, seed):
    """Thousands of random steps: sequences join at random, each with drafts that are right or wrong at random."""
    rng = random.Random(seed)
    task = model._task
    calls = []
    for index in range(12):
        prompt = [rng.randrange(3, 300) for _ in range(rng.randint(1, 40))]
        sampled = rng.choice(SAMPLED)
        calls.append((prompt, {"max_new_tokens": rng.randint(1, NEW), "ignore_eos": True, **sampled}, index))
    expected = [model.generate(prompt, speculation="off", **arguments).ids for prompt, arguments, _ in calls]
    options = SchedulerOptions(max_sequences=5, token_budget=64)
    scheduler = Scheduler(model.engine, keeps_logits=True, options=options, speculation=RandomDrafts(rng, expected))
    sequences = []
    while calls or not scheduler.is_idle:
        if calls and rng.random() < 0.2:
            prompt, arguments, index = calls.pop(0)
            (job,) = task.generator.jobs(task.call(prompt, arguments))
            sequence = Sequence(job.request, StateSource(model.engine.new_state), None)
            sequence.index = index
            sequences.append(sequence)
            scheduler.add([sequence])
        scheduler.step()
    assert [sequence.result().ids for sequence in sequences] == expected
    assert sum(sequence.accepted for sequence in sequences) > 200
    assert sum(sequence.proposed - sequence.accepted for sequence in sequences) > 200


@pytest.mark.parametrize(("stretch", "drafts"), [(2.0, False), (None, True)])
def test_nobody_drafts_beside_a_prompt_where_gaps_are_kept_short(model, stretch, drafts):
    task, rows = model._task, []

    class Counted(Scheduler):
        def _forward(self, batch):
            rows.append([one.ids.size for one in batch])
            return super()._forward(batch)

    def jobs(prompt, new):
        return task.generator.jobs(task.call(prompt, {"max_new_tokens": new, "ignore_eos": True}))

    expected = model.generate([5, 6], max_new_tokens=60, ignore_eos=True, speculation="off").ids
    options = SchedulerOptions(max_sequences=2, token_budget=16, stretch=stretch)
    guesses = RandomDrafts(random.Random(0), [expected, []])
    scheduler = Counted(model.engine, keeps_logits=True, options=options, speculation=guesses)
    (decoding,) = jobs([5, 6], 60)
    decoding.guesses = None
    scheduler.add([decoding])
    for _ in range(4):
        scheduler.step()
    assert any(sizes[0] > 1 for sizes in rows[1:]), "drafts run where nobody waits"
    scheduler.add(jobs(list(range(3, 60)), 2))
    del rows[:]
    while any(not job.decodes for job in [*scheduler.running, *(job for group in scheduler.waiting for job in group)]):
        scheduler.step()
    beside = rows if drafts else rows[1:]  # the first one measures a step without the prompt
    assert len(beside) > 1 and all(len(sizes) == 2 for sizes in beside)
    assert any(sizes[0] > 1 for sizes in rows) == drafts
    while not scheduler.is_idle:
        scheduler.step()
    assert decoding.result().ids == expected


def test_a_list_of_prompts_and_a_scheduler_speculate(model, drafter):
    expected = [answer(model, prompt, "off").ids for prompt in PROMPTS]
    for speculation in ("auto", drafter):
        results = model.generate(list(PROMPTS), max_new_tokens=NEW, ignore_eos=True, speculation=speculation)
        assert [result.ids for result in results] == expected
        with model.scheduler(max_sequences=3) as scheduler:
            answers = [
                scheduler.add(prompt, max_new_tokens=NEW, ignore_eos=True, speculation=speculation)
                for prompt in PROMPTS
            ]
            results = [found.result() for found in answers]
        assert [result.ids for result in results] == expected
        assert sum(result.drafts.accepted for result in results) > 0


def test_an_engine_whose_rows_differ_speculates_only_when_asked(lm):
    model = load(lm, "cpu", threads=1)
    assert answer(model, PROMPTS[2], "auto").drafts == (0, 0)
    assert answer(model, PROMPTS[2], "lookup").drafts.accepted > 0


@pytest.mark.parametrize("wrong", ["yes", "", 3, None])
def test_an_unknown_speculation_is_refused(model, wrong):
    with pytest.raises(InputError, match="speculation is"):
        model.generate([5], speculation=wrong)


def test_speculation_that_is_not_possible_is_refused(model, drafter, bundles):
    with pytest.raises(InputError, match="beam search has no drafts"):
        model.generate([5], num_beams=2, speculation="lookup")
    with pytest.raises(InputError, match="both need a tokenizer"):
        model.generate([5], speculation=edgeformer.load(bundles / "plain", "native"))


SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"enum": ["harbour", "lighthouse"]},
        "count": {"type": "integer"},
        "open": {"type": "boolean"},
    },
    "required": ["name", "count", "open"],
    "additionalProperties": False,
}
SHAPES = ({"json_schema": SCHEMA}, {"regex": "(ab|ba){3,9}"}, {"choices": ["small device", "small model", "lazy dog"]})


@pytest.mark.parametrize("sampled", SAMPLED, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: next(iter(shape)))
def test_drafts_change_no_token_of_a_constrained_answer(model, drafter, shape, sampled):
    proposed = accepted = 0
    for prompt in PROMPTS:
        plain = model.generate(prompt, max_new_tokens=80, speculation="off", **shape, **sampled)
        for speculation in ("auto", "lookup", drafter):
            drafted = model.generate(prompt, max_new_tokens=80, speculation=speculation, **shape, **sampled)
            assert (drafted.ids, drafted.text, drafted.finish_reason) == (plain.ids, plain.text, plain.finish_reason)
            proposed, accepted = proposed + drafted.drafts.proposed, accepted + drafted.drafts.accepted
    assert accepted > 20
    assert accepted > 0.4 * proposed  # forced text, and what a model of random weights repeats: 0.50 to 0.92
