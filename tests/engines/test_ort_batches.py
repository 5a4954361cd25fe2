"""Padded batches on ONNX Runtime: every sequence gets the logits that it gets alone, whoever joins and leaves."""

from __future__ import annotations

import gc
import threading
import weakref

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import tiny

from edgeformer.bundle.bundle import Bundle
from edgeformer.engines.onnxruntime import OrtEngine
from edgeformer.engines.ort_padding import CACHE_MASK, masked_graph
from edgeformer.engines.ort_state import SHORT, Joint
from edgeformer.errors import EdgeformerError, InputError

TOKENS = np.random.default_rng(8).integers(3, 300, (6, 80))  # the text of each sequence
TOLERANCE = {"float": 1e-5, "q8": 2e-2, "float16": 4e-3}  # of the range; int8 activations round to the other side


class Whole:
    """Plain onnxruntime on the bundle's own graph: a whole sequence in one run, without cache, batch or mask."""

    def __init__(self, folder):
        self.session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
        self.dtype = np.float16 if folder.name == "float16" else np.float32
        self.known = {}

    def logits(self, ids):
        """[len(ids), vocab]"""
        key = tuple(map(int, ids))
        if key not in self.known:
            feed = {"input_ids": np.array([key]), "position_ids": np.arange(len(key))[None]}
            for port in self.session.get_inputs():
                if port.name.startswith("past_key_values."):
                    feed[port.name] = np.zeros((1, tiny.KV_HEADS, 0, tiny.HEAD_DIM), self.dtype)
            self.known[key] = self.session.run(["logits"], feed)[0][0].astype(np.float64)
        return self.known[key]


@pytest.fixture(scope="module", params=["float", "q8", "float16"])
def pair(request, bundles):
    engine = OrtEngine(Bundle.open(bundles / request.param), threads=1)
    assert engine.prepare_batches() is None
    return engine, Whole(bundles / request.param), TOLERANCE[request.param]


@pytest.fixture
def engine(lm):
    return OrtEngine(Bundle.open(lm), threads=1)


@pytest.fixture
def runs(monkeypatch):
    """The number of rows of each run of a session, in order."""
    seen, execute = [], OrtEngine._execute

    def counting(self, loaded, arrays, static, past):
        seen.append(len(arrays["input_ids"]))
        return execute(self, loaded, arrays, static, past)

    monkeypatch.setattr(OrtEngine, "_execute", counting)
    return seen


def calls_of(states, sizes, text=TOKENS, **more):
    """One call for each state, of the next tokens of its own text."""
    return [
        ({"input_ids": text[i : i + 1, state.length : state.length + size], **more}, state)
        for i, (state, size) in enumerate(zip(states, sizes, strict=True))
    ]


def assert_close(got, expected, tolerance):
    assert got.shape == expected.shape
    worst = np.abs(got.astype(np.float64) - expected).max() / np.ptp(expected)
    assert worst <= tolerance, worst


# -------------------------------------------------------------------------------------------------------------- numbers

SEQUENCE = st.integers(0, 5)
ACTION = st.one_of(
    st.tuples(st.just("run"), st.dictionaries(SEQUENCE, st.integers(1, 10), min_size=1)),
    st.tuples(st.just("run"), st.fixed_dictionaries({i: st.just(1) for i in range(6)})),
    st.tuples(st.just("drop"), SEQUENCE),
    st.tuples(st.just("cut"), SEQUENCE, st.integers(1, 9)),
    st.tuples(st.just("fork"), SEQUENCE, SEQUENCE),
)


