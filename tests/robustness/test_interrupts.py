"""Ctrl-C in the middle of a long pass of the native engine: it comes at once, and nothing has changed.

The pass is long because the scalar kernels run it, so the bounds are parts of its own time, not of a second.
"""

from __future__ import annotations

import pytest
from support import tiny
from support.own_process import run

# Interrupts are sent after a fifth of the call: without a poll they would wait for four fifths of it. The engine polls
# every 50 ms and the call takes 0.7 s or more; a third leaves room for a busy machine, the median for one bad moment.
START = """
import statistics
from edgeformer.engines.native.engine import NativeEngine
engine = NativeEngine.from_bundle(PATH, threads=int(ENGINE), isa="scalar")
def step(state, ids):
    return engine.forward([({"input_ids": ids, "logits_to_keep": 1}, state)])[0]["logits"]
def ids(n):
    return np.array([[3 + i % 300 for i in range(n)]])
began = time.perf_counter()
step(engine.new_state(), ids(256))
rows = int(256 * min(8, max(1, 0.7 / (time.perf_counter() - began))))  # of a call that takes 0.7 s or more
IDS = ids(rows)
began = time.perf_counter()
expected = step(engine.new_state(), IDS)
whole = time.perf_counter() - began
def interrupted(work):
    sent = []
    def send():
        time.sleep(whole / 5)
        sent.append(time.perf_counter())
        os.kill(os.getpid(), signal.SIGINT)
    other = threading.Thread(target=send)
    try:
        other.start()
        work()
    except KeyboardInterrupt:
        latency = time.perf_counter() - sent[0]
    else:
        latency = float("inf")
    other.join()
    return latency
"""


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A decoder whose passes take long on the scalar kernels."""
    with pytest.MonkeyPatch.context() as patch:
        sizes = {"HEADS": 8, "KV_HEADS": 4, "HEAD_DIM": 32, "HIDDEN": 256, "INNER": 512}
        for name, value in sizes.items():
            patch.setattr(tiny, name, value)
        path = tmp_path_factory.mktemp("wide") / "b"
        return tiny.write_lm(path, scheme="q8", positions=4096, with_reference=False)


@pytest.mark.parametrize("threads", ["1", "2"])
def test_ctrl_c_comes_within_a_pass_and_the_state_is_as_before(wide, threads):
    run(
        START
        + """
latencies, state = [], engine.new_state()
for _ in range(3):
    latencies.append(interrupted(lambda: step(state, IDS)))
    assert state.length == 0, state.length
assert statistics.median(latencies) < whole / 3, (latencies, whole)
assert np.array_equal(step(state, IDS), expected)
# A state that holds tokens keeps them, and only them.
fork = state.fork()
after = step(state, IDS[:, :200])
latency = interrupted(lambda: step(fork, np.concatenate([IDS[:, :200], IDS[:, :100]], 1)))
assert fork.length == rows + (0 if latency < float("inf") else 300)
fork.truncate(rows)
assert np.array_equal(step(fork, IDS[:, :200]), after)
""",
        wide,
        threads,
    )


def test_ctrl_c_comes_while_another_thread_has_the_engine(wide):
    run(
        START
        + """
latencies = []
for _ in range(3):
    found = []
    other = threading.Thread(target=lambda: found.append(step(engine.new_state(), IDS)))
    def work():
        other.start()
        time.sleep(whole / 20)
        step(engine.new_state(), IDS[:, :1])
    latencies.append(interrupted(work))
    other.join()
    assert np.array_equal(found[0], expected)  # the other thread is not disturbed
assert statistics.median(latencies) < whole / 3, (latencies, whole)
""",
        wide,
        "1",
    )


def test_ctrl_c_leaves_a_scheduler_without_waiting_for_its_step(wide):
    run(
        START
        + """
os.environ["EDGEFORMER_ISA"] = "scalar"
model = load(PATH, "native", threads=1)
def work():
    with model.scheduler(max_sequences=2) as scheduler:
        scheduler.add(IDS[0].tolist(), max_new_tokens=2).result()
