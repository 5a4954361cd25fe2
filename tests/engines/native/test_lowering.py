"""The passes from graph to program on small graphs: which patterns each must fuse, and which it must not."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from support.decoder_graphs import (
    I64,
    LM,
    RNG,
    ROWS,
    Builder,
    F,
    decoder_layer,
    fp16,
    kinds,
    program,
    quantized,
)

from edgeformer.engines.native.ir.dims import INT64_MAX, clip, evaluate, floor_div, symbol
from edgeformer.engines.native.ir.graph import graph_of, read_graph
from edgeformer.engines.native.program.program import describe, postfix
from edgeformer.errors import BundleError, EngineUnavailable

BATCH, SEQUENCE, PAST = symbol("batch"), symbol("sequence"), symbol("past")


# -- sizes ------------------------------------------------------------------------------------------------------------


def test_sizes_are_equal_when_their_polynomials_are():
    assert (BATCH + 1) * SEQUENCE - SEQUENCE == SEQUENCE * BATCH
    assert BATCH * 0 == 0
    assert floor_div(BATCH * SEQUENCE * 64, SEQUENCE) == BATCH * 64
    assert floor_div((PAST + SEQUENCE) * BATCH, PAST + SEQUENCE) == BATCH
    assert floor_div(BATCH, 3) != floor_div(BATCH, 2)


def test_a_slice_is_resolved_where_its_sign_is_known_and_only_there():
    assert clip(INT64_MAX, SEQUENCE) == SEQUENCE
    assert clip(PAST, PAST + SEQUENCE) == PAST
    assert clip(PAST + SEQUENCE, SEQUENCE) == SEQUENCE
    assert evaluate(clip(-1, SEQUENCE), {"sequence": 5}) == 4
    unknown = clip(-symbol("keep"), SEQUENCE)  # keep = 0 means all
    assert [evaluate(unknown, {"keep": k, "sequence": 5}) for k in (0, 2, 9)] == [0, 3, 0]


def test_postfix_code_computes_what_the_size_is():
    def run(code, symbols):
        stack = []
        for op, v in zip(code[::2], code[1::2], strict=True):
            if op < 2:
                stack.append(v if op == 0 else symbols[v])
                continue
            b, a = stack.pop(), stack.pop()
            f = {2: a + b, 3: a * b, 4: a // b if b else 0, 5: min(a, b), 6: max(a, b)}
            stack.append(f[op] if op < 7 else min(max(a + b if a < 0 else a, 0), b))
        (result,) = stack
        return result

    names, numbers = ["batch", "keep", "sequence"], [3, 2, 11]
    for size in (
        7,
        SEQUENCE,
        3 * BATCH * SEQUENCE - 4,
        floor_div(SEQUENCE + 2, 4) + 1,
        clip(-symbol("keep"), SEQUENCE),
    ):
        assert run(postfix(size, names), numbers) == evaluate(size, dict(zip(names, numbers, strict=True)))


# -- reading ----------------------------------------------------------------------------------------------------------


def test_weights_outside_their_file_are_refused(tmp_path):
    g = Builder()
    y = g("MatMul", "x", RNG.standard_normal((64, 48)).astype(np.float32))
    onnx.save(g.model(ROWS, [y]), tmp_path / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0)
    assert len(read_graph(tmp_path / "m.onnx").nodes) == 1
    whole = (tmp_path / "m.data").read_bytes()
    (tmp_path / "m.data").write_bytes(whole[:-1])
    with pytest.raises(BundleError, match="cut short"):
        read_graph(tmp_path / "m.onnx")


def test_weights_in_another_folder_are_refused(tmp_path):
    g = Builder()
    y = g("MatMul", "x", RNG.standard_normal((64, 48)).astype(np.float32))
    model = g.model(ROWS, [y])
    onnx.save(model, tmp_path / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0)
    model = onnx.load(tmp_path / "m.onnx", load_external_data=False)
    model.graph.initializer[0].external_data[0].value = "../m.data"
    onnx.save(model, tmp_path / "m.onnx")
    with pytest.raises(BundleError, match="plain file name"):
        read_graph(tmp_path / "m.onnx")


def test_a_file_that_is_no_graph_is_refused(tmp_path):
    (tmp_path / "m.onnx").write_bytes(b"GGUF" + bytes(range(200)))
    with pytest.raises(BundleError, match="cannot be read"):
        read_graph(tmp_path / "m.onnx")


# -- linear -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scheme", "block", "kind"),
    [("q4", 32, "q4"), ("q4", 64, "q4x64"), ("q4a", 32, "q4a"), ("q4a", 64, "q4a"), ("q8", 32, "q8"), ("q8", 64, "q8"),
     ("q8", 128, "q8x128"), ("q8", 16, "q8x16"), ("q4", 16, "f32")],
)  # fmt: skip
def test_each_scheme_is_one_linear(scheme, block, kind):
    g = Builder()
    p = program(g, {"x": (F, ["batch", "sequence", 128])}, quantized(g, "x", scheme, k=128, block=block))
    assert kinds(p) == (["linear"] if kind == "f32" else ["quantize", "linear"])
    assert [w.type for w in p.weights] == [kind]


def test_the_sums_of_another_input_are_not_an_affine_minimum():
    g = Builder()
    s = fp16(RNG.uniform(0.01, 0.1, (48, 2)))
    w = g("DequantizeLinear", g("Transpose", g.int4(RNG.integers(-8, 8, (48, 64))), perm=[1, 0]),
          g("Transpose", s, perm=[1, 0]), axis=0, block_size=32)  # fmt: skip
    sums = g("ReduceSum", g("Reshape", "z", np.array([0, 0, 2, 32])), np.array([-1]), keepdims=0)
    y = g("Add", g("MatMul", "x", w), g("MatMul", sums, g("Transpose", s, perm=[1, 0])))
    p = program(g, {**ROWS, "z": ROWS["x"]}, y)
    assert sorted(w.type for w in p.weights) == ["f32", "q4"]


def test_gemm_matmul_and_transposed_weights_are_linears_with_bias():
    w, b = RNG.standard_normal((48, 64)).astype(np.float32), RNG.standard_normal(48).astype(np.float32)
    for form in ("matmul", "transposed", "gemm"):
        g = Builder()
        if form == "matmul":
            y = g("Add", g("MatMul", "x", w.T.copy()), b)
        elif form == "transposed":
            y = g("Add", b, g("MatMul", "x", g("Transpose", w, perm=[1, 0])))
        else:
            flat = g("Reshape", "x", np.array([-1, 64]))
            y = g("Gemm", flat, w, b, transB=1)
        p = program(g, ROWS, y)
        assert kinds(p) == ["linear"], form
        assert p.ops[0].inputs[2] >= 0, "the bias is the linear's"


def test_linears_of_one_input_share_its_quantization_and_run_as_one():
    g = Builder()
    ys = [quantized(g, "x", "q4a", n=n) for n in (64, 32, 32)]
    p = program(g, ROWS, *ys)
    assert kinds(p) == ["quantize", "linear"]
    assert len(p.ops[1].weights) == 3


def test_gate_and_up_are_one_linear_and_its_output_is_quantized_where_it_is_made():
    g = Builder()
    gate, up = quantized(g, "x", "q4", n=96), quantized(g, "x", "q4", n=96)
    hidden = g("Mul", g("Mul", gate, g("Sigmoid", gate)), up)
    y = g("Add", "x", quantized(g, hidden, "q4", n=64, k=96))
    p = program(g, ROWS, y)
    assert kinds(p) == ["quantize", "linear", "linear"]
    assert p.ops[1].ints["gated"] == [1]
    assert p.ops[1].outputs[0] == -1, "no operation reads the gated product as floats"
    assert p.ops[2].inputs[3] == p.inputs["x"], "the residual is added by the last linear"


def test_an_output_of_the_graph_keeps_its_own_linear():
    g = Builder()
    h = quantized(g, "x", "q8", n=64)
    p = program(g, ROWS, h, g("Add", h, "x"))
    assert kinds(p) == ["quantize", "linear", "binary"]


def test_a_fused_qkv_weight_is_split_by_rows_before_run_time():
    g = Builder()
    qkv = g("Add", quantized(g, "x", "q8", n=96), RNG.standard_normal(96).astype(np.float32))
    heads = g("Reshape", qkv, np.array([0, 0, 4, 24]))
    parts = g("Split", heads, np.array([8, 8, 8]), outputs=3, axis=-1)
    p = program(g, ROWS, *parts)
    assert kinds(p) == ["quantize", "linear"]
    assert next(iter(p.weights)).parts[0][0].ranges() == ((0, 8), (24, 32), (48, 56), (72, 80))


def test_embedding_factor_and_tied_head_use_one_packed_matrix():
    g = Builder()
    q, s = g.value(RNG.integers(-127, 128, (50, 64)).astype(np.int8)), g.value(fp16(RNG.uniform(0.01, 0.1, (50, 2))))
    table = g("DequantizeLinear", g("Gather", q, "ids"), g("Gather", s, "ids"), axis=2, block_size=32)
    x = g("Mul", table, 8.0)
    w = g("DequantizeLinear", g("Transpose", q, perm=[1, 0]), g("Transpose", s, perm=[1, 0]), axis=0, block_size=32)
    p = program(g, {"ids": (I64, ["batch", "sequence"])}, g("MatMul", x, w))
    assert kinds(p) == ["embed", "quantize", "linear"]
    assert len(p.weights) == 1
    assert p.ops[0].floats["scale"] == [8.0]


# -- norms and activations --------------------------------------------------------------------------------------------


def decomposed_rms_norm(g, x, variant):
    mean = g("ReduceMean", g("Pow", x, 2.0) if variant == "pow" else g("Mul", x, x), np.array([-1]))
    shifted = g("Add", mean, 1e-6)
    if variant == "pow":
        return g("Mul", x, g("Reciprocal", g("Sqrt", shifted)))
    return g("Div", x, g("Sqrt", shifted)) if variant == "div" else g("Mul", g("Pow", shifted, -0.5), x)


@pytest.mark.parametrize("variant", ["pow", "div", "rsqrt"])
def test_a_decomposed_rms_norm_is_one_norm(variant):
    g = Builder()
    y = g("Mul", g.value(np.ones(64, np.float32)), decomposed_rms_norm(g, "x", variant))
    p = program(g, ROWS, y)
    assert kinds(p) == ["norm"]
    assert p.ops[0].names["kind"] == ["rms"]
    assert p.ops[0].inputs[1] >= 0


def test_a_decomposed_layer_norm_is_one_norm():
    g = Builder()
    centred = g("Sub", "x", g("ReduceMean", "x", np.array([-1])))
    variance = g("ReduceMean", g("Mul", centred, centred), np.array([-1]))
    y = g("Div", centred, g("Sqrt", g("Add", variance, 1e-5)))
    y = g("Add", g("Mul", y, np.ones(64, np.float32)), np.zeros(64, np.float32))
    p = program(g, ROWS, y)
    assert kinds(p) == ["norm"]
    assert p.ops[0].names["kind"] == ["layer"]


def test_the_mean_of_another_axis_is_no_norm():
    g = Builder()
    mean = g("ReduceMean", g("Mul", "x", "x"), np.array([1]))
    y = g("Div", "x", g("Sqrt", g("Add", mean, 1e-6)))
    assert "norm" not in kinds(program(g, ROWS, y))


def decomposed(g, name, x):
    if name == "silu":
        return g("Mul", g("Sigmoid", x), x)
    if name == "quick_gelu":
        return g("Mul", x, g("Sigmoid", g("Mul", x, 1.702)))
    if name == "gelu":
        return g("Mul", g("Mul", x, g("Add", g("Erf", g("Div", x, float(np.sqrt(2)))), 1.0)), 0.5)
    if name == "relu2":
        return g("Pow", g("Relu", x), 2.0)
    inner = g("Mul", g("Add", x, g("Mul", g("Pow", x, 3.0), 0.044715)), float(np.sqrt(2 / np.pi)))
    return g("Mul", g("Mul", x, 0.5), g("Add", g("Tanh", inner), 1.0))


@pytest.mark.parametrize("name", ["silu", "quick_gelu", "gelu", "gelu_tanh", "relu2"])
def test_a_decomposed_activation_is_one_operation(name):
    g = Builder()
    p = program(g, ROWS, decomposed(g, name, "x"))
    assert kinds(p) == ["unary"]
    assert p.ops[0].note == name


def test_a_function_that_is_almost_an_activation_is_not_fused():
    g = Builder()
    y = g("Mul", "x", g("Sigmoid", g("Mul", "x", 1.7)))  # not 1.702
    assert kinds(program(g, ROWS, y)) == ["binary", "unary", "binary"]


def test_equal_computations_are_done_once():
    g = Builder()
    y = g("Add", g("Cos", g("Mul", "x", 2.0)), g("Cos", g("Mul", "x", 2.0)))
    assert kinds(program(g, ROWS, y)) == ["binary", "unary", "binary"]


def test_unused_and_constant_nodes_are_not_computed():
    g = Builder()
    g("Exp", "x")
    y = g("Add", "x", g("Sqrt", g("Add", np.full(64, 3, np.float32), 1.0)))
    p = program(g, ROWS, y)
    assert kinds(p) == ["binary"]
    np.testing.assert_array_equal(p.slots[p.ops[0].inputs[1]].constant, np.full(64, 2, np.float32))


# -- the program as a whole --------------------------------------------------------------------------------------------


KEEP = {"logits_to_keep": (I64, [])}


def last_rows(g, x):
    start = g("Unsqueeze", g("Neg", "logits_to_keep"), np.array([0]))
    return g("Slice", x, start, np.array([INT64_MAX]), np.array([1]))


def test_only_the_kept_rows_are_computed_after_keep():
    g = Builder()
    y = quantized(g, last_rows(g, "x"), "q8", n=48)
    p = program(g, {**ROWS, **KEEP}, y)
    assert kinds(p) == ["keep", "quantize", "linear"]
    assert "kept" in str(p.slots[p.outputs[y]].shape)
    assert p.row_local


def test_keep_moves_up_to_the_last_attention():
    g = Builder()
    y, key, value = decoder_layer(g)
    p = program(g, {**LM, **KEEP}, quantized(g, last_rows(g, y), "q8"), key, value)
    before = ["norm", "linear", "attend"]
    after = ["quantize", "linear", "norm", "linear", "linear", "linear"]
    assert kinds(p) == [*before, "keep", "keep", *after]
    assert all("kept" in map(str, p.slots[max(op.outputs)].shape) for op in p.ops[3:])
    assert p.row_local


def rows_that_are_read(g, h):
    """(a value of which only the last rows are kept, the other outputs)"""
    return g("Relu", h), [h]


def rows_that_are_mixed(g, h):
    return g("Sub", h, g("ReduceMax", h, np.array([1]), keepdims=1)), []


def rows_of_a_lower_rank(g, h):
    return g("Add", h, g("ReduceSum", h, np.array([0]), keepdims=0)), []


@pytest.mark.parametrize("case", [rows_that_are_read, rows_that_are_mixed, rows_of_a_lower_rank])
def test_rows_with_another_reader_are_computed_before_keep(case):
    g = Builder()
    h = g("Exp", "x")
    y, others = case(g, h)
    p = program(g, {**ROWS, **KEEP}, last_rows(g, y), *others)
    found = kinds(p)
    assert found.index("keep") > found.index("unary"), "h has all its rows"
    if case is not rows_that_are_read:
        assert found[-1] == "keep"


def test_a_program_prints_as_one_line_an_operation():
    g = Builder()
    p = program(g, LM, *decoder_layer(g))
    lines = describe(p).splitlines()
    operations = [line for line in lines if line.lstrip()[:1].isdigit()]
    assert len(operations) == 7
    assert "heads 4/2 x 16 rope 16 causal cache 0" in operations[2]
    assert "silu(gate) * up" in operations[5]


def test_an_old_operator_set_is_refused():
    g = Builder()
    model = g.model(ROWS, [g("Relu", "x")])
    model.opset_import[0].version = 11
    with pytest.raises(EngineUnavailable, match="opset 11"):
        graph_of(model)


def test_all_nodes_without_a_kernel_are_named_also_where_their_outputs_are_read():
    g = Builder()
    last = g("ArgMax", "x", axis=-1, select_last_index=1)
    first = g("ArgMin", g("Mul", last, last), axis=-1, select_last_index=1)
    y = g("Cast", first, to=F)
    with pytest.raises(EngineUnavailable, match=r"2 node\(s\): ArgMax .*ArgMin"):
        program(g, ROWS, y)