@settings(max_examples=60, deadline=None)
@given(actions=st.lists(ACTION, min_size=1, max_size=14))
def test_logits_are_those_of_the_sequence_alone_in_any_schedule(pair, actions):
    """Sequences join and leave between steps, run different numbers of tokens, are cut, forked and dropped."""
    engine, whole, tolerance = pair
    states, texts = {}, {}

    def state(i):
        texts.setdefault(i, [])
        return states.setdefault(i, engine.new_state())

    for action, *details in actions:
        if action == "run":
            calls = []
            for i, size in details[0].items():
                new = TOKENS[i, len(texts.get(i, [])) :][:size].tolist()
                state(i)
                if new:
                    texts[i] += new
                    calls.append((i, len(new), ({"input_ids": [new]}, states[i])))
            outputs = engine.forward([call for *_, call in calls])
            for (i, size, _), output in zip(calls, outputs, strict=True):
                assert_close(output["logits"][0], whole.logits(texts[i])[-size:], tolerance)
        elif action == "drop":
            states.pop(details[0], None), texts.pop(details[0], None)
        elif action == "cut":
            i, count = details
            length = max(0, state(i).length - count)
            states[i].truncate(length)
            texts[i] = texts[i][:length]
        else:
            source, target = details
            fork = state(source).fork()
            states[target], texts[target] = fork, list(texts[source])
        assert all(states[i].length == len(texts[i]) for i in states)


@pytest.mark.parametrize("sizes", [(1, 1, 1), (1, SHORT, 2), (3, 1, SHORT + 1), (2, 2, 30), (1, 1)])
def test_short_calls_share_a_run_and_long_ones_run_alone(pair, runs, sizes):
    engine, whole, tolerance = pair
    states = [engine.new_state() for _ in sizes]
    engine.forward(calls_of(states, (9, 20, 14)[: len(sizes)]))
    del runs[:]
    outputs = engine.forward(calls_of(states, sizes))
    short = sum(size <= SHORT for size in sizes)
    assert sorted(runs) == sorted([short] + [1] * (len(sizes) - short))
    for i, (output, state, size) in enumerate(zip(outputs, states, sizes, strict=True)):
        assert_close(output["logits"][0], whole.logits(TOKENS[i, : state.length])[-size:], tolerance)


@pytest.mark.parametrize("keeps", [(0, 1, 2), (1, 1, 1), (3, 0, 9)])
def test_each_call_gets_as_many_logits_as_it_asked_for(pair, keeps):
    engine, whole, tolerance = pair
    states = [engine.new_state() for _ in keeps]
    calls = calls_of(states, (3, 5, 4))
    for (inputs, _), keep in zip(calls, keeps, strict=True):
        inputs["logits_to_keep"] = keep
    for i, (output, keep, size) in enumerate(zip(engine.forward(calls), keeps, (3, 5, 4), strict=True)):
        kept = min(keep or size, size)
        assert_close(output["logits"][0], whole.logits(TOKENS[i, :size])[-kept:], tolerance)


def test_positions_that_are_given_count(engine):
    states = [engine.new_state() for _ in range(2)]
    calls = calls_of(states, (4, 2))
    calls[0][0]["position_ids"] = [[0, 3, 5, 9]]
    together = engine.forward(calls)[0]["logits"]
    alone = engine.forward([(calls[0][0], engine.new_state())])[0]["logits"]
    assert_close(together, alone, 1e-5)
    usual = engine.forward(calls_of([engine.new_state()], (4,)))[0]["logits"]
    assert np.abs(usual - alone).max() > 1e-3  # distances matter to this model


def test_a_batch_of_one_state_runs_on_the_graph_with_a_mask(pair):
    """What beam search uses: several rows in one state, after the graph was replaced."""
    engine, whole, tolerance = pair
    state = engine.new_state()
    engine.forward([({"input_ids": TOKENS[:3, :6]}, state)])
    state.select([2, 0, 1])
    logits = engine.forward([({"input_ids": TOKENS[[2, 0, 1], 6:8]}, state)])[0]["logits"]
    for row, i in enumerate((2, 0, 1)):
        assert_close(logits[row], whole.logits(TOKENS[i, :8])[-2:], tolerance)


# --------------------------------------------------------------------------------------------------------------- memory


def test_the_same_sequences_stay_joined_without_copies(engine, monkeypatch):
    states = [engine.new_state() for _ in range(4)]
    engine.forward(calls_of(states, (5, 9, 20, 1)))
    engine.forward(calls_of(states, (1, 1, 1, 1)))
    monkeypatch.setattr(Joint, "of", lambda *_: pytest.fail("the caches were copied"))
    for _ in range(5):
        engine.forward(calls_of(states, (1, 1, 1, 1)))
        states[1].truncate(states[1].length - 1)
    engine.forward(calls_of(states[::-1], (1, 2, 1, 1)))  # in another order


