"""The native engine as a whole: right against onnx, the same bits however it is run, clear refusals."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import numpy as np
import onnx
import pytest
from onnx.reference import ReferenceEvaluator
from support import tiny
from support.tiny import IDS, logits

native = pytest.importorskip("edgeformer._native", reason="the native extension is not built")

from edgeformer.bundle.bundle import Bundle
from edgeformer.engines.native import describe
from edgeformer.engines.native.engine import NativeEngine
from edgeformer.engines.native.ir import functions
from edgeformer.errors import EngineUnavailable, InputError


@pytest.fixture(scope="module")
def float_engine(lm):
    return NativeEngine.from_bundle(lm, threads=2, kv="float32")


@pytest.fixture(scope="module")
def engine(q8):
    return NativeEngine.from_bundle(q8, threads=2)


def reference(bundle, ids):
    """onnx's ReferenceEvaluator over the bundle's graph, an empty cache."""
    model = onnx.load(bundle / "model.onnx")
    feeds = {"input_ids": ids, "position_ids": np.broadcast_to(np.arange(ids.shape[1]), ids.shape)}
    for value in model.graph.input:
        if value.name.startswith("past_key_values"):
            dims = [d.dim_value for d in value.type.tensor_type.shape.dim]
            feeds[value.name] = np.zeros((ids.shape[0], dims[1], 0, dims[3]), np.float32)
    return ReferenceEvaluator(model).run(["logits"], feeds)[0]


def close(got, expected, relative):
    """The error's norm is at most `relative` of the expected values' norm."""
    assert got.shape == expected.shape
    assert np.linalg.norm(got - expected) <= relative * np.linalg.norm(expected)


# -- right ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ids", [IDS, np.concatenate([IDS, IDS[:, ::-1]]), IDS[:, :1]])
def test_a_float_bundle_agrees_with_onnx(ids, lm, float_engine):
    # 2 layers, each a chain of about 6 sums of up to 64 terms: 2 * 6 * sqrt(64) roundings of 2^-24 that add like noise
    close(logits(float_engine, ids), reference(lm, ids), 2 * 6 * 8 * 2**-24)


def test_an_int8_bundle_is_as_near_as_int8_activations_allow(q8, engine):
    """Rounding to absmax / 127 errs by at most absmax / 254: relative to a block's rms about 0.5 % in the rms, once for
    each of the 5 quantizations a layer and twice (q, and k or v) in attention, which add like noise over 2 layers."""
    close(logits(engine, IDS), reference(q8, IDS), 0.005 * np.sqrt(2 * 7))


def test_the_comparison_refuses_a_wrong_layer(q8, engine):
    expected = reference(q8, IDS)
    with pytest.raises(AssertionError):
        close(logits(engine, IDS[:, ::-1].copy()), expected, 0.005 * np.sqrt(2 * 7))


def test_float16_bundles_give_float16(bundles):
    engine = NativeEngine.from_bundle(bundles / "float16", threads=1, kv="float32")
    outputs = engine.forward([({"input_ids": IDS}, engine.new_state())])[0]
    got = outputs["logits"]
    assert got.dtype == np.float16 and outputs.likeliest is None  # equal logits may have been rounded from others
    close(got.astype(np.float32), reference(bundles / "float16", IDS).astype(np.float32), 2e-2)


def test_an_encoder_agrees_with_onnx(bundles):
    bundle = bundles / "forecast"
    engine = NativeEngine.from_bundle(bundle, threads=2)
    model = onnx.load(bundle / "model.onnx")
    value = model.graph.input[0]
    dims = [d.dim_value or {"batch": 3}.get(d.dim_param, 7) for d in value.type.tensor_type.shape.dim]
    x = np.random.default_rng(0).standard_normal(dims).astype(np.float32)
    outputs = engine.forward([({value.name: x}, engine.new_state())])[0]
    assert outputs.likeliest is None  # it has no logits of tokens
    (got,) = outputs.values()
    close(got, ReferenceEvaluator(model).run(None, {value.name: x})[0], 1e-5)


# -- the same bits ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cuts", [(11,), (1,) * 11, (3, 1, 7), (9, 2)])
def test_steps_give_the_bits_of_the_whole(cuts, engine):
    whole, state, at = logits(engine, IDS), engine.new_state(), 0
    for n in cuts:
        got = logits(engine, IDS[:, at : at + n], state)
        np.testing.assert_array_equal(got, whole[:, at : at + n])
        at += n
        assert state.length == at


def test_every_isa_and_thread_count_gives_the_same_bits(q8):
    """Long enough that a decode step's attention is split into chunks and the prompt runs in two passes."""
    ids = np.random.default_rng(0).integers(0, 90, (1, 140))
    found = set()
    for isa in native.isas():
        for threads in (1, 2, 3, 8):
            engine = NativeEngine.from_bundle(q8, threads=threads, isa=isa)
            state = engine.new_state()
            steps = [logits(engine, ids[:, :137], state, logits_to_keep=1)]
            steps += [logits(engine, ids[:, i : i + 1], state) for i in range(137, 140)]
            found.add(np.concatenate(steps, axis=1).tobytes())
    assert len(found) == 1


