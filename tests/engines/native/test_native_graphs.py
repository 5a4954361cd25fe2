"""Small decoder graphs in fused and decomposed forms: steps of the native engine against one run of onnx's."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx.reference import ReferenceEvaluator
from support import decoder_graphs

pytest.importorskip("edgeformer._native", reason="the native extension is not built")

from edgeformer.engines.native.engine import NativeEngine

LM, Builder = decoder_graphs.LM, decoder_graphs.Builder
ROWS, BATCH = 11, 2


def float_linear(g, x, _scheme="", n=48, k=64):
    """Instead of `decoder_graphs.quantized`: x @ W with float weights."""
    return g("MatMul", x, (np.random.default_rng(len(g.nodes)).standard_normal((k, n)) / np.sqrt(k)).astype(np.float32))


def rotate_half(g, x):
    cos, sin = decoder_graphs.table(g, False)
    return g("Add", g("Mul", x, cos), g("Mul", decoder_graphs.quarter_rotation(g, x, False), sin))


def rotate_pairs(g, x):
    cos, sin = decoder_graphs.table(g, True)
    return g("Add", g("Mul", x, cos), g("Mul", decoder_graphs.quarter_rotation(g, x, True), sin))


def layer(**options):
    def make(g):
        mask = options.get("mask")
        more = {k: v for k, v in options.items() if k != "mask"}
        return decoder_graphs.decoder_layer(g, mask=mask(g) if mask else "", **more)

    return make


def decomposed(causal):
    def make(g):
        q, new_k, new_v = (decoder_graphs.heads(g, float_linear(g, "x", n=32), 2) for _ in range(3))
        k, v = g("Concat", "pk", new_k, axis=2), g("Concat", "pv", new_v, axis=2)
        mask = (
            g("Where", decoder_graphs.window_mask(g, window=0, swap=True, op="LessOrEqual"), 0.0, -3e38)
            if causal
            else None
        )
        y = decoder_graphs.decomposed_attention(g, q, k, v, mask)
        return g("Reshape", g("Transpose", y, perm=[0, 2, 1, 3]), np.array([0, 0, 32])), k, v

    return make


def shared_history(g):
    """A second Attention on the first one's keys and values, and a sum of the keys: the joined tensors are read."""
    q, q2 = (decoder_graphs.heads(g, float_linear(g, "x", n=64), 4) for _ in range(2))
    k, v = (decoder_graphs.heads(g, float_linear(g, "x", n=32), 2) for _ in range(2))
    y, key, value = g("Attention", q, k, v, "", "pk", "pv", outputs=3, is_causal=1)
    seen = decoder_graphs.window_mask(g, window=0, swap=True, op="LessOrEqual")
    second = g("Attention", q2, key, value, seen)
    rows = g("Reshape", g("Transpose", g("Add", y, second), perm=[0, 2, 1, 3]), np.array([0, 0, 64]))
    return rows, key, value


CASES = {
    "plain": layer(),
    "scale_and_softcap": layer(scale=0.1, softcap=3.0),
    "head_norms": layer(norm=True),
    "partial_rotation": layer(rotate=decoder_graphs.partial),
    "interleaved_operator": layer(rotate=lambda g, x: g("RotaryEmbedding", x, "cos", "sin", interleaved=1)),
    "decomposed_rotation": layer(rotate=rotate_half),
    "decomposed_interleaved_rotation": layer(rotate=rotate_pairs),
    "window": layer(mask=lambda g: decoder_graphs.window_mask(g, window=3)),
    "mask_that_is_no_window": layer(mask=lambda g: decoder_graphs.window_mask(g, window=-1, swap=True)),
    "decomposed_attention": decomposed(causal=True),
    "shared_history": shared_history,
}


def run_reference(model, feeds, output):
    empty = {n: np.zeros((BATCH, 2, 0, 16), np.float32) for n in ("pk", "pv")}
    return ReferenceEvaluator(model).run([output], {**feeds, **empty})[0]