def test_a_joint_cache_is_freed_when_its_sequences_part(engine):
    states = [engine.new_state() for _ in range(4)]
    engine.forward(calls_of(states, (5, 9, 20, 1)))
    engine.forward(calls_of(states, (1, 1, 1, 1)))
    first = weakref.ref(states[0].joint)
    tensors = weakref.ref(states[0].joint.values[0])
    states.pop()
    engine.forward(calls_of(states[:2], (1, 1)))
    gc.collect()
    assert first() is None and tensors() is None
    assert states[2].joint is None and states[2].cache[0].shape() == [1, tiny.KV_HEADS, 21, tiny.HEAD_DIM]


def test_dropped_tokens_do_not_pile_up(engine):
    """Drafts that are refused at every step: the joint cache stays within a quarter and a few of what it needs."""
    states = [engine.new_state() for _ in range(2)]
    engine.forward(calls_of(states, (8, 3)))
    for _ in range(60):
        engine.forward(calls_of(states, (4, 4)))
        for state in states:
            state.truncate(state.length - 4)
        joint = states[0].joint
        assert joint.visible.shape[1] <= 8 + 8 // 4 + 32 + 4
        assert joint.values[0].shape()[2] == joint.visible.shape[1]


def test_a_fork_of_a_joined_sequence_holds_its_own_tokens_only(engine):
    states = [engine.new_state() for _ in range(3)]
    engine.forward(calls_of(states, (5, 8, 1)))
    fork = states[2].fork()
    assert fork.joint is None and fork.cache[0].shape() == [1, tiny.KV_HEADS, 1, tiny.HEAD_DIM]


# ------------------------------------------------------------------------------------------------------------- failures


@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_step_that_fails_leaves_every_state_as_before(pair, monkeypatch, at):
    engine, whole, tolerance = pair
    states = [engine.new_state() for _ in range(4)]
    engine.forward(calls_of(states, (6, 3, 2, 30)))
    before, execute, count = [state.length for state in states], OrtEngine._execute, iter(range(9))

    def failing(self, *rest):
        if next(count) == at:
            raise EdgeformerError("out of memory")
        return execute(self, *rest)

    monkeypatch.setattr(OrtEngine, "_execute", failing)
    with pytest.raises(EdgeformerError, match="out of memory"):
        engine.forward(calls_of(states, (1, 2, 10, 12)))
    monkeypatch.undo()
    assert [state.length for state in states] == before
    outputs = engine.forward(calls_of(states, (1, 2, 10, 12)))
    for i, (output, state) in enumerate(zip(outputs, states, strict=True)):
        assert_close(output["logits"][0, -1], whole.logits(TOKENS[i, : state.length])[-1], tolerance)


def test_a_wrong_call_among_right_ones_changes_no_state(engine):
    states = [engine.new_state() for _ in range(3)]
    engine.forward(calls_of(states, (2, 3, 4)))
    calls = calls_of(states, (1, 1, 1))
    calls[2] = ({"input_ids": [[999]]}, states[2])
    with pytest.raises(InputError, match="token id 999"):
        engine.forward(calls)
    assert [state.length for state in states] == [2, 3, 4]