def test_split_attention_whose_output_blocks_are_not_those_of_heads_is_quantized(tmp_path):
    """A head group's 16 columns are half a block, so the output is quantized after all parts of all heads are merged:
    here by all threads, since 8 rows over 18 KV chunks are more than one thread merges."""
    tiny.write_lm(tmp_path / "long", scheme="q8", positions=2400)
    ids, found = np.random.default_rng(0).integers(0, 90, (1, 2300)), set()
    for threads in (1, 2, 3):
        engine = NativeEngine.from_bundle(tmp_path / "long", threads=threads, context=2400)
        state = engine.new_state()
        logits(engine, ids[:, :2292], state, logits_to_keep=1)
        found.add(logits(engine, ids[:, 2292:], state).tobytes())
    assert len(found) == 1


def test_a_prompt_longer_than_one_pass_gives_the_bits_of_its_steps(lm, monkeypatch):
    import edgeformer.engines.native.engine as module

    whole = logits(NativeEngine.from_bundle(lm, threads=2), IDS)
    monkeypatch.setattr(module, "PREFILL_ROWS", 4)
    cut = NativeEngine.from_bundle(lm, threads=2)
    np.testing.assert_array_equal(logits(cut, IDS), whole)
    np.testing.assert_array_equal(logits(cut, IDS, logits_to_keep=6), whole[:, -6:])
    both = np.concatenate([IDS, IDS[:, ::-1]])
    np.testing.assert_array_equal(logits(cut, both)[0], whole[0])


def test_states_run_together_as_they_would_alone(engine):
    parts = [IDS[:, :5], IDS[:, 3:4], IDS, np.concatenate([IDS[:, :2], IDS[:, 5:7]])]
    states = [engine.new_state() for _ in parts]
    alone = [engine.new_state() for _ in parts]
    for _ in range(2):
        got = engine.forward([({"input_ids": p}, s) for p, s in zip(parts, states, strict=True)])
        for part, state, result in zip(parts, alone, got, strict=True):
            np.testing.assert_array_equal(result["logits"], logits(engine, part, state))


def test_only_the_kept_logits_come_back(engine):
    whole = logits(engine, IDS)
    for keep in (1, 2, 11, 99):
        np.testing.assert_array_equal(logits(engine, IDS, logits_to_keep=keep), whole[:, -keep:])


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_engine_says_which_logit_is_the_largest(threads, q8):
    engine = NativeEngine.from_bundle(q8, threads=threads)
    both = np.concatenate([IDS, IDS[:, ::-1]])
    for calls in ([(IDS, 0)], [(IDS, 1)], [(both, 3)], [(IDS[:, :5], 2), (IDS[:, 3:4], 1), (both, 0)]):
        given = [({"input_ids": ids, "logits_to_keep": keep}, engine.new_state()) for ids, keep in calls]
        for outputs in engine.forward(given):
            assert list(outputs) == ["logits"]
            np.testing.assert_array_equal(outputs.likeliest, outputs["logits"].argmax(-1))