@pytest.mark.parametrize("case", CASES)
def test_steps_agree_with_onnx_at_once(case, tmp_path, monkeypatch):
    monkeypatch.setattr(decoder_graphs, "quantized", float_linear)
    g = Builder()
    outputs = CASES[case](g)
    used = {i for n in g.nodes for i in n.input}
    inputs = {k: v for k, v in {**LM, "angle": LM["cos"]}.items() if k in used}
    model = g.model(inputs, outputs)
    onnx.save(model, tmp_path / "model.onnx")
    engine = NativeEngine.from_bundle(tmp_path / "model.onnx", threads=2, kv="float32")

    rng = np.random.default_rng(1)
    angle = rng.uniform(-3, 3, (BATCH, ROWS, 8)).astype(np.float32)
    feeds = {"x": rng.standard_normal((BATCH, ROWS, 64)).astype(np.float32), "angle": angle}
    feeds |= {"cos": np.cos(angle), "sin": np.sin(angle)}
    feeds = {n: feeds[n] for n in inputs if n in feeds}
    expected = run_reference(model, feeds, outputs[0])
    for cuts in ((ROWS,), (4, 1, 1, 5)):
        state, at, parts = engine.new_state(), 0, []
        for n in cuts:
            step = {k: v[:, at : at + n] for k, v in feeds.items()}
            parts.append(engine.forward([(step, state)])[0][outputs[0]])
            at += n
        got = np.concatenate(parts, axis=1)
        # a chain of about 10 sums of 64 terms, values of size 1 to 10: 10 * sqrt(64) * 2^-24 of their range
        np.testing.assert_allclose(got, expected, atol=80 * 2**-24 * np.ptp(expected))


def test_the_comparison_sees_a_window_that_is_one_too_wide(monkeypatch):
    monkeypatch.setattr(decoder_graphs, "quantized", float_linear)
    results = []
    for window in (3, 4):
        g = Builder()
        outputs = (
            CASES["window"](g) if window == 3 else layer(mask=lambda g: decoder_graphs.window_mask(g, window=4))(g)
        )
        x = np.random.default_rng(1).standard_normal((BATCH, ROWS, 64)).astype(np.float32)
        angle = np.zeros((BATCH, ROWS, 8), np.float32)
        model = g.model(LM, outputs)
        results.append(run_reference(model, {"x": x, "cos": np.cos(angle), "sin": np.sin(angle)}, outputs[0]))
    assert np.abs(results[0] - results[1]).max() > 1000 * 80 * 2**-24 * np.ptp(results[0])


def test_eight_bits_with_a_minimum_run_as_two_products(tmp_path):
    """Five-bit GGUF weights: INT8 q - 16 with a float minimum a block, as a second product on block sums."""
    g = Builder()
    rng = np.random.default_rng(0)
    q = rng.integers(-16, 16, (48, 64)).astype(np.int8)
    s, m = decoder_graphs.fp16(rng.uniform(0.01, 0.1, (48, 2))), decoder_graphs.fp16(rng.uniform(-0.5, 0.0, (48, 2)))
    stored, scales = g("Transpose", g.value(q), perm=[1, 0]), g("Transpose", s, perm=[1, 0])
    sums = g("ReduceSum", g("Reshape", "x", np.array([0, 0, 2, 32])), np.array([-1]), keepdims=0)
    second = g("MatMul", sums, g("Transpose", m, perm=[1, 0]))
    y = g("Add", g("MatMul", "x", g("DequantizeLinear", stored, scales, axis=0, block_size=32)), second)
    model = g.model({"x": LM["x"]}, [y])
    onnx.save(model, tmp_path / "model.onnx")
    engine = NativeEngine.from_bundle(tmp_path / "model.onnx", threads=1)
    assert [w.type for w in engine.program.weights] in (["q8", "f32"], ["f32", "q8"])
    assert engine.program.row_local
    x = rng.standard_normal((BATCH, ROWS, 64)).astype(np.float32)
    got = engine.forward([({"x": x}, engine.new_state())])[0][y]
    expected = ReferenceEvaluator(model).run(None, {"x": x})[0]
    # activations are rounded to absmax / 127 of their block: at most absmax / 254 each, times the sum of |s q|
    bound = np.abs(x).max() / 254 * np.abs(np.repeat(s, 32, axis=1) * q).sum(axis=1).max()
    assert 0 < np.abs(got - expected).max() <= bound