def test_threads_that_once_shared_a_batch_do_not_disturb_each_other(engine):
    """A thread whose batch loses members copies their rows; the members' own threads see nothing of it."""
    whole = Whole(engine._path.parent)
    wrong = []

    def work(states, first):
        try:
            for _ in range(40):
                output = engine.forward(calls_of(states, [1] * len(states), TOKENS[first:]))[0]
                assert_close(output["logits"][0], whole.logits(TOKENS[first, : states[0].length])[-1:], 1e-5)
                states[0].fork()
        except Exception as error:
            wrong.append(error)

    for _ in range(5):
        states = [engine.new_state() for _ in range(4)]
        engine.forward(calls_of(states, (4, 1, 7, 3)))
        threads = [
            threading.Thread(target=work, args=part) for part in ((states[:2], 0), (states[2:3], 2), (states[3:], 3))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []


# ------------------------------------------------------------------------------- graphs that allow it, and that do not


def with_mask(graph):
    attentions(graph)[0].input[3] = "window"


def not_causal(graph):
    attention = attentions(graph)[1]
    kept = [a for a in attention.attribute if a.name != "is_causal"]
    del attention.attribute[:]
    attention.attribute.extend(kept)


def reads_the_length(graph):
    graph.node.append(onnx.helper.make_node("Shape", ["past_key_values.1.key"], ["past_length"], name="Shape_past"))


def reads_a_present(graph):
    graph.node.append(onnx.helper.make_node("Identity", ["present.0.value"], ["again"], name="Identity_present"))


def attentions(graph):
    return [node for node in graph.node if node.op_type == "Attention"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (with_mask, "has a mask of its own"),
        (not_causal, "has a cache and is not causal"),
        (reads_the_length, r"Shape_past \(Shape\) reads the cache past_key_values.1.key"),
        (reads_a_present, r"Identity_present \(Identity\) reads the cache present.0.value of another node"),
    ],
)
def test_a_graph_whose_structure_forbids_padding_is_left_alone(lm, tmp_path, change, reason):
    model = onnx.load(str(lm / "model.onnx"), load_external_data=False)
    change(model.graph)
    onnx.save(model, str(tmp_path / "model.onnx"))
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(masked_graph(tmp_path / "model.onnx"))


def test_only_the_mask_is_new_in_the_graph(lm):
    before = onnx.load(str(lm / "model.onnx"), load_external_data=False).graph
    after = onnx.load_from_string(masked_graph(lm / "model.onnx")).graph
    assert {port.name for port in after.input} - {port.name for port in before.input} == {CACHE_MASK}
    changed = [node for old, node in zip(before.node, after.node, strict=True) if old != node]
    assert changed == attentions(after)
    assert all(node.input[3] == CACHE_MASK for node in changed)


@pytest.mark.parametrize(
    ("feed", "spoil", "reason"),
    [
        (CACHE_MASK, np.ones_like, "the padding changes the logits"),
        ("position_ids", np.zeros_like, "differ by"),
    ],
)
def test_wrong_numbers_of_a_padded_batch_are_noticed(engine, monkeypatch, runs, feed, spoil, reason):
    """Planted faults: then states run one after another, and right."""
    feeds = Joint.feeds
    monkeypatch.setattr(Joint, "feeds", lambda *given: (got := feeds(*given)) | {feed: spoil(got[feed])})
    states = [engine.new_state() for _ in range(3)]
    assert reason in engine.prepare_batches()
    del runs[:]
    outputs = engine.forward(calls_of(states, (1, 1, 4)))
    assert runs == [1, 1, 1]
    whole = Whole(engine._path.parent)
    for i, (output, size) in enumerate(zip(outputs, (1, 1, 4), strict=True)):
        assert_close(output["logits"][0], whole.logits(TOKENS[i, :size]), 1e-5)


def test_a_graph_without_a_cache_and_a_profile_say_why_they_do_not_batch(bundles, tmp_path):
    assert "no KV cache" in OrtEngine(Bundle.open(bundles / "forecast"), threads=1).prepare_batches()
    profiled = OrtEngine(Bundle.open(bundles / "float"), threads=1, profile=tmp_path)
    assert "a profile is of one session" in profiled.prepare_batches()
    profiled.forward(calls_of([profiled.new_state(), profiled.new_state()], (2, 3)))
    assert {run.operator for run in profiled.end_profile()} >= {"Attention"}


def test_one_state_at_a_time_never_loads_a_second_graph(engine, monkeypatch):
    monkeypatch.setattr("edgeformer.engines.onnxruntime.masked_graph", lambda _: pytest.fail("loaded again"))
    for _ in range(3):
        engine.forward(calls_of([engine.new_state()], (4,)))
