"""The passes from graph to program, one by one, on small graphs: what each must recognize and what it must leave."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgeformer.errors import BundleError, EngineUnavailable
from edgeformer.native.dims import INT64_MAX, clip, evaluate, floor_div, symbol
from edgeformer.native.graph import graph_of, read_graph
from edgeformer.native.lowering import build
from edgeformer.native.program import describe, postfix

RNG = np.random.default_rng(0)
BATCH, SEQUENCE, PAST = symbol("batch"), symbol("sequence"), symbol("past")


class Builder:
    """Collects nodes; calling an operator's name adds a node and returns its output."""

    def __init__(self):
        self.nodes, self.constants, self.count = [], [], 0

    def __call__(self, op, *inputs, outputs=1, **attrs):
        self.count += 1
        names = [f"{op}_{self.count}_{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(op, [self.value(i) for i in inputs], names, **attrs))
        return names[0] if outputs == 1 else names

    def value(self, x):
        if isinstance(x, str):
            return x
        self.count += 1
        array = np.asarray(x, np.float32) if isinstance(x, float) else np.asarray(x)
        self.constants.append(numpy_helper.from_array(array, f"c{self.count}"))
        return f"c{self.count}"

    def int4(self, q):
        self.count += 1
        u = (q.astype(np.uint8) & 15).reshape(-1)
        packed = (u[0::2] | (u[1::2] << 4)).astype(np.uint8)
        self.constants.append(
            helper.make_tensor(f"c{self.count}", TensorProto.INT4, q.shape, packed.tobytes(), raw=True)
        )
        return f"c{self.count}"

    def model(self, inputs, outputs):
        infos = [helper.make_tensor_value_info(n, t, s) for n, (t, s) in inputs.items()]
        outs = [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in outputs]
        graph = helper.make_graph(self.nodes, "test", infos, outs, self.constants)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)


F, I64 = TensorProto.FLOAT, TensorProto.INT64
ROWS = {"x": (F, ["batch", "sequence", 64])}


def program(g, inputs, *outputs):
    return build(graph_of(g.model(inputs, outputs)))


def kinds(p):
    return [op.kind for op in p.ops]


def fp16(x):
    return np.asarray(x, np.float16).astype(np.float32)


