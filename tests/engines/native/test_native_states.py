"""States of the native engine: length, forks, bytes, threads and forked processes."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
from support.tiny import IDS, logits

native = pytest.importorskip("edgeformer._native", reason="the native extension is not built")

from edgeformer.engines.native.engine import NativeEngine
from edgeformer.engines.native.options import NativeOptions
from edgeformer.errors import InputError, StateError

KINDS = {
    "int8": NativeOptions(kv="int8"),
    "float32": NativeOptions(kv="float32"),
    "mixed": NativeOptions(kv="int8", float32_layers=(1,)),
}


@pytest.fixture(scope="module", params=["int8", "mixed"])
def engine(request, q8):
    """Layers with an int8 cache; `mixed`: the second one's is float32."""
    return NativeEngine.create(q8, "model", 2, KINDS[request.param])


def test_a_fork_and_its_source_are_independent(engine):
    state = engine.new_state()
    logits(engine, IDS[:, :6], state)
    copy = state.fork()
    first = logits(engine, IDS[:, 6:9], state)
    logits(engine, IDS[:, 2:5], copy)
    again = state.fork()
    again.truncate(6)
    np.testing.assert_array_equal(logits(engine, IDS[:, 6:9], again), first)
    assert (state.length, copy.length, again.length) == (9, 9, 9)


def test_truncate_forgets(engine):
    whole, state = logits(engine, IDS), engine.new_state()
    logits(engine, np.concatenate([IDS[:, :5], IDS[:, :4]], axis=1), state)
    state.truncate(5)
    np.testing.assert_array_equal(logits(engine, IDS[:, 5:], state), whole[:, 5:])
    for wrong in (-1, 12):
        with pytest.raises(InputError, match="holds 11"):
            state.truncate(wrong)


def test_a_state_is_restored_from_bytes(engine, q8, lm):
    state = engine.new_state()
    logits(engine, IDS[:, :6], state)
    data = state.to_bytes()
    mixed = len(engine.int8_layers) == 1
    kind, other = ("mixed", "int8") if mixed else ("int8", "mixed")
    other_process = NativeEngine.create(q8, "model", 1, KINDS[kind])
    back = other_process.state_from_bytes(data)
    np.testing.assert_array_equal(logits(other_process, IDS[:, 6:], back), logits(engine, IDS[:, 6:], state))
    with pytest.raises(StateError, match="belongs to model"):
        NativeEngine.from_bundle(lm, threads=1).state_from_bytes(data)
    for wrong in ("float32", other):
        with pytest.raises(StateError):
            NativeEngine.create(q8, "model", 1, KINDS[wrong]).state_from_bytes(data)
    for damaged in (data[:-1], data + b"x", data[5:], b"", data[:40]):
        with pytest.raises(StateError):
            engine.state_from_bytes(damaged)


def test_a_state_of_another_engine_is_refused(engine, lm):
    with pytest.raises(StateError, match="another model"):
        logits(engine, IDS, NativeEngine.from_bundle(lm, threads=1).new_state())


def test_one_state_twice_in_a_batch_is_refused(engine):
    state = engine.new_state()
    with pytest.raises(StateError, match="in use"):
        engine.forward([({"input_ids": IDS}, state), ({"input_ids": IDS}, state)])
    assert state.length == 0
    logits(engine, IDS, state)


@pytest.mark.parametrize("threads", [2, 3])
@pytest.mark.parametrize("pasts", [(0,), (1,), (7,), (1, 4, 7)], ids=str)
def test_a_prompt_goes_on_at_any_position_with_any_number_of_threads(q8, pasts, threads):
    """Two tokens share bytes of the int8 cache, and two threads must not write one such pair."""
    rng = np.random.default_rng(len(pasts))
    starts = [rng.integers(0, 90, (1, past)) for past in pasts]
    ids = [rng.integers(0, 90, (1, 90 + i)) for i in range(len(pasts))]  # 90, 91, 92: sequences begin at odd rows too

    def run(engine):
        states = [engine.new_state() for _ in pasts]
        for state, start in zip(states, starts, strict=True):
            if start.size:
                logits(engine, start, state)
        outputs = engine.forward([({"input_ids": i}, s) for i, s in zip(ids, states, strict=True)])
        return np.concatenate([o["logits"][0] for o in outputs])

    expected = run(NativeEngine.from_bundle(q8, threads=1))
    engine = NativeEngine.from_bundle(q8, threads=threads)
    assert [int((run(engine) != expected).any(-1).sum()) for _ in range(20)] == [0] * 20


