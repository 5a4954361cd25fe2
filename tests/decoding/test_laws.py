"""The law of the decoding core: an answer does not depend on what runs beside it, on chunks, drafts, caches or threads.

Schedules by hypothesis on the native engine. Each answer is compared with the one that the same prompt and arguments
get alone, in one thread, without drafts and without a prefix cache: tokens, text, reason, and log probabilities to the
last bit.
"""

from __future__ import annotations

import random
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import tiny

from edgeformer.decoding.beam_job import BeamSearch
from edgeformer.decoding.prefix_cache import PrefixCache
from edgeformer.decoding.scheduler import SchedulerOptions
from edgeformer.decoding.sequence import Sequence
from edgeformer.decoding.speculation.control import DraftControl
from edgeformer.decoding.speculation.lookup import Lookup, RecentAnswers
from edgeformer.decoding.speculation.speculation import Speculation
from edgeformer.errors import EdgeformerError
from edgeformer.model import load

WIDE, NARROW = 640, 160  # tokens of context: several chunks of 128, and one that fills soon
VOCAB = 299  # ids below it are in the vocabulary
SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": ["fox", "dog"]}, "small": {"type": "boolean"}},
    "required": ["name", "small"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """The folder of bundles with room for several chunks: `float`, `q8`, and `window` (40 keys in a layer, q8)."""
    folder = tmp_path_factory.mktemp("wide")
    tiny.write_lm(folder / "float", positions=WIDE)
    tiny.write_lm(folder / "q8", positions=WIDE, scheme="q8")
    tiny.write_lm(folder / "window", positions=WIDE, scheme="q8", window=40)
    return folder


class Alone:
    """What each prompt gets alone, remembered."""

    def __init__(self, bundle, context):
        self.model = load(bundle, "native", threads=1, context=context, prefix_cache=False)
        self.known = {}

    def answer(self, prompt, arguments, index):
        arguments = {**arguments, "seed": arguments["seed"] + index, "speculation": "off"}
        key = (tuple(prompt), repr(arguments))
        if key not in self.known:
            try:
                self.known[key] = facts(self.model.generate(prompt, **arguments))
            except EdgeformerError as error:
                self.known[key] = (type(error), str(error))
        return self.known[key]


def facts(result) -> tuple[Any, ...]:
    return result.ids, result.text, result.finish_reason, result.logprobs, result.prompt_logprobs


# ------------------------------------------------------------------------------------------------------------ schedules

_rng = np.random.default_rng(5)
_stem = [int(i) for i in _rng.integers(3, VOCAB, WIDE)]
BEGINNINGS = (
    _stem,
    _stem[:200] + [int(i) for i in _rng.integers(3, VOCAB, WIDE)],  # leaves the first one inside a chunk
    (_stem[:7] * WIDE)[:WIDE],  # repeats, for prompt lookup
)
LENGTHS = st.one_of(st.integers(0, 40), st.sampled_from([100, 127, 128, 129, 159, 160, 161, 256, 300, 500]))
SAMPLING = st.sampled_from(
    [
        {},
        {},
        {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3},
        {"temperature": 0.9, "top_p": 0.9},
        {"temperature": 1.3, "top_k": 0, "repetition_penalty": 1.2},
        {"temperature": 1.0, "min_p": 0.02, "frequency_penalty": 0.7, "presence_penalty": 0.3},
        {"temperature": 0.7, "typical_p": 0.8, "logit_bias": {40: 4.0, 41: -100.0}},
        {"temperature": 1.0, "dry_multiplier": 0.8, "xtc_probability": 0.5, "xtc_threshold": 0.05},
        {"frequency_penalty": 1.0, "min_new_tokens": 9, "suppress_tokens": [40, 50]},
    ]
)
SHAPES = st.sampled_from(
    [
        {},
        {},
        {},
        {"regex": "[a-c]{1,8}( [0-9]+){1,9}"},
        {"regex": "the (quick|small) (brown )*(fox|device) says .{3,20}"},
        {"json_schema": SCHEMA},
        {"choices": ["hello world", "hello there", "help"]},
    ]
)
ENDS = st.sampled_from([{"ignore_eos": True}, {}, {"eos_token_id": [*range(259, 300, 3)]}, {"stop": ["th", "9"]}])
MORE = st.sampled_from([{}, {}, {"logprobs": 2}, {"prompt_logprobs": 1}])
POLICIES = st.sampled_from([{}, {"context_policy": "error"}, *[{"context_policy": "slide"}] * 3])


@dataclass(frozen=True)
class Wish:
    """One request: a prompt, arguments and a number of answers."""

    prompt: tuple[int, ...]
    arguments: dict[str, Any]
    n: int


@st.composite
def wishes(draw, context):
    beginning = draw(st.sampled_from(BEGINNINGS))[: draw(LENGTHS)]
    prompt = [*beginning, *draw(st.lists(st.integers(3, VOCAB - 1), min_size=1, max_size=9))]
    arguments = {"max_new_tokens": draw(st.integers(1, 32)), "seed": draw(st.integers(0, 3)), **draw(SAMPLING)}
    beams = draw(st.sampled_from([1] * 8 + [2, 4]))
    if beams > 1:
        return Wish(tuple(prompt[-context:]), {**arguments, "num_beams": beams}, 1)
    for part in (SHAPES, ENDS, MORE):
        arguments |= draw(part)
    if context == NARROW:
        arguments |= draw(POLICIES)
        if arguments.get("context_policy") == "slide":
            prompt = [*BEGINNINGS[0][: context - draw(st.integers(0, 24))], *prompt]  # about to be full, or more
    if arguments.get("context_policy") != "slide" or draw(st.booleans()):
        prompt = prompt[-context:]
    return Wish(tuple(prompt), arguments, draw(st.sampled_from([1, 1, 1, 2, 4])))


@st.composite
def schedules(draw, context):
    """(options, drafts, cache, events); an event is a wish to add, steps to run, or the number of a job to cancel."""
    options = SchedulerOptions(
        draw(st.integers(4, 16)),
        draw(st.sampled_from([16, 17, 64, 200, 512])),
        stretch=draw(st.sampled_from([None, 2.0])),
    )
    drafts = draw(st.sampled_from(["off", "auto", "always", "random", "right and wrong", "forced and wrong", "model"]))
    chunks = draw(st.sampled_from([0, 1, 3, 50]))
    event = st.one_of(wishes(context), wishes(context), st.integers(1, 6), st.tuples(st.integers(0, 30)))
    return options, drafts, chunks, draw(st.lists(event, min_size=1, max_size=60))


# --------------------------------------------------------------------------------------------------------------- drafts


class Adversary:
    """Drafts that no model would make, in place of a `Speculation`. `expected[sequence]` is its right answer."""

    def __init__(self, kind, expected, seed):
        self.kind, self.expected = kind, expected
        self.rng = np.random.default_rng(seed)

    def propose(self, sequences, room):
        for sequence in sequences:
            guesses = self.guesses(sequence)[: max(0, min(room, sequence.draft_room))]
            sequence.draft(guesses)
            room -= len(guesses)

    def guesses(self, sequence):
        count = int(self.rng.integers(0, 16))
        wrong = [int(i) for i in self.rng.integers(0, VOCAB, count)]
        if self.kind == "right and wrong":
            return [*self.expected(sequence)[sequence.count :][: int(self.rng.integers(0, 16))], *wrong]
        if self.kind == "forced and wrong" and sequence.constraint is not None:
            return [*sequence.constraint.forced(int(self.rng.integers(1, 16))), *wrong]
        return wrong

    def observe(self, rows, seconds):
        pass

    def end(self, sequence):
        pass


def always(self, record, others, match, limit, seconds=0.0, certain=0):
    """In place of `DraftControl.plan`: all drafts that there are, and the later of two kinds."""
    self.calls = getattr(self, "calls", 0) + 1
    return limit, float(self.calls)


# ------------------------------------------------------------------------------------------------------------- the laws


@pytest.mark.parametrize("context", [WIDE, NARROW])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("bundle", ["float", "q8", "window"])
def test_an_answer_does_not_depend_on_its_schedule(bundle, threads, context, wide, monkeypatch):
    alone = Alone(wide / bundle, context)
    model = load(wide / bundle, "native", threads=threads, context=context, prefix_cache=False)
    drafter = load(wide / "float", "native", threads=1, prefix_cache=False)
    tally: Counter[str] = Counter()

    @settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
    @given(schedule=schedules(context))
    def check(schedule):
        with monkeypatch.context() as patch:
            if schedule[1] in ("always", "model"):
                patch.setattr(DraftControl, "plan", always)
            run(model, drafter, alone, schedule, tally)

    check()
    assert tally["steps"] > 300 and tally["accepted"] > 100 and tally["refused"] > 100, tally
    assert tally["together"] > 2 and tally["cancelled"] and tally["constrained"] > 20 and tally["beams"], tally
    assert tally["cached"] > 128 if context == WIDE else tally["slid"], tally


def run(model, drafter, alone, schedule, tally):
    options, drafts, chunks, events = schedule
    cache = PrefixCache(chunks * model.engine.kv_bytes(128)) if chunks else None
    speculation = Speculation(model._task.limits, model.tokenizer, is_exact=True)
    generator = replace(model._task.generator, prefix_cache=cache, speculation=speculation)
    scheduler = generator.scheduler(options)
    jobs, pieces = [], {}

    def expected(job):
        wish = next(wish for wish, found in jobs if found is job)
        found = alone.answer(wish.prompt, wish.arguments, job.index)
        return found[0] if isinstance(found[0], list) else []

    if drafts in ("random", "right and wrong", "forced and wrong"):
        scheduler._speculation = Adversary(drafts, expected, len(events))
    asked = {"off": "off", "model": drafter}.get(drafts, "auto")

    def step():
        scheduler.step()
        tally["steps"] += 1
        tally["together"] = max(tally["together"], len(scheduler.running))
        for _, job in jobs:
            pieces.setdefault(id(job), []).extend(job.take())

    for event in events:
        if isinstance(event, Wish):
            more = {} if "num_beams" in event.arguments else {"n": event.n, "speculation": asked}
            try:
                group = generator.jobs(model._task.call(list(event.prompt), {**event.arguments, **more}))
            except EdgeformerError as error:
                refused = alone.answer(event.prompt, event.arguments, 0)
                assert refused == (type(error), str(error))  # noqa: PT017  (what is refused alone is refused here)
                continue
            scheduler.add(group)
            jobs += [(event, job) for job in group]
        elif isinstance(event, int):
            for _ in range(event):
                step()
        elif going := [job for _, job in jobs if job.reason is None and job.error is None]:
            scheduler.cancel(going[event[0] % len(going)])
    while not scheduler.is_idle:
        step()
    step()

    for wish, job in jobs:
        what = f"{wish} with drafts {drafts!r}"
        wanted = alone.answer(wish.prompt, wish.arguments, getattr(job, "index", 0))
        assert job._session is None, what
        if job.error is not None:
            assert (type(job.error), str(job.error)) == wanted, what
            continue
        result = job.result()
        assert [piece.id for piece in pieces[id(job)] if piece.id is not None] == result.ids, what
        assert "".join(piece.text for piece in pieces[id(job)]) == result.text, what
        if result.finish_reason == "cancel":
            tally["cancelled"] += 1
            assert not isinstance(wanted[0], list) or wanted[0][: len(result.ids)] == result.ids, what
        else:
            assert facts(result) == wanted, what
        tally["accepted"] += result.drafts.accepted
        tally["refused"] += result.drafts.proposed - result.drafts.accepted
        tally["cached"] += result.cached_tokens
        tally["beams"] += isinstance(job, BeamSearch)
        if isinstance(job, Sequence):
            tally["constrained"] += job.constraint is not None
            tally["slid"] += job._context is not job.ids
    assert cache is None or cache.nbytes <= cache.limit_bytes


def read(start, pieces):
    """(the ids of the first `pieces` pieces, or of all; what the whole answer is, None where it was left early; the
    tokens that were in the session)."""
    ids = []
    try:
        stream = start()
        for piece in stream:
            ids.append(piece.id)
            if len(ids) == pieces:
                stream.close()
                return ids, None, 0
    except EdgeformerError as error:
        return ids, (type(error), str(error)), 0
    return ids, facts(stream.result), stream.result.cached_tokens


@pytest.mark.parametrize("bundle", ["q8", "window"])
@pytest.mark.parametrize("context", [WIDE, NARROW])
def test_a_conversation_does_not_depend_on_its_state(bundle, context, wide, monkeypatch):
    """Turns that go on, change what was said before, are left early, or slide: each as a prompt of its own."""
    alone = Alone(wide / bundle, context)
    model = load(wide / bundle, "native", threads=1, context=context)
    tally: Counter[str] = Counter()
    turn = st.tuples(wishes(context), st.integers(0, 300), st.one_of(st.none(), st.integers(1, 9)))

    @settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
    @given(turns=st.lists(turn, min_size=1, max_size=9))
    def check(turns):
        session, text = model.session(), []
        for wish, kept, pieces in turns:
            prompt = [*text[:kept], *wish.prompt[-20:]]
            if wish.arguments.get("context_policy") != "slide":
                prompt = prompt[-context:]
            arguments = {name: value for name, value in wish.arguments.items() if name != "num_beams"}
            wanted = alone.answer(prompt, arguments, 0)
            ids, found, reused = read(partial(model.stream, prompt, session=session, **arguments), pieces)
            if isinstance(wanted[0], list):  # an answer that fails alone has pieces before that
                assert ids == wanted[0][: len(ids)], (turns, wish)
            assert found in (None, wanted), (turns, wish)
            text = prompt + ids
            tally["turns"] += 1
            tally["reused"] += reused

    with monkeypatch.context() as patch:
        patch.setattr(DraftControl, "plan", always)
        check()
    assert tally["turns"] > 50 and tally["reused"] > 500, tally


@pytest.mark.parametrize("steps", range(5))
def test_the_prompt_of_a_cancelled_answer_is_scored_once(steps, wide):
    """The next answer goes on with the prompt where the cancelled one left it."""
    model = load(wide / "q8", "native", threads=1)
    arguments = {"prompt_logprobs": 1, "max_new_tokens": 3, "seed": 2}
    expected = [facts(r) for r in model.generate(_stem[:60], n=3, temperature=1.0, **arguments)]
    generator = model._task.generator
    scheduler = generator.scheduler(SchedulerOptions(4, 20, stretch=None))
    group = generator.jobs(model._task.call(_stem[:60], {**arguments, "n": 3, "temperature": 1.0}))
    scheduler.add(group)
    for _ in range(steps):
        scheduler.step()
    scheduler.cancel(group[0])
    while not scheduler.is_idle:
        scheduler.step()
    assert [facts(job.result()) for job in group[1:]] == expected[1:]


@pytest.fixture
def switching():
    """Threads switch as often as they can."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


def in_threads(count, work):
    """The results of work(0), work(1), ... in threads of their own."""
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(work, range(count)))


def test_threads_that_share_a_model_get_what_they_get_alone(wide, monkeypatch, switching):
    monkeypatch.setattr(DraftControl, "plan", always)
    alone = Alone(wide / "q8", WIDE)
    model = load(wide / "q8", "native", threads=2, prefix_cache=4 * alone.model.engine.kv_bytes(128))
    prompts = [(*BEGINNINGS[n % 3][: 40 * (n % 9)], n + 3) for n in range(27)]
    arguments = {"max_new_tokens": 12, "ignore_eos": True, "temperature": 0.4, "seed": 1}
    expected = [alone.answer(prompt, arguments, 0) for prompt in prompts]

    def ask(first):
        order = [(5 * first + n) % len(prompts) for n in range(len(prompts))]
        return [n for n in order if facts(model.generate(list(prompts[n]), **arguments)) != expected[n]]

    assert in_threads(5, ask) == [[]] * 5


def test_threads_share_recent_answers(switching):
    recent = RecentAnswers(40)  # three answers: one is forgotten with each that comes

    def work(seed):
        rng = random.Random(seed)
        for _ in range(5000):
            lookup = Lookup(recent)
            lookup.extend([rng.randrange(2) for _ in range(8)])
            lookup.propose(5)
            recent.add([rng.randrange(2) for _ in range(12)])
        return recent.tokens

    assert max(in_threads(4, work)) <= 40 + 4 * 12
