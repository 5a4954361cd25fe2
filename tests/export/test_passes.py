"""Each graph pass on a small graph: the graph before and after, and that the numbers are the same."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("torch", reason="the toolchain needs torch")
pytest.importorskip("onnx_ir", reason="the toolchain needs onnx-ir")

import onnx_ir as ir
from onnx.reference import ReferenceEvaluator
from support.graphs import ops, parse, run

from edgeformer.errors import ExportError
from edgeformer.export.blocks import quantize
from edgeformer.export.passes.attention_node import standard_attention, window_masks
from edgeformer.export.passes.finish import finish
from edgeformer.export.passes.float16 import round_to_float16, to_float16
from edgeformer.export.passes.kv_cache import insert_cache
from edgeformer.export.passes.linear_layers import canonical_linear_layers
from edgeformer.export.passes.logits import keep_logits
from edgeformer.export.passes.names import restore_names
from edgeformer.export.passes.quantized_nodes import quantize_embeddings, quantize_linears
from edgeformer.export.passes.reshape import drop_reshapes

RNG = np.random.default_rng(0)


def floats(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


# ---------------------------------------------------------------------------------------- linear


def test_a_matmul_with_columns_becomes_one_with_rows():
    w, x = floats(64, 8), floats(2, 3, 64)
    model = parse("(float[b,s,64] x) => (float[b,s,8] y) { y = MatMul(x, w) }", w=w)
    before = run(model, x=x)[0]
    assert canonical_linear_layers(model) == {"w"}
    assert ops(model) == ["Transpose", "MatMul"]
    np.testing.assert_array_equal(model.graph.initializers["w"].const_value.numpy(), w.T)
    np.testing.assert_allclose(run(model, x=x)[0], before, rtol=1e-5, atol=1e-5)


def test_a_gemm_between_reshapes_becomes_a_matmul_on_all_axes():
    w, bias, x = floats(8, 64), floats(8), floats(2, 3, 64)
    model = parse(
        """(float[b,s,64] x) => (float[b,s,8] y) {
            flat = Constant<value_ints=[-1, 64]>()
            rows = Reshape(x, flat)
            z = Gemm<transB=1>(rows, w, bias)
            lead = Shape<start=0, end=2>(x)
            last = Constant<value_ints=[8]>()
            shape = Concat<axis=0>(lead, last)
            y = Reshape(z, shape)
        }""",
        w=w,
        bias=bias,
    )
    before = run(model, x=x)[0]
    assert canonical_linear_layers(model) == set()
    assert ops(model) == ["Transpose", "MatMul", "Add"]
    np.testing.assert_allclose(run(model, x=x)[0], before, rtol=1e-5, atol=1e-5)


def test_a_scaled_gemm_is_left_alone():
    model = parse("(float[r,64] x) => (float[r,8] y) { y = Gemm<alpha=0.5>(x, w) }", w=floats(64, 8))
    canonical_linear_layers(model)
    assert ops(model) == ["Gemm"]


def test_reshapes_that_change_nothing_go():
    model = parse(
        """(float[b,s,64] x) => (float[b,s,64] y) {
            shape = Shape(x)
            same = Reshape(x, shape)
            y = Neg(same)
        }"""
    )
    drop_reshapes(model)
    assert ops(model) == ["Neg"]


# ---------------------------------------------------------------------------------------- attention

TRACED = """(float[b,4,s,8] q, float[b,2,s,8] k, float[b,2,s,8] v) => (float[b,4,s,8] y) {
    y = edgeformer.Attention<is_causal=1, scale=0.3, softcap=0.0, window=%d>(q, k, v)
}"""


def naive_attention(q, k, v, scale, window):
    """float64 [B, H, S, D] by the definition, one query at a time."""
    q, k, v = (a.astype(np.float64) for a in (q, k, v))
    group = q.shape[1] // k.shape[1]
    out = np.empty(q.shape)
    for b, h, i in np.ndindex(q.shape[:3]):
        first = max(0, i - window + 1) if window else 0
        scores = k[b, h // group, first : i + 1] @ q[b, h, i] * scale
        p = np.exp(scores - scores.max())
        out[b, h, i] = p / p.sum() @ v[b, h // group, first : i + 1]
    return out


@pytest.mark.parametrize("window", [0, 1, 3, 100])
def test_attention_with_its_cache_in_steps_is_the_whole_at_once(window):
    model = parse(TRACED % window)
    standard_attention(model)
    assert insert_cache(model) == 1
    window_masks(model)
    finish(model, "")
    assert "Attention" in ops(model)
    assert ("Less" in ops(model)) == bool(window)
    names = [value.name for value in model.graph.inputs]
    assert names == ["q", "k", "v", "past_key_values.0.key", "past_key_values.0.value"]
    assert [value.name for value in model.graph.outputs] == ["y", "present.0.key", "present.0.value"]
    assert list(model.graph.inputs[3].shape) == ["b", 2, "past_sequence", 8]

    q, k, v = floats(2, 4, 9, 8), floats(2, 2, 9, 8), floats(2, 2, 9, 8)
    expected = naive_attention(q, k, v, 0.3, window)
    past, start, found = [floats(2, 2, 0, 8)] * 2, 0, []
    for length in (5, 1, 1, 2):
        part = slice(start, start + length)
        feeds = {"q": q[:, :, part], "k": k[:, :, part], "v": v[:, :, part]}
        y, *past = run(model, **feeds, **dict(zip(names[3:], past, strict=True)))
        found.append(y)
        start += length
    # Softmax weights sum to 1: the error is that of float32 dot products of 8 and at most 9 terms of size about 10.
    np.testing.assert_allclose(np.concatenate(found, axis=2), expected, atol=1e-5)


def test_an_attention_that_is_not_causal_gets_no_cache():
    model = parse(TRACED.replace("is_causal=1", "is_causal=0") % 0)
    standard_attention(model)
    assert insert_cache(model) == 0
    assert len(model.graph.inputs) == 3


def test_a_cache_of_unknown_heads_is_refused():
    model = parse(TRACED.replace("[b,2,s,8]", "[b,h,s,8]") % 0)
    standard_attention(model)
    with pytest.raises(ExportError, match="fixed heads"):
        insert_cache(model)


# ---------------------------------------------------------------------------------------- logits

HEAD = """(float[b,s,64] x) => (float[b,s,10] logits) {
    n = LayerNormalization<axis=-1>(x, g)
    wt = Transpose<perm=[1, 0]>(w)
    logits = MatMul(n, wt)
}"""


@pytest.mark.parametrize(("keep", "rows"), [(None, 6), (0, 6), (1, 1), (4, 4), (9, 6)])
def test_logits_to_keep_slices_before_the_last_norm(keep, rows):
    model = parse(HEAD, w=floats(10, 64), g=floats(64))
    x = floats(2, 6, 64)
    before = run(model, x=x)[0]
    keep_logits(model)
    finish(model, "")
    assert ops(model).index("Slice") < ops(model).index("LayerNormalization")
    feeds = {} if keep is None else {"logits_to_keep": np.array(keep)}
    found = run(model, x=x, **feeds)[0]
    np.testing.assert_array_equal(found, before[:, 6 - rows :])


def test_logits_without_a_linear_head_are_refused():
    model = parse("(float[b,s,10] x) => (float[b,s,10] logits) { logits = Softmax<axis=-1>(x) }")
    with pytest.raises(ExportError, match="linear head"):
        keep_logits(model)


# ---------------------------------------------------------------------------------------- quantize

TWO = """(float[b,s,K] x) => (float[b,s,8] y, float[b,s,4] z) {
    wt = Transpose<perm=[1, 0]>(w)
    y = MatMul(x, wt)
    vt = Transpose<perm=[1, 0]>(v)
    z = MatMul(x, vt)
}"""


@pytest.mark.parametrize("block_size", [32, 64])
@pytest.mark.parametrize("k", [128, 100])
@pytest.mark.parametrize("scheme", ["q4", "q4a", "q8"])
def test_a_quantized_linear_is_its_dequantized_weight(scheme, k, block_size):
    w, v, x = floats(8, k), floats(4, k), floats(2, 3, k)
    model = parse(TWO.replace("K", str(k)), w=w, v=v)
    blocks = {"w": quantize(w, scheme, block_size), "v": quantize(v, scheme, block_size)}
    quantize_linears(model, lambda name, _: blocks[name])
    finish(model, "")
    found = ops(model)
    assert found.count("DequantizeLinear") == 2
    assert found.count("ReduceSum") == (1 if scheme == "q4a" else 0), "the block sums are shared by all linears of x"
    for node in model.graph:
        if node.op_type == "DequantizeLinear":
            assert all(value.producer().op_type == "Transpose" for value in node.inputs), (
                "else onnxruntime does not fuse"
            )
    for name, y in zip(("w", "v"), run(model, x=x), strict=True):
        exact = x.astype(np.float64) @ blocks[name].dequantize().T.astype(np.float64)
        # Float32 sums of k products: k * 2**-24 of the sum of magnitudes, twice for the split into two products.
        bound = (
            2 * k * 2.0**-24 * (np.abs(x) @ np.abs(blocks[name].dequantize()).T + 8 * np.abs(x).sum(-1, keepdims=True))
        )
        assert (np.abs(y - exact) <= bound).all()


@pytest.mark.parametrize("k", [128, 100])
@pytest.mark.parametrize("scheme", ["q4", "q4a", "q8"])
def test_a_quantized_linear_takes_no_rows(scheme, k):
    """The rows of an expert that no token selected."""
    model = parse(TWO.replace("K", str(k)), w=floats(8, k), v=floats(4, k))
    quantize_linears(model, lambda _, weight: quantize(weight.const_value.numpy(), scheme, 32))
    finish(model, "")
    assert [y.shape for y in run(model, x=floats(2, 0, k))] == [(2, 0, 8), (2, 0, 4)]


@pytest.mark.parametrize("scheme", ["q8", "q4a"])
def test_a_quantized_embedding_looks_up_dequantized_rows(scheme):
    table = floats(20, 96)
    model = parse("(int64[b,s] ids) => (float[b,s,96] y) { y = Gather(table, ids) }", table=table)
    blocks = quantize(table, scheme, 32)
    quantize_embeddings(model, lambda *_: blocks)
    finish(model, "")
    assert ops(model)[:2] == ["Gather", "Gather"], "rows are gathered before they are dequantized"
    ids = np.array([[0, 19, 3], [7, 7, 1]])
    np.testing.assert_array_equal(run(model, ids=ids)[0], blocks.dequantize()[ids])


def test_a_tied_table_is_stored_once():
    table = floats(20, 64)
    model = parse(
        """(int64[b,s] ids) => (float[b,s,20] y) {
            x = Gather(table, ids)
            t = Transpose<perm=[1, 0]>(table)
            y = MatMul(x, t)
        }""",
        table=table,
    )
    blocks = quantize(table, "q8", 32)
    quantize_linears(model, lambda *_: blocks)
    quantize_embeddings(model, lambda *_: blocks)
    finish(model, "")
    large = [name for name, value in model.graph.initializers.items() if value.const_value.size >= 40]
    assert sorted(large) == ["table.q", "table.scale"]


# ---------------------------------------------------------------------------------------- others


def test_names_lose_the_wrapper_and_only_that():
    model = parse(
        "(float[b,4] x) => (float[b,4] y) { a = Add(x, c); y = Mul(a, d) }".replace(";", "\n"), c=floats(4), d=floats(4)
    )
    for old, new in (("c", "module.layer.weight"), ("d", "module.other")):
        model.graph.initializers[old].name = new
    restore_names(model, {"layer.weight"}, "module.")
    assert set(model.graph.initializers) == {"layer.weight", "module.other"}


ROTATED = """(int64[b,s] position_ids, float[b,s,4] x) => (float[b,s,4] y) {
    axis = Constant<value_ints=[2]>()
    p = Cast<to=1>(position_ids)
    u = Unsqueeze(p, axis)
    angle = Mul(u, f)
    c = Cos(angle)
    z = Add(x, d)
    y = Mul(z, c)
}"""
FREQUENCIES, POSITIONS = np.array([1.0, 0.1, 0.01, 1e-3], np.float32), np.array([[4000, 7001]])


def test_float16_keeps_angles_in_float32():
    model = parse(ROTATED, f=FREQUENCIES, d=floats(4))
    x = floats(1, 2, 4)
    before = run(model, position_ids=POSITIONS, x=x)[0]
    to_float16(model)
    found = run(model, position_ids=POSITIONS, x=x.astype(np.float16))[0]
    assert found.dtype == np.float16
    # Five roundings at 2**-11 of values below 8; a float16 angle of 7001 would be off by whole radians.
    np.testing.assert_allclose(found, before, atol=5 * 8 * 2**-11)


BUCKETS = """(int64[n] distance, float[n,2] x) => (float[n,2] y) {
    d = Cast<to=1>(distance)
    q = Div(d, near)
    l = Log(q)
    r = Div(l, range)
    b = Mul(r, near)
    index = Cast<to=7>(b)
    row = Gather(table, index)
    y = Add(row, x)
}"""


@pytest.mark.parametrize("convert", [to_float16, round_to_float16])
def test_float16_keeps_what_indices_are_computed_from(convert):
    """T5's buckets of the distances from 8 to 127: some are others already where log(16) alone is rounded."""
    distance, near, wide = np.arange(8, 128), np.float32(8), np.log(np.float32(16))
    table = np.stack([np.arange(8), np.arange(8)], 1).astype(np.float32)
    model = parse(BUCKETS, near=near, range=wide, table=table)
    x = np.zeros((len(distance), 2), np.float32)
    exact = run(model, distance=distance, x=x)[0]
    rounded = np.log(distance / near) / np.float32(np.float16(wide)) * near
    assert (rounded.astype(np.int64) != exact[:, 0]).any()
    convert(model)
    found = run(model, distance=distance, x=x.astype(np.float16 if convert is to_float16 else np.float32))[0]
    np.testing.assert_array_equal(found, exact)