def test_positions_continue_and_may_be_given(engine):
    whole, state = logits(engine, IDS), engine.new_state()
    logits(engine, IDS[:, :4], state)
    got = logits(engine, IDS[:, 4:], state, position_ids=np.arange(4, 11)[None])
    np.testing.assert_array_equal(got, whole[:, 4:])
    assert not np.array_equal(logits(engine, IDS, position_ids=np.arange(11)[None] + 7)[0, -1], whole[0, -1])


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, "input_ids"),
        ({"input_ids": IDS.astype(np.float32)}, "dtype float32, expected int64"),
        ({"input_ids": IDS[0]}, r"shape \[11\], expected \[batch, sequence\]"),
        ({"input_ids": IDS[:, :0]}, "nothing to compute"),
        ({"input_ids": IDS + 100000}, "expected 0 to"),
        ({"input_ids": IDS, "position_ids": np.arange(5)[None]}, "is 5 but axis 1 of input_ids is 11"),
        ({"input_ids": IDS, "logits_to_keep": -1}, "logits_to_keep is -1"),
        ({"input_ids": IDS, "attention_mask": np.ones_like(IDS)}, "unknown input"),
    ],
)
def test_wrong_inputs_are_refused_and_change_nothing(inputs, message, engine):
    state = engine.new_state()
    logits(engine, IDS[:, :2], state)
    with pytest.raises(InputError, match=message):
        engine.forward([(inputs, state)])
    assert state.length == 2
    np.testing.assert_array_equal(logits(engine, IDS[:, 2:], state), logits(engine, IDS)[:, 2:])


def test_a_full_context_is_refused_before_anything_changes(q8):
    engine = NativeEngine.from_bundle(q8, threads=1, context=16)
    state = engine.new_state()
    logits(engine, IDS, state)
    with pytest.raises(InputError, match=r"holds 11 tokens and the call brings 6; .* 16"):
        logits(engine, IDS[:, :6], state)
    assert state.length == 11
    logits(engine, IDS[:, :5], state)


def test_another_batch_size_in_a_state_is_refused(engine):
    state = engine.new_state()
    logits(engine, IDS, state)
    with pytest.raises(InputError, match="2 sequences, the state holds 1"):
        logits(engine, np.concatenate([IDS, IDS]), state)


@pytest.mark.parametrize(
    ("name", "kv", "why"),
    [("float", "float32", "float"), ("float16", "float32", "float"), ("q8", "int8", "quantized")],
)
def test_the_cache_type_follows_the_weights_unless_it_is_given(name, kv, why, bundles):
    import edgeformer

    other = "int8" if kv == "float32" else "float32"
    found = {asked: edgeformer.load(bundles / name, "native", 1, kv=asked) for asked in ("auto", kv, other)}
    default = edgeformer.load(bundles / name, "native", 1)
    got = {asked: logits(model.engine, IDS).tobytes() for asked, model in found.items()}
    assert logits(default.engine, IDS).tobytes() == got["auto"] == got[kv] != got[other]
    assert f"{kv} cache: its weights are {why}" in str(default.explain())
    assert f"{other} cache: kv={other!r}" in str(found[other].explain())


def test_a_model_without_a_cache_does_not_mention_one(bundles):
    import edgeformer

    assert "cache" not in str(edgeformer.load(bundles / "forecast", "native").explain())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"isa": "avx1024"}, EngineUnavailable, "scalar"),
        ({"kv": "int4"}, InputError, "auto, int8, float32"),
        ({"threads": 0}, InputError, "threads"),
        ({"context": 0}, InputError, "context"),
        ({"memory_limit": 1000}, EngineUnavailable, "the limit is 1,000"),
    ],
)
def test_wrong_options_are_refused(options, error, message, q8):
    with pytest.raises(error, match=message):
        NativeEngine.from_bundle(q8, **options)


def test_scales_beyond_float16_are_refused(tmp_path, q8):
    model = onnx.load(q8 / "model.onnx")
    scale = next(t for t in model.graph.initializer if t.name.endswith(".scale"))
    values = onnx.numpy_helper.to_array(scale).copy()
    values.flat[3] = 65520  # rounds to infinity
    scale.CopyFrom(onnx.numpy_helper.from_array(values, scale.name))
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(EngineUnavailable, match="float16"):
        NativeEngine.from_bundle(tmp_path / "model.onnx")


def test_a_bundle_with_such_scales_runs_on_onnxruntime_and_says_why(copy_of, reseal, edit_manifest, q8):
    pytest.importorskip("onnxruntime")
    import edgeformer

    bundle = copy_of(q8)
    model = onnx.load(bundle / "model.onnx")
    scale = next(t for t in model.graph.initializer if t.name.endswith(".scale"))
    values = onnx.numpy_helper.to_array(scale).copy()
    values.flat[3] = 65520
    scale.CopyFrom(onnx.numpy_helper.from_array(values, scale.name))
    for name in ("model.onnx", "model.onnx.data"):
        (bundle / name).unlink(missing_ok=True)
    onnx.save(model, bundle / "model.onnx", save_as_external_data=True, location="model.onnx.data", size_threshold=256)
    edit_manifest(bundle, lambda manifest: manifest.update(reference=None))  # it is of the weights before
    reseal(bundle)
    choice = edgeformer.load(bundle).explain()
    assert choice.engine == "cpu"
    assert "float16" in choice.reasons["native"]


# -- memory and description -------------------------------------------------------------------------------------------


def test_memory_is_predicted(engine):
    small, large = engine.memory(128), engine.memory(256)
    assert small.weights == large.weights > 0
    assert large.kv == 2 * small.kv
    assert small.total == small.weights + small.kv + small.scratch
    state = engine.new_state()
    logits(engine, np.zeros((1, 100), np.int64), state)
    assert state.nbytes <= small.kv


@pytest.mark.parametrize("tokens", [0, 1, 127, 128, 129, 256])
def test_a_state_has_the_bytes_that_the_engine_predicts(engine, tokens):
    state = engine.new_state()
    for start in range(0, tokens, 100):
        logits(engine, np.zeros((1, min(100, tokens - start)), np.int64), state)
    assert state.nbytes == engine.kv_bytes(tokens)
    with pytest.raises(InputError, match="-1"):
        engine.kv_bytes(-1)


def test_programs_use_the_names_of_the_extension():
    """A program carries names, and csrc/program/names.h maps them: the lists of both languages are the same."""
    from edgeformer.engines.native.ir.weight import WEIGHT_TYPES
    from edgeformer.engines.native.program import emit
    from edgeformer.engines.native.program.program import LANES

    mine = {
        "unary": functions.UNARY_FUNCTIONS,
        "binary": tuple(emit.ELEMENTWISE.values()),
        "pointwise": functions.POINTWISE_FUNCTIONS,
        "reduce": emit.REDUCTIONS,
        "scatter": emit.SCATTERS,
        "weight": WEIGHT_TYPES,
    }
    assert {kind: set(native.NAMES[kind]) for kind in mine} == {kind: set(names) for kind, names in mine.items()}
    assert native.LANES == LANES


@pytest.mark.parametrize("part", ["slots", "weights", "ops", "functions"])
def test_an_unknown_name_in_a_program_is_refused(part, q8):
    from edgeformer.engines.native.program.executable import load_executable

    program = load_executable(q8 / "model.onnx").program
    if part == "functions":
        next(op for op in program["ops"] if op["kind"] == "linear")["names"]["activation"][0] = "frob"
    else:
        key = {"slots": "dtype", "weights": "type", "ops": "kind"}[part]
        program[part][0] = program[part][0] | {key: "frob"}
    with pytest.raises(EngineUnavailable, match="'frob', which this build does not know"):
        native.Engine(program, 1, "", "int8", 64, 64)


def test_the_program_is_described(q8):
    text = describe(q8)
    assert "states run together" in text
    layers = text.count(" attend ")
    assert layers == tiny.LAYERS
    operations = sum(line.lstrip()[:1].isdigit() for line in text.splitlines())
    assert operations <= 7 * layers + 8


def test_time_by_operation_is_reported(engine):
    with engine.profile() as report:
        logits(engine, IDS)
    assert report.runs == 1
    assert len(report.nanoseconds) == len(engine.program.ops)
    assert "attend" in str(report) and "GB/s" in str(report)


def test_the_engine_needs_neither_torch_nor_onnxruntime(q8):
    code = textwrap.dedent(f"""
        import sys
        for name in ("torch", "onnxruntime", "transformers"):
            sys.modules[name] = None
        import numpy as np
        from edgeformer.engines.native.engine import NativeEngine
        e = NativeEngine.from_bundle({str(q8)!r})
        assert e.forward([({{"input_ids": np.array([[1, 2]])}}, e.new_state())])[0]["logits"].shape[1] == 2
    """)
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_a_bundle_object_and_a_path_are_the_same(q8, engine):
    again = NativeEngine.from_bundle(Bundle.open(q8), threads=2)
    np.testing.assert_array_equal(logits(again, IDS), logits(engine, IDS))