def test_threads_with_separate_states_are_independent(engine):
    ids = np.random.default_rng(0).integers(0, 90, (1, 50))
    expected, wrong = logits(engine, ids), []

    def use():
        for _ in range(10):
            if not np.array_equal(logits(engine, ids), expected):
                wrong.append(1)

    threads = [threading.Thread(target=use) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


def test_one_state_in_two_threads_raises(engine):
    """One thread computes without pause. A call of another thread on its state raises, and changes nothing."""
    ids = np.random.default_rng(0).integers(0, 90, (1, 250))
    expected, state, stop, wrong = logits(engine, ids), engine.new_state(), threading.Event(), []

    def use():
        while not stop.is_set():
            try:
                state.truncate(0)
                got = logits(engine, ids, state)
            except StateError:
                continue  # the other thread's attempt had the state for a moment
            if not np.array_equal(got, expected):
                wrong.append(1)

    worker = threading.Thread(target=use)
    worker.start()
    try:
        deadline = time.monotonic() + 20
        refused: list[str] = []
        while len(refused) < 5:
            assert time.monotonic() < deadline, "the state was never in use"
            try:
                state.to_bytes()
            except StateError as error:
                refused.append(str(error))
    finally:
        stop.set()
        worker.join()
    assert not wrong
    assert all("in use" in message for message in refused)


def test_the_gil_is_free_during_a_forward(engine):
    ids = np.random.default_rng(0).integers(0, 90, (1, 250))
    ticks, stop = [0], threading.Event()

    def count():
        while not stop.is_set():
            ticks[0] += 1
            time.sleep(0)

    counter = threading.Thread(target=count)
    counter.start()
    try:
        before = ticks[0]
        started = time.perf_counter()
        while time.perf_counter() - started < 0.3:
            logits(engine, ids)
        assert ticks[0] > before + 20
    finally:
        stop.set()
        counter.join()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_works(q8):
    code = textwrap.dedent(f"""
        import os, sys, threading
        import numpy as np
        from edgeformer.engines.native.engine import NativeEngine
        e = NativeEngine.from_bundle({str(q8)!r}, threads=2)
        ids = np.arange(40)[None]
        run = lambda: e.forward([({{"input_ids": ids}}, e.new_state())])[0]["logits"]
        expected = run()
        stop = threading.Event()
        def busy():
            while not stop.is_set():
                run()
        t = threading.Thread(target=busy); t.start()
        codes = []
        for _ in range(5):
            pid = os.fork()
            if pid == 0:
                os._exit(0 if np.array_equal(run(), expected) else 3)
            codes.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        stop.set(); t.join()
        sys.exit(max(codes, key=abs))
    """)
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_the_fingerprint_of_a_bundle_comes_from_its_manifest(engine, q8, lm):
    """No reading of weights, and the same for a Bundle and its path; a bare graph file has its own."""
    from edgeformer.bundle.bundle import Bundle

    assert NativeEngine.from_bundle(Bundle.open(q8), threads=1)._fingerprint == engine._fingerprint
    assert NativeEngine.from_bundle(lm, threads=1)._fingerprint != engine._fingerprint
    assert NativeEngine.from_bundle(q8 / "model.onnx", threads=1)._fingerprint != engine._fingerprint


# -- shared chunks ----------------------------------------------------------------------------------------------------

PROMPT = np.random.default_rng(7).integers(0, 90, (1, 250))  # POSITIONS is 256


def run(engine, count):
    state = engine.new_state()
    logits(engine, PROMPT[:, :count], state)
    return state


def test_forks_share_their_chunks(engine):
    state = run(engine, 200)
    alone, fork = state.nbytes, state.fork()
    assert (state.nbytes, state.nbytes_shared) == (fork.nbytes, fork.nbytes_shared) == (0, alone)
    logits(engine, PROMPT[:, :1], fork)
    assert (fork.nbytes, fork.nbytes_shared) == (alone // 2, alone // 2)  # the second chunk was copied
    assert state.nbytes == alone // 2
    del fork
    assert state.nbytes == alone == engine.kv_bytes(200)


def test_beams_that_follow_one_row_share_it(engine):
    state = engine.new_state()
    rows = np.concatenate([PROMPT[:, :130], PROMPT[:, 20:150]])
    logits(engine, rows, state)
    expected = logits(engine, np.concatenate([PROMPT[:, 130:140]] * 2), _batch(engine, PROMPT[:, :130]))
    state.select([0, 0])
    assert state.nbytes == 0
    np.testing.assert_array_equal(logits(engine, np.concatenate([PROMPT[:, 130:140]] * 2), state), expected)


def _batch(engine, ids):
    state = engine.new_state()
    logits(engine, np.concatenate([ids, ids]), state)
    return state


@pytest.mark.parametrize("isa", native.isas())
@pytest.mark.parametrize("kv", KINDS)
def test_a_state_restored_from_chunks_goes_on_with_the_same_bits(q8, isa, kv):
    engine = NativeEngine.create(q8, "model", 2, replace(KINDS[kv], isa=isa))
    whole, state = logits(engine, PROMPT), run(engine, 250)
    chunks = state.chunks()
    assert [c.nbytes for c in chunks] == [engine.kv_bytes(128)]
    before = state.to_bytes()
    for length in (128, 127, 100, 1):
        restored = engine.new_state()
        assert restored.restore(chunks, length) == restored.length == length
        assert restored.nbytes == 0
        np.testing.assert_array_equal(logits(engine, PROMPT[:, length:], restored), whole[:, length:])
    assert state.to_bytes() == before


def test_every_isa_saves_a_chunk_as_the_same_bytes(q8):
    for options in KINDS.values():
        saved = set()
        for isa in native.isas():
            engine = NativeEngine.create(q8, "model", 1, replace(options, isa=isa))
            [chunk] = run(engine, 130).chunks()
            saved.add(chunk.save())
            assert engine.chunk_from_bytes(memoryview(chunk.save())).save() == chunk.save()
        assert len(saved) == 1


def test_chunks_that_do_not_fit_are_refused(engine, q8):
    state = run(engine, 130)
    [chunk] = state.chunks()
    other = NativeEngine.from_bundle(q8, threads=1)
    with pytest.raises(StateError, match="another engine"):
        other.new_state().restore([chunk], 128)
    with pytest.raises(StateError, match="another engine"):
        engine.new_state().restore([object()], 128)
    with pytest.raises(StateError, match="must be empty"):
        state.restore([chunk], 128)
    with pytest.raises(InputError, match="restore 129 of 128"):
        engine.new_state().restore([chunk], 129)
    with pytest.raises(InputError, match="one sequence"):
        _batch(engine, PROMPT[:, :130]).chunks()
    with pytest.raises(InputError, match="chunk -1"):
        state.chunks(-1)
    saved = chunk.save()
    for damaged in (b"", saved[:-1], saved + b"x", saved[:60], b"x" + saved[1:]):
        with pytest.raises(StateError, match="does not fit"):
            engine.chunk_from_bytes(damaged)
    with pytest.raises(StateError, match="not those of this model"):
        NativeEngine.from_bundle(q8, threads=1, kv="float32").chunk_from_bytes(saved)


def test_forks_in_several_threads_do_not_see_each_other(engine):
    """They share a chunk that each of them copies when it appends, while others read it."""
    whole, state, wrong = logits(engine, PROMPT), run(engine, 140), []

    def use(fork):
        for _ in range(10):
            mine = fork.fork()
            if not np.array_equal(logits(engine, PROMPT[:, 140:], mine), whole[:, 140:]):
                wrong.append(1)
            mine.truncate(135)
            if not np.array_equal(logits(engine, PROMPT[:, 135:], mine), whole[:, 135:]):
                wrong.append(2)

    threads = [threading.Thread(target=use, args=(state.fork(),)) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong
