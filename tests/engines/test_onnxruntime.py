"""The ONNX Runtime engine: right numbers in any split, every wrong call refused, never another provider in silence."""

from __future__ import annotations

import os
import threading

import numpy as np
import onnx
import pytest
from onnx.reference import ReferenceEvaluator
from support import tiny

from edgeformer.bundle.bundle import Bundle
from edgeformer.engines import ort_install
from edgeformer.engines.onnxruntime import OrtEngine
from edgeformer.errors import BundleError, EngineUnavailable, InputError, StateError

IDS = np.random.default_rng(5).integers(3, 300, (2, 12))


@pytest.fixture(scope="module", params=["float", "q8", "float16"])
def engine(request, bundles):
    return OrtEngine(Bundle.open(bundles / request.param), threads=1)


@pytest.fixture(scope="module")
def float_engine(lm):
    return OrtEngine(Bundle.open(lm), threads=1)


def _logits(engine, state, ids, **more):
    return engine.forward([({"input_ids": ids, **more}, state)])[0]["logits"]


def _close(got, expected):
    # One rounding of the activations to int8 may fall on the other side; float16 keeps 11 bits.
    assert got.shape == expected.shape
    span = float(np.ptp(expected.astype(np.float64)))
    worst = np.abs(got.astype(np.float64) - expected.astype(np.float64)).max() / span
    assert worst < (1e-3 if expected.dtype == np.float16 else 1e-5), worst


# -------------------------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize("splits", [(5, 1, 1, 1, 2, 2), (12,), (1,) * 12, (11, 1)])
def test_any_split_of_the_tokens_gives_the_same_logits(engine, splits):
    whole = _logits(engine, engine.new_state(), IDS)
    state, parts, start = engine.new_state(), [], 0
    for length in splits:
        parts.append(_logits(engine, state, IDS[:, start : start + length]))
        start += length
        assert state.length == start
    _close(np.concatenate(parts, axis=1), whole)


def test_the_float_engine_agrees_with_onnx_reference_implementation(lm, float_engine):
    model = onnx.load(str(lm / "model.onnx"))
    feed = {"input_ids": IDS[:1], "position_ids": np.arange(12)[None], "logits_to_keep": np.array(0)}
    for value in model.graph.input:
        if value.name.startswith("past_key_values."):
            feed[value.name] = np.zeros((1, tiny.KV_HEADS, 0, tiny.HEAD_DIM), np.float32)
    expected = ReferenceEvaluator(model).run(["logits"], feed)[0]
    _close(_logits(float_engine, float_engine.new_state(), IDS[:1]), expected)


def test_position_ids_continue_from_the_state_when_left_out(float_engine):
    explicit, implied = float_engine.new_state(), float_engine.new_state()
    for start in (0, 4):
        part = IDS[:, start : start + 4]
        positions = np.broadcast_to(np.arange(start, start + 4), part.shape)
        a = _logits(float_engine, explicit, part, position_ids=positions)
        b = _logits(float_engine, implied, part)
        assert np.array_equal(a, b)


@pytest.mark.parametrize("keep", [1, 3, 12])
def test_only_the_wanted_logits_are_computed(engine, keep):
    whole = _logits(engine, engine.new_state(), IDS)
    kept = _logits(engine, engine.new_state(), IDS, logits_to_keep=keep)
    _close(kept, whole[:, -keep:])


def test_a_batch_of_states_is_run_in_order(float_engine):
    states = [float_engine.new_state() for _ in range(3)]
    calls = [({"input_ids": IDS[:1, :n]}, state) for n, state in zip((3, 1, 7), states, strict=True)]
    outputs = float_engine.forward(calls)
    assert [output["logits"].shape[1] for output in outputs] == [3, 1, 7]
    assert [state.length for state in states] == [3, 1, 7]


def test_a_truncated_state_forgets(engine):
    state = engine.new_state()
    whole = _logits(engine, state, IDS)
    state.truncate(5)
    assert state.length == 5
    _close(_logits(engine, state, IDS[:, 5:]), whole[:, 5:])
    state.truncate(0)
    _close(_logits(engine, state, IDS[:1]), whole[:1])  # an empty state takes another batch size
    with pytest.raises(InputError, match="12 tokens cannot be cut to 13"):
        state.truncate(13)
    with pytest.raises(InputError, match="cannot be cut to -1"):
        state.truncate(-1)


def test_the_bytes_of_a_state_are_those_of_its_tensors(engine):
    state = engine.new_state()
    assert state.nbytes == engine.kv_bytes(0) == 0
    _logits(engine, state, IDS)
    assert state.nbytes == sum(value.numpy().nbytes for value in state.cache)
    assert state.nbytes == len(IDS) * engine.kv_bytes(IDS.shape[1])
    with pytest.raises(InputError, match="-1"):
        engine.kv_bytes(-1)


def test_a_state_restored_from_chunks_goes_on(float_engine, q8):
    ids = np.random.default_rng(6).integers(3, 90, (1, 250))
    state = float_engine.new_state()
    whole = _logits(float_engine, state, ids)
    chunks = state.chunks()
    assert [chunk.nbytes for chunk in chunks] == [float_engine.kv_bytes(128)]
    assert state.chunks(1) == float_engine.new_state().chunks() == []
    for length in (128, 127, 1):
        restored = float_engine.new_state()
        assert restored.restore(chunks, length) == restored.length == length
        _close(_logits(float_engine, restored, ids[:, length:]), whole[:, length:])
    with pytest.raises(StateError, match="250 tokens; restore needs an empty one"):
        state.restore(chunks, 1)
    for count in (129, -1):
        with pytest.raises(InputError, match=f"1 chunks cannot restore {count}"):
            float_engine.new_state().restore(chunks, count)
    other = OrtEngine(Bundle.open(q8), threads=1)
    with pytest.raises(StateError, match="another engine"):
        other.new_state().restore(chunks, 128)
    pair = float_engine.new_state()
    _logits(float_engine, pair, np.concatenate([ids, ids]))
    with pytest.raises(InputError, match="holds 2"):
        pair.chunks()


def test_a_fork_and_its_origin_never_meet(engine):
    state = engine.new_state()
    _logits(engine, state, IDS[:, :6])
    fork = state.fork()
    other = _logits(engine, fork, IDS[:, :3])
    assert (state.length, fork.length) == (6, 9)
    again = engine.new_state()
    expected = _logits(engine, again, IDS)[:, 6:]
    _close(_logits(engine, state, IDS[:, 6:]), expected)
    fork.truncate(6)
    _close(_logits(engine, fork, IDS[:, :3]), other)


def test_the_device_path_gives_the_same_logits_as_arrays(lm, float_engine):
    """The cache lives in OrtValues; what they hold is what plain onnxruntime returns."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(lm / "model.onnx"), providers=["CPUExecutionProvider"])
    feed = {"input_ids": IDS, "position_ids": np.broadcast_to(np.arange(12), IDS.shape)}
    for value in session.get_inputs():
        if value.name.startswith("past_key_values."):
            feed[value.name] = np.zeros((2, tiny.KV_HEADS, 0, tiny.HEAD_DIM), np.float32)
    names = [value.name for value in session.get_outputs()]
    plain = dict(zip(names, session.run(None, feed), strict=True))
    state = float_engine.new_state()
    _close(_logits(float_engine, state, IDS), plain["logits"])
    for value, name in zip(state.cache, float_engine.signature.caches.values(), strict=True):
        _close(value.numpy(), plain[name])


def test_the_quantized_linears_are_fused(q8):
    from edgeformer.tools.doctor import fused_weights

    assert fused_weights(Bundle.open(q8)) == (15, 0)  # 7 in each of 2 layers, and the tied head


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_are_always_set(lm, threads):
    options = OrtEngine(Bundle.open(lm), threads=threads)._session.get_session_options()
    assert (options.intra_op_num_threads, options.inter_op_num_threads) == (threads, 1)
    quiet = OrtEngine(Bundle.open(lm), threads=threads, spin=False)._session.get_session_options()
    assert quiet.get_session_config_entry("session.intra_op.allow_spinning") == "0"
    assert OrtEngine(Bundle.open(lm))._session.get_session_options().intra_op_num_threads >= 1


def test_an_engine_without_cache_runs_arrays(bundles):
    engine = OrtEngine(Bundle.open(bundles / "forecast"), threads=1)
    state = engine.new_state()
    values = np.random.default_rng(0).standard_normal((3, 7, 5))
    outputs = engine.forward([({"values": values.astype(">f4")}, state)])[0]  # another byte order is converted
    assert outputs["forecast"].shape == (3, 7, 3)
    assert state.length == 0
    with pytest.raises(InputError, match=r"values has size 4 on axis 2, expected 5"):
        engine.forward([({"values": values[:, :, :4]}, state)])


# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        ([[1.0]], "type float64, expected int64"),
        ([[True]], "type bool"),
        ([["a"]], "type <U1"),
        ([[None]], "type object"),
        ([[-1]], "token id -1, the model knows 0 to 319"),
        ([[320]], "token id 320"),
        ([[2**31]], "token id 2147483648"),
        (np.array([[2**63]], np.uint64), "too large for int64"),
        ([[]], "is empty"),
        ([], "is empty"),
        ([1], r"shape \[1\], expected \[batch, sequence\]"),
        ([[[1]]], r"shape \[1, 1, 1\]"),
        ([[1], [1, 2]], "ragged"),
    ],
)
def test_wrong_token_ids_are_refused_and_the_state_stays(float_engine, ids, expected):
    state = float_engine.new_state()
    _logits(float_engine, state, IDS[:1, :3])
    with pytest.raises(InputError, match=expected):
        _logits(float_engine, state, ids)
    assert state.length == 3
    _logits(float_engine, state, IDS[:1, 3:4])


@pytest.mark.parametrize(
    "form",
    [
        np.asfortranarray,
        lambda a: a.astype(np.int32),
        lambda a: a.astype(">i8"),
        lambda a: a[:, ::1],
        np.ndarray.tolist,
    ],
)
def test_any_layout_of_whole_numbers_is_taken(float_engine, form):
    expected = _logits(float_engine, float_engine.new_state(), IDS)
    wide = np.repeat(IDS, 2, axis=1)[:, ::2]  # not contiguous
    wide.setflags(write=False)
    assert np.array_equal(_logits(float_engine, float_engine.new_state(), form(wide)), expected)


def test_all_problems_of_the_inputs_are_in_one_message(float_engine):
    call = {"ids": [[1]], "position_ids": [[0.5]], "logits_to_keep": -1}
    with pytest.raises(InputError) as error:
        float_engine.forward([(call, float_engine.new_state())])
    for part in ("ids is not an input", "input_ids is missing", "position_ids has elements", "logits_to_keep is -1"):
        assert part in str(error.value)


def test_axes_of_one_name_must_agree(float_engine):
    with pytest.raises(InputError, match="position_ids has sequence = 2, but input_ids has 1"):
        _logits(float_engine, float_engine.new_state(), [[1]], position_ids=[[0, 1]])
    state = float_engine.new_state()
    _logits(float_engine, state, IDS)
    with pytest.raises(InputError, match="input_ids has batch = 1, but the state has 2"):
        _logits(float_engine, state, IDS[:1])


def test_the_context_is_a_limit_that_is_named(float_engine):
    state = float_engine.new_state()
    _logits(float_engine, state, np.full((1, tiny.POSITIONS), 5))  # exactly full
    with pytest.raises(InputError, match=r"position 256 lies past the end: the model has 256 positions \(max_po"):
        _logits(float_engine, state, [[5]])
    with pytest.raises(InputError, match="position 256"):
        _logits(float_engine, float_engine.new_state(), [[5]], position_ids=[[256]])
    with pytest.raises(InputError, match="position_ids holds -1"):
        _logits(float_engine, float_engine.new_state(), [[5]], position_ids=[[-1]])


def test_one_state_in_two_calls_at_once_raises(float_engine):
    state = float_engine.new_state()
    with pytest.raises(StateError, match="in use by another call"):
        float_engine.forward([({"input_ids": [[5]]}, state), ({"input_ids": [[6]]}, state)])
    assert state.length == 0
    with state.lock, pytest.raises(StateError, match="in use"):
        _logits(float_engine, state, [[5]])
    with state.lock, pytest.raises(StateError, match="in use"):
        state.fork()
    _logits(float_engine, state, [[5]])


def test_many_threads_with_a_state_each_get_their_own_logits(float_engine):
    expected = [_logits(float_engine, float_engine.new_state(), IDS[:1, i : i + 4]) for i in range(8)]
    wrong = []

    def work(i):
        for _ in range(20):
            if not np.array_equal(_logits(float_engine, float_engine.new_state(), IDS[:1, i : i + 4]), expected[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_state_of_another_engine_is_refused(lm, float_engine):
    other = OrtEngine(Bundle.open(lm), threads=1)
    with pytest.raises(StateError, match="belongs to another engine"):
        _logits(float_engine, other.new_state(), [[5]])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_raises_instead_of_hanging(float_engine):
    pid = os.fork()
    if pid == 0:
        try:
            _logits(float_engine, float_engine.new_state(), [[5]])
        except StateError:
            os._exit(7)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
    _logits(float_engine, float_engine.new_state(), [[5]])


@pytest.mark.parametrize("threads", [0, -1, 1.5, True, 5000])
def test_a_wrong_number_of_threads_is_refused(lm, threads):
    with pytest.raises(InputError, match="threads is"):
        OrtEngine(Bundle.open(lm), threads=threads)


def test_a_manifest_that_lies_about_the_graph_is_refused(lm, copy_of, edit_manifest):
    damaged = copy_of(lm)
    edit_manifest(damaged, lambda m: m["graphs"]["model"]["inputs"].pop("position_ids"))
    with pytest.raises(BundleError, match="disagree about the inputs: position_ids"):
        OrtEngine(Bundle.open(damaged), threads=1)


# ------------------------------------------------------------------------------------------------------------ providers


def test_cuda_on_a_machine_without_it_raises_and_says_why(lm):
    if ort_install.cuda_driver_problem() is None and "onnxruntime-gpu" in ort_install.installed_wheels():
        assert OrtEngine(Bundle.open(lm), "cuda")._session.get_providers()[0] == "CUDAExecutionProvider"
        return
    with pytest.raises(EngineUnavailable, match="CUDA"):
        OrtEngine(Bundle.open(lm), "cuda")


def test_an_unknown_provider_is_refused(lm):
    with pytest.raises(InputError, match="provider is 'tpu'"):
        OrtEngine(Bundle.open(lm), "tpu")