latencies = [interrupted(work) for _ in range(3)]
assert statistics.median(latencies) < whole / 3, (latencies, whole)
assert model.generate(IDS[0].tolist(), max_new_tokens=1, ignore_eos=True).ids == [int(expected.argmax())]
""",
        wide,
        "1",
    )


def test_a_signal_handler_that_calls_the_model_gets_an_error_and_not_a_deadlock(wide):
    run(
        START
        + """
found = []
def handler(*_):
    try:
        step(engine.new_state(), IDS[:, :1])
    except StateError as error:
        found.append(str(error))
signal.signal(signal.SIGALRM, handler)
signal.setitimer(signal.ITIMER_REAL, whole / 5)
assert np.array_equal(step(engine.new_state(), IDS), expected)  # a handler that raises nothing stops nothing
assert len(found) == 1 and "signal handler" in found[0], found
""",
        wide,
        "1",
    )


def test_an_exception_of_any_handler_ends_the_pass(wide):
    run(
        START
        + """
def handler(*_):
    raise TimeoutError("too long")
signal.signal(signal.SIGALRM, handler)
signal.setitimer(signal.ITIMER_REAL, whole / 5)
state = engine.new_state()
began = time.perf_counter()
try:
    step(state, IDS)
except TimeoutError:
    assert time.perf_counter() - began < whole * 0.7
else:
    raise AssertionError("the pass ended")
assert state.length == 0
assert np.array_equal(step(state, IDS), expected)
""",
        wide,
        "1",
    )


def test_an_interrupted_call_of_onnx_runtime_leaves_all_its_states_as_they_were(wide):
    """Of two sequences in one call the first had run when Ctrl-C came: its tokens are not appended either."""
    run(
        """
        import statistics
        engine = load(PATH, "cpu", threads=1).engine
        def ids(n, first):
            return np.array([[3 + (first + i) % 300 for i in range(n)]])
        def step(states, n):
            calls = [({"input_ids": ids(n, k), "logits_to_keep": 1}, state) for k, state in enumerate(states)]
            return [row["logits"] for row in engine.forward(calls)]
        def held(n):
            states = [engine.new_state(), engine.new_state()]
            step(states, n)
            return states
        began = time.perf_counter()
        step(held(3), 2000)
        whole = time.perf_counter() - began
        expected = step(held(3), 7)
        left, latencies = 0, []
        for part in (0.2, 0.4, 0.6, 0.75, 0.85):
            states, sent = held(3), []
            def send():
                time.sleep(whole * part)
                sent.append(time.perf_counter())
                os.kill(os.getpid(), signal.SIGINT)
            other = threading.Thread(target=send)
            try:
                other.start()
                step(states, 2000)
                other.join()
                time.sleep(1)
            except KeyboardInterrupt:
                latencies.append(time.perf_counter() - sent[0])
            other.join()
            if states[0].length == 2003:
                continue  # the call had ended
            left += 1
            assert [state.length for state in states] == [3, 3], [state.length for state in states]
            assert all(map(np.array_equal, step(states, 7), expected))
        assert left >= 2, (left, whole)
        # It comes between two nodes of the graph, of which a pass has dozens.
        assert statistics.median(latencies) < whole / 3, (latencies, whole)
        """,
        wide,
        "cpu",
    )


def test_work_that_looks_for_no_signals_fails_the_checks_of_this_file(wide):
    """A planted defect: one long call in C that frees the GIL, as a pass without polls would."""
    run(
        START
        + """
import hashlib
def deaf(n):
    hashlib.pbkdf2_hmac("sha256", b"x", b"y", n)
began = time.perf_counter()
deaf(100_000)
n = int(100_000 * whole / (time.perf_counter() - began))
latencies = [interrupted(lambda: deaf(n)) for _ in range(3)]
assert statistics.median(latencies) >= whole / 3, (latencies, whole)
""",
        wide,
        "1",
    )