def quantized(g, x, scheme, n=48, k=64, block=32):
    """x @ W.T in the bundle's form for the scheme; random integers, scales that float16 holds."""
    blocks = -(-k // block)
    s = fp16(RNG.uniform(0.01, 0.1, (n, blocks)))
    q = RNG.integers(-7, 8, (n, k)).astype(np.int8)
    stored = g.int4(q) if scheme in ("q4", "q4a") else g.value(q)
    w = g(
        "DequantizeLinear",
        g("Transpose", stored, perm=[1, 0]),
        g("Transpose", s, perm=[1, 0]),
        axis=0,
        block_size=block,
    )
    y = g("MatMul", x, w)
    if scheme != "q4a":
        return y
    m = fp16(RNG.uniform(-0.5, 0.0, (n, blocks))) + 8 * s
    sums = g("ReduceSum", g("Reshape", x, np.array([0, 0, blocks, block])), np.array([-1]), keepdims=0)
    return g("Add", y, g("MatMul", sums, g("Transpose", m, perm=[1, 0])))


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
    [("q4", 32, "q4"), ("q4", 64, "q4"), ("q4a", 32, "q4a"), ("q4a", 64, "q4a"), ("q8", 32, "q8"), ("q8", 128, "q8"),
     ("q8", 16, "q8x16"), ("q4", 16, "f32")],
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
    assert p.ops[1].outputs[0] == -1, "nobody wants the gated product as floats"
    assert p.ops[2].inputs[3] == p.inputs["x"], "the residual is added by the last linear"


def test_an_output_of_the_graph_keeps_its_own_linear():
    g = Builder()
    h = quantized(g, "x", "q8", n=64)
    p = program(g, ROWS, h, g("Add", h, "x"))
    assert kinds(p) == ["quantize", "linear", "binary"]


def test_a_fused_qkv_weight_is_cut_by_rows_not_by_columns_at_run_time():
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


def rms_by_hand(g, x, variant):
    mean = g("ReduceMean", g("Pow", x, 2.0) if variant == "pow" else g("Mul", x, x), np.array([-1]))
    shifted = g("Add", mean, 1e-6)
    if variant == "pow":
        return g("Mul", x, g("Reciprocal", g("Sqrt", shifted)))
    return g("Div", x, g("Sqrt", shifted)) if variant == "div" else g("Mul", g("Pow", shifted, -0.5), x)


@pytest.mark.parametrize("variant", ["pow", "div", "rsqrt"])
def test_a_norm_in_small_steps_is_one_norm(variant):
    g = Builder()
    y = g("Mul", g.value(np.ones(64, np.float32)), rms_by_hand(g, "x", variant))
    p = program(g, ROWS, y)
    assert kinds(p) == ["norm"]
    assert p.ops[0].ints["layer"] == [0]
    assert p.ops[0].inputs[1] >= 0


def test_a_layer_norm_in_small_steps_is_one_norm():
    g = Builder()
    centred = g("Sub", "x", g("ReduceMean", "x", np.array([-1])))
    variance = g("ReduceMean", g("Mul", centred, centred), np.array([-1]))
    y = g("Div", centred, g("Sqrt", g("Add", variance, 1e-5)))
    y = g("Add", g("Mul", y, np.ones(64, np.float32)), np.zeros(64, np.float32))
    p = program(g, ROWS, y)
    assert kinds(p) == ["norm"]
    assert p.ops[0].ints["layer"] == [1]


def test_the_mean_of_another_axis_is_no_norm():
    g = Builder()
    mean = g("ReduceMean", g("Mul", "x", "x"), np.array([1]))
    y = g("Div", "x", g("Sqrt", g("Add", mean, 1e-6)))
    assert "norm" not in kinds(program(g, ROWS, y))


def spell(g, name, x):
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
def test_an_activation_in_small_steps_is_one_operation(name):
    g = Builder()
    p = program(g, ROWS, spell(g, name, "x"))
    assert kinds(p) == ["unary"]
    assert p.ops[0].note == name


def test_what_only_looks_like_an_activation_stays_as_it_is():
    g = Builder()
    y = g("Mul", "x", g("Sigmoid", g("Mul", "x", 1.7)))  # not 1.702
    assert kinds(program(g, ROWS, y)) == ["binary", "unary", "binary"]


def test_equal_computations_are_done_once():
    g = Builder()
    y = g("Add", g("Cos", g("Mul", "x", 2.0)), g("Cos", g("Mul", "x", 2.0)))
    assert kinds(program(g, ROWS, y)) == ["binary", "unary", "binary"]


def test_what_nobody_reads_and_what_is_constant_costs_nothing():
    g = Builder()
    g("Exp", "x")
    y = g("Add", "x", g("Sqrt", g("Add", np.full(64, 3, np.float32), 1.0)))
    p = program(g, ROWS, y)
    assert kinds(p) == ["binary"]
    np.testing.assert_array_equal(p.slots[p.ops[0].inputs[1]].constant, np.full(64, 2, np.float32))


# -- attention --------------------------------------------------------------------------------------------------------

LM = {
    "x": (F, ["batch", "sequence", 64]),
    "cos": (F, ["batch", "sequence", 8]),
    "sin": (F, ["batch", "sequence", 8]),
    "pk": (F, ["batch", 2, "past", 16]),
    "pv": (F, ["batch", 2, "past", 16]),
}


def heads(g, x, n):
    return g("Transpose", g("Reshape", x, np.array([0, 0, n, 16])), perm=[0, 2, 1, 3])


def decoder_layer(g, mask="", rotate=lambda g, x, n: g("RotaryEmbedding", x, "cos", "sin"), norm=False, **attrs):
    def linear(x, n, k=64):
        return quantized(g, x, "q4a", n=n, k=k)

    def part(n):
        rows = g("Reshape", linear(normed, n * 16), np.array([0, 0, n, 16]))
        if norm:
            rows = g("RMSNormalization", rows, np.ones(16, np.float32), epsilon=1e-6)
        return rotate(g, g("Transpose", rows, perm=[0, 2, 1, 3]), n)

    normed = g("RMSNormalization", "x", np.ones(64, np.float32), epsilon=1e-6)
    q, k, v = part(4), part(2), heads(g, linear(normed, 32), 2)
    y, key, value = g("Attention", q, k, v, mask, "pk", "pv", outputs=3, is_causal=1, **attrs)
    o = linear(g("Reshape", g("Transpose", y, perm=[0, 2, 1, 3]), np.array([0, 0, 64])), 64)
    h = g("Add", "x", o)
    normed2 = g("RMSNormalization", h, np.ones(64, np.float32), epsilon=1e-6)
    gate, up = linear(normed2, 96), linear(normed2, 96)
    down = linear(g("Mul", g("Mul", gate, g("Sigmoid", gate)), up), 64, 96)
    return g("Add", h, down), key, value


SEVEN = ["norm", "linear", "attend", "linear", "norm", "linear", "linear"]


def test_a_decoder_layer_is_seven_operations():
    g = Builder()
    p = program(g, LM, *decoder_layer(g))
    assert kinds(p) == SEVEN
    attend = p.ops[2].ints
    assert (attend["rotary"], attend["rotary_k"], attend["causal"], attend["layer"]) == ([16], [16], [1], [0])
    assert p.row_local
    assert list(p.inputs) == ["x", "cos", "sin"]
    assert list(p.outputs) == [g.nodes[-1].output[0]]


def test_head_norms_before_the_rotation_are_folded():
    g = Builder()
    p = program(g, LM, *decoder_layer(g, norm=True))
    assert kinds(p) == SEVEN
    assert p.ops[2].ints["q_norm"] == p.ops[2].ints["k_norm"] == [1]


def partial(g, x, n):
    end = np.array([INT64_MAX])
    head = g("Slice", x, np.array([0]), np.array([8]), np.array([3]))
    rest = g("Slice", x, np.array([8]), end, np.array([3]))
    cos, sin = (g("Slice", t, np.array([0]), np.array([4]), np.array([2])) for t in ("cos", "sin"))
    return g("Concat", g("RotaryEmbedding", head, cos, sin), rest, axis=-1)


def test_partial_rotation_is_folded():
    g = Builder()
    p = program(g, LM, *decoder_layer(g, rotate=partial))
    assert [k for k in kinds(p) if k != "slice"] == SEVEN
    attend = next(op for op in p.ops if op.kind == "attend")
    assert attend.ints["rotary"] == [8]


def window_mask(g, window=5, swap=False, op="Less"):
    """(query - key) < window as the exporter writes it; `swap`: (key - query) < window, which means something else."""
    past = g("Squeeze", g("Shape", "pk", start=2, end=3), np.array([0]))
    total = g("Add", past, g("Squeeze", g("Shape", "x", start=1, end=2), np.array([0])))
    q, k = g("Range", past, total, np.array(1)), g("Range", np.array(0), total, np.array(1))
    q, k = g("Unsqueeze", q, np.array([1])), g("Unsqueeze", k, np.array([0]))
    return g(op, g("Sub", k, q) if swap else g("Sub", q, k), np.array(window))


def test_a_sliding_window_is_an_attribute_not_a_mask():
    g = Builder()
    p = program(g, LM, *decoder_layer(g, mask=window_mask(g)))
    assert kinds(p) == SEVEN
    assert p.ops[2].ints["window"] == [5]
    g = Builder()
    p = program(g, LM, *decoder_layer(g, mask=window_mask(g, op="LessOrEqual")))
    assert p.ops[2].ints["window"] == [6]


def test_a_mask_that_is_no_window_is_given_to_the_kernel():
    g = Builder()
    p = program(g, LM, *decoder_layer(g, mask=window_mask(g, swap=True)))
    attend = next(op for op in p.ops if op.kind == "attend")
    assert attend.ints["window"] == [0]
    assert attend.inputs[3] >= 0
    assert not p.row_local, "a mask of positions is of one state only"


def test_attention_output_in_heads_stays_right_where_nobody_joins_them():
    g = Builder()
    q, k, v = (heads(g, "x", 4) for _ in range(3))
    p = program(g, ROWS, g("Attention", q, k, v))
    assert kinds(p) == ["attend", "transpose"]


def test_only_the_kept_rows_go_through_what_follows():
    g = Builder()
    start = g("Unsqueeze", g("Neg", "logits_to_keep"), np.array([0]))
    kept = g("Slice", "x", start, np.array([INT64_MAX]), np.array([1]))
    y = quantized(g, kept, "q8", n=48)
    p = program(g, {**ROWS, "logits_to_keep": (I64, [])}, y)
    assert kinds(p) == ["keep", "quantize", "linear"]
    assert "kept" in str(p.slots[p.outputs[y]].shape)
    assert p.row_local


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


def spelled_attention(g, q, k, v, mask=None, divide=4.0):
    scores = g("Div", g("MatMul", q, g("Transpose", k, perm=[0, 1, 3, 2])), divide)
    return g("MatMul", g("Softmax", g("Add", scores, mask) if mask else scores, axis=-1), v)


def test_attention_in_small_steps_with_a_joined_cache_is_one_operation():
    """softmax(q k^T / 4 + mask) v where k, v = Concat(past, new): the mask's rule, cache and scale are found."""
    g = Builder()
    q, new_k, new_v = (heads(g, quantized(g, "x", "q8", n=32), 2) for _ in range(3))
    k, v = g("Concat", "pk", new_k, axis=2), g("Concat", "pv", new_v, axis=2)
    y = spelled_attention(g, q, k, v, g("Where", window_mask(g, op="LessOrEqual"), 0.0, -3e38))
    rows = g("Reshape", g("Transpose", y, perm=[0, 2, 1, 3]), np.array([0, 0, 32]))
    inputs = {n: LM[n] for n in ("x", "pk", "pv")}
    causal_free = program(g, inputs, rows, k, v)
    assert "attend" in kinds(causal_free) and "matmul" not in kinds(causal_free)
    attend = next(op for op in causal_free.ops if op.kind == "attend")
    assert attend.floats["scale"] == [0.25]
    assert attend.ints["layer"] == [0]
    assert list(causal_free.outputs) == [rows]


def test_a_cache_that_the_graph_reads_itself_is_a_history():
    g = Builder()
    k = g("Concat", "pk", heads(g, "x", 4), axis=2)
    total = g("ReduceSum", k, np.array([2]), keepdims=0)
    p = program(g, {"x": LM["x"], "pk": (F, ["batch", 4, "past", 16])}, total, k)
    assert "history" in kinds(p)
    assert [c.plain for c in p.caches] == [True]
    assert list(p.outputs) == [total]
    assert not p.row_local


def test_all_nodes_without_a_kernel_are_named_also_where_their_outputs_are_read():
    g = Builder()
    last = g("ArgMax", "x", axis=-1, select_last_index=1)
    first = g("ArgMin", g("Mul", last, last), axis=-1, select_last_index=1)
    y = g("Cast", first, to=F)
    with pytest.raises(EngineUnavailable, match=r"2 node\(s\): ArgMax .*ArgMin"):
        program(g, ROWS, y)


def test_products_and_sums_of_scalars_are_no_rotation():
    g = Builder()
    number = g("ReduceSum", "x", keepdims=0)
    scaled = g("Add", g("Mul", number, number), g("Mul", g("Neg", number), number))
    program(g, ROWS, g("Mul", "x", scaled))


def test_a_cache_read_in_any_other_form_is_refused_by_name():
    g = Builder()
    y = g("Add", "x", g("ReduceSum", "past_key_values.0.key", np.array([0, 1, 2, 3]), keepdims=0))
    with pytest.raises(EngineUnavailable, match=r"past_key_values\.0\.key"):
        program(g, {"x": LM["x"], "past_key_values.0.key": LM["pk"]}, y)


# -- rotations in small steps -----------------------------------------------------------------------------------------


def table(g, interleaved):
    """Cosines and sines of angles [batch, sequence, 8], each number twice, as [batch, 1, sequence, 16]."""
    if interleaved:
        wide = g("Expand", g("Unsqueeze", "angle", np.array([3])), np.array([1, 1, 1, 2]))
        twice = g("Reshape", wide, np.array([0, 0, 16]))
    else:
        twice = g("Concat", "angle", "angle", axis=-1)
    return [g("Unsqueeze", g(f, twice), np.array([1])) for f in ("Cos", "Sin")]


def cut(g, x, start, stop, step=1):
    return g("Slice", x, np.array([start]), np.array([stop]), np.array([3]), np.array([step]))


def turned(g, x, interleaved, wrong=False):
    if not interleaved:
        first, second = cut(g, x, 0, 8), cut(g, x, 8, 16)
        return g("Concat", first, g("Neg", second), axis=-1) if wrong else g("Concat", g("Neg", second), first, axis=-1)
    even, odd = cut(g, x, 0, 16, 2), cut(g, x, 1, 16, 2)
    pairs = [g("Unsqueeze", g("Neg", odd), np.array([4])), g("Unsqueeze", even, np.array([4]))]
    heads = [d.input[0] for d in g.nodes if d.output[0] == x]
    stacked = g("Concat", *(pairs[::-1] if wrong else pairs), axis=-1)
    return g("Reshape", stacked, g("Shape", x)) if heads else stacked


@pytest.mark.parametrize("interleaved", [False, True])
def test_a_rotation_in_small_steps_is_folded_into_attention(interleaved):
    g = Builder()
    tables = table(g, interleaved)

    def rotate(g, x, n):
        return g("Add", g("Mul", x, tables[0]), g("Mul", turned(g, x, interleaved), tables[1]))

    inputs = {k: v for k, v in LM.items() if k not in ("cos", "sin")} | {"angle": LM["cos"]}
    p = program(g, inputs, *decoder_layer(g, rotate=rotate))
    assert [k for k in kinds(p) if k in SEVEN] == SEVEN
    attend = next(op for op in p.ops if op.kind == "attend")
    assert attend.ints["rotary"] == attend.ints["rotary_k"] == [16]
    assert attend.ints["interleaved"] == [int(interleaved)]
    assert p.row_local


@pytest.mark.parametrize("interleaved", [False, True])
def test_a_turn_the_other_way_is_no_rotation(interleaved):
    g = Builder()
    tables = table(g, interleaved)

    def rotate(g, x, n):
        return g("Add", g("Mul", x, tables[0]), g("Mul", turned(g, x, interleaved, wrong=True), tables[1]))

    inputs = {k: v for k, v in LM.items() if k not in ("cos", "sin")} | {"angle": LM["cos"]}
    p = program(g, inputs, *decoder_layer(g, rotate=rotate))
    assert next(op for op in p.ops if op.kind == "attend").ints["rotary"] == [0]