def test_float16_makes_integers_of_activations_from_float16():
    """They may depend on every weight, which would all stay float32."""
    model = parse(
        """(float[b,4] x) => (int64[b,4] y) {
            z = MatMul(x, w)
            y = Cast<to=7>(z)
        }""",
        w=floats(4, 4),
    )
    to_float16(model)
    assert model.graph.initializers["w"].dtype == ir.DataType.FLOAT16
    assert run(model, x=floats(2, 4).astype(np.float16))[0].dtype == np.int64


MADE = """(float[n] x) => (float[n] y) {
    n = Shape(x)
    a = ConstantOfShape<value=float[1]{0.1}>(n)
    b = ConstantOfShape(n)
    c = Constant<value_float=0.3>()
    d = Constant<value=float[1]{-3e38}>()
    square = Expand(c, nn)
    e = EyeLike<dtype=1>(square)
    s = ReduceSum(e)
    m = Max(d, x)
    t = Add(m, a)
    u = Add(t, b)
    v = Add(u, c)
    y = Add(v, s)
}"""


def test_float16_makes_new_values_in_float16():
    """Mixtures of experts begin with zeros: their graphs did not load."""
    model = parse(MADE, nn=np.array([3, 3]))
    x = floats(5)
    exact = run(model, x=x)[0]
    to_float16(model)
    found = run(model, x=x.astype(np.float16))[0]
    assert found.dtype == np.float16
    np.testing.assert_allclose(found, exact, atol=6 * 8 * 2**-11)  # six roundings of values below 8


def test_rounding_to_float16_gives_the_bits_of_float16():
    """Onnx's own evaluator rounds after each operator of a float16 graph; onnxruntime leaves out some of it."""
    x, d = floats(1, 2, 4), floats(4)
    half, rounded = (parse(ROTATED, f=FREQUENCIES, d=d) for _ in range(2))
    exact = run(half, position_ids=POSITIONS, x=x)[0]
    to_float16(half)
    round_to_float16(rounded)
    feeds = {"position_ids": POSITIONS, "x": x.astype(np.float16)}
    expected = ReferenceEvaluator(ir.to_proto(half)).run(None, feeds)[0]
    found = run(rounded, position_ids=POSITIONS, x=x)[0]
    assert (expected.dtype, found.dtype) == (np.float16, np.float32)
    np.testing.assert_array_equal(found, expected.astype(np.float32))
    assert (found != exact).all()


def test_operators_outside_the_standard_are_refused():
    model = parse(TRACED % 0)
    with pytest.raises(ExportError, match="edgeformer::Attention"):
        finish(model, "")
