"""Every plain operation that the native engine knows, against onnx's ReferenceEvaluator, which shares no code."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

pytest.importorskip("edgeformer._native", reason="the native extension is not built")

from edgeformer.errors import EngineUnavailable, InputError
from edgeformer.native.engine import NativeEngine

TYPES = {
    np.dtype(np.float32): TensorProto.FLOAT,
    np.dtype(np.int64): TensorProto.INT64,
    np.dtype(bool): TensorProto.BOOL,
}


def model_of(nodes, inputs, outputs, constants=()):
    """A model of `nodes`. inputs: name -> (array, symbolic shape); outputs: name -> dtype."""
    graph = helper.make_graph(
        nodes,
        "test",
        [helper.make_tensor_value_info(n, TYPES[a.dtype], shape) for n, (a, shape) in inputs.items()],
        [helper.make_tensor_value_info(n, TYPES[np.dtype(t)], None) for n, t in outputs.items()],
        [numpy_helper.from_array(np.asarray(a), n) for n, a in dict(constants).items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)


def run(model, feeds, tmp_path, **options):
    """(native outputs, reference outputs) by name."""
    path = tmp_path / "model.onnx"
    onnx.save(model, path)
    engine = NativeEngine.from_bundle(path, threads=2, **options)
    got = engine.forward([(feeds, engine.new_state())])[0]
    expected = dict(zip(got, ReferenceEvaluator(model).run(list(got), feeds), strict=True))
    return got, expected


def same(got, expected, rtol=2e-6):
    """Equal shapes and types; floats to a few roundings (2^-23 each: sums here have at most 16 terms)."""
    assert got.shape == np.shape(expected)
    assert got.dtype == np.asarray(expected).dtype
    if got.dtype == np.float32:
        np.testing.assert_allclose(got, expected, rtol=rtol, atol=2e-6)
    else:
        np.testing.assert_array_equal(got, expected)


RNG = np.random.default_rng(0)
X = RNG.standard_normal((2, 3, 4)).astype(np.float32)
INTS = RNG.integers(-5, 6, (2, 3, 4)).astype(np.int64)
B = RNG.integers(0, 2, (2, 3, 4)).astype(bool)
POSITIVE = (np.abs(X) + 0.1).astype(np.float32)
S = ["a", "b", 4]  # symbolic: nothing may be decided by constant folding


XS, IS, BS = {"x": (X, S)}, {"i": (INTS, S)}, {"b": (B, S)}
XZ = {"x": (X, S), "z": (POSITIVE, S)}
EDGES = X.copy()
EDGES.reshape(-1)[:4] = np.nan, np.inf, -np.inf, 0
HALVES = (INTS / 2).astype(np.float32)  # whole numbers and halves between them
HALVES[0, 0] = 2.0**23 + 1, -0.49999997, 0.49999997, -(2.0**31)
TABLE = RNG.standard_normal((6, 5)).astype(np.float32)
Y = np.swapaxes(X, 1, 2).copy()


def node(op, inputs, **attrs):
    return helper.make_node(op, inputs, ["y"], **attrs)


# name -> (node, inputs, output type, constants)
CASES = {
    "add": (node("Add", ["x", "c"]), XS, np.float32, {"c": X[0, :1]}),
    "sub_left_constant": (node("Sub", ["c", "x"]), XS, np.float32, {"c": np.float32(2)}),
    "mul_two_inputs": (node("Mul", ["x", "z"]), XZ, np.float32, {}),
    "mul_spread_row": (node("Mul", ["x", "z"]), {"x": (X, S), "z": (X[:, :1], ["a", 1, 4])}, np.float32, {}),
    "div": (node("Div", ["x", "z"]), XZ, np.float32, {}),
    "pow_square": (node("Pow", ["x", "c"]), XS, np.float32, {"c": np.float32(2)}),
    "pow_cube": (node("Pow", ["x", "c"]), XS, np.float32, {"c": np.float32(3)}),
    "pow_minus_half": (node("Pow", ["x", "c"]), {"x": (POSITIVE, S)}, np.float32, {"c": np.float32(-0.5)}),
    "min_of_three": (node("Min", ["x", "z", "c"]), XZ, np.float32, {"c": np.float32(0.3)}),
    "max": (node("Max", ["x", "c"]), XS, np.float32, {"c": np.float32(0)}),
    "int_add": (node("Add", ["i", "c"]), IS, np.int64, {"c": np.int64(3)}),
    "int_mod": (node("Mod", ["i", "c"]), IS, np.int64, {"c": np.int64(3)}),
    "int_neg": (node("Neg", ["i"]), IS, np.int64, {}),
    "equal": (node("Equal", ["i", "c"]), IS, bool, {"c": np.int64(1)}),
    "less": (node("Less", ["x", "z"]), XZ, bool, {}),
    "greater_or_equal": (node("GreaterOrEqual", ["i", "c"]), IS, bool, {"c": np.int64(0)}),
    "and": (node("And", ["b", "c"]), BS, bool, {"c": B[0]}),
    "or": (node("Or", ["b", "c"]), BS, bool, {"c": B[0]}),
    "xor": (node("Xor", ["b", "c"]), BS, bool, {"c": B[0]}),
    "not": (node("Not", ["b"]), BS, bool, {}),
    "where": (node("Where", ["b", "x", "c"]), {"b": (B, S), "x": (X, S)}, np.float32, {"c": np.float32(-1)}),
    "where_int": (
        node("Where", ["b", "i", "c"]),
        {"b": (B[:, :1], ["a", 1, 4]), "i": (INTS, S)}, np.int64, {"c": np.int64(9)},
    ),
    "cast_to_float": (node("Cast", ["i"], to=TensorProto.FLOAT), IS, np.float32, {}),
    "cast_to_int": (node("Cast", ["x"], to=TensorProto.INT64), {"x": (X * 3, S)}, np.int64, {}),
    "cast_to_bool": (node("Cast", ["i"], to=TensorProto.BOOL), IS, bool, {}),
    "clip": (node("Clip", ["x", "lo", "hi"]), XS, np.float32, {"lo": np.float32(-0.5), "hi": np.float32(0.5)}),
    "clip_computed": (
        node("Clip", ["x", "lo", "hi"]),
        {"x": (X, S), "lo": (np.array(-0.5, np.float32), []), "hi": (np.array(0.25, np.float32), [])}, np.float32, {},
    ),
    "clip_computed_one_side": (
        node("Clip", ["i", "", "hi"]), {"i": (INTS, S), "hi": (np.array(2), [])}, np.int64, {}
    ),
    "resize_to_itself": (
        node("Resize", ["x", "", "", "c"], mode="linear"), {"x": (X, [2, 3, 4])}, np.float32, {"c": np.array([2, 3, 4])}
    ),
    "transpose": (node("Transpose", ["x"], perm=[2, 0, 1]), XS, np.float32, {}),
    "transpose_bool": (node("Transpose", ["b"], perm=[1, 2, 0]), BS, bool, {}),
    "reshape": (node("Reshape", ["x", "c"]), XS, np.float32, {"c": np.array([0, -1])}),
    "squeeze": (node("Squeeze", ["x", "c"]), {"x": (X[:, :1], ["a", 1, 4])}, np.float32, {"c": np.array([1])}),
    "unsqueeze": (node("Unsqueeze", ["x", "c"]), XS, np.float32, {"c": np.array([0, -1])}),
    "flatten": (node("Flatten", ["x"], axis=2), XS, np.float32, {}),
    "expand": (node("Expand", ["x", "c"]), {"x": (X[:, :1], ["a", 1, 4])}, np.float32, {"c": np.array([5, 1, 3, 1])}),
    "tile": (node("Tile", ["x", "c"]), XS, np.float32, {"c": np.array([1, 2, 3])}),
    "concat": (node("Concat", ["x", "c"], axis=1), XS, np.float32, {"c": X[:, :2]}),
    "slice": (
        node("Slice", ["x", "s", "e", "a"]), XS, np.float32,
        {"s": np.array([1, -3]), "e": np.array([2**62, -1]), "a": np.array([1, 2])},
    ),
    "slice_backwards": (
        node("Slice", ["x", "s", "e", "a", "t"]), XS, np.float32,
        {"s": np.array([3]), "e": np.array([-(2**62)]), "a": np.array([2]), "t": np.array([-1])},
    ),
    "slice_every_second": (
        node("Slice", ["x", "s", "e", "a", "t"]), XS, np.float32,
        {"s": np.array([1]), "e": np.array([2**62]), "a": np.array([2]), "t": np.array([2])},
    ),
    "gather": (node("Gather", ["x", "c"], axis=2), XS, np.float32, {"c": np.array([[3, 0], [-1, 2]])}),
    "gather_one": (node("Gather", ["x", "c"], axis=1), XS, np.float32, {"c": np.array(-1)}),
    "gather_rows": (node("Gather", ["c", "i"]), {"i": (np.abs(INTS), S)}, np.float32, {"c": TABLE}),
    "gather_elements": (
        node("GatherElements", ["x", "i"], axis=2), {"x": (X, S), "i": (np.abs(INTS) % 4, S)}, np.float32, {}
    ),
    "gather_nd": (
        node("GatherND", ["x", "c"]), XS, np.float32, {"c": np.array([[[0, 1]], [[1, -1]]])}
    ),
    "gather_nd_one": (node("GatherND", ["x", "c"]), XS, np.float32, {"c": np.array([[1]])}),
    "scatter_elements": (
        node("ScatterElements", ["x", "i", "u"], axis=2),
        {"x": (X, S), "i": (np.abs(INTS[:, :2, :1]) % 4, ["a", "d", 1])},
       
        np.float32, {"u": -X[:, :2, :1]},
    ),
    "scatter_elements_add": (
        node("ScatterElements", ["i", "c", "u"], axis=0, reduction="add"), IS, np.int64,
        {"c": np.array([[[0, 1]], [[1, 1]]]), "u": np.array([[[3, 4]], [[5, 6]]])},
    ),
    "scatter_nd": (
        node("ScatterND", ["x", "c", "u"]), XS, np.float32, {"c": np.array([[0, 2], [1, -1]]), "u": -X[0, :2]}
    ),
    "pad": (node("Pad", ["x", "p", "v"]), XS, np.float32, {"p": np.array([0, 1, 2, 1, 0, 3]), "v": np.float32(7)}),
    "trilu_upper": (node("Trilu", ["x"], upper=1), XS, np.float32, {}),
    "trilu_lower_k": (node("Trilu", ["x", "k"], upper=0), XS, np.float32, {"k": np.array(1)}),
    "cumsum": (node("CumSum", ["x", "c"]), XS, np.float32, {"c": np.array(1)}),
    "cumsum_int_reverse": (
        node("CumSum", ["i", "c"], reverse=1, exclusive=1), IS, np.int64, {"c": np.array(-1)}
    ),
    "softmax": (node("Softmax", ["x"], axis=-1), XS, np.float32, {}),
    "softmax_middle": (node("Softmax", ["x"], axis=1), XS, np.float32, {}),
    "log_softmax": (node("LogSoftmax", ["x"], axis=-1), XS, np.float32, {}),
    "reduce_mean": (node("ReduceMean", ["x", "c"]), XS, np.float32, {"c": np.array([-1])}),
    "reduce_sum_two": (node("ReduceSum", ["x", "c"], keepdims=0), XS, np.float32, {"c": np.array([0, 2])}),
    "reduce_max_all": (node("ReduceMax", ["x"], keepdims=0), XS, np.float32, {}),
    "reduce_min_int": (node("ReduceMin", ["i", "c"]), IS, np.int64, {"c": np.array([1])}),
    "reduce_l2": (node("ReduceL2", ["x", "c"]), XS, np.float32, {"c": np.array([1])}),
    "reduce_l1": (node("ReduceL1", ["x", "c"]), XS, np.float32, {"c": np.array([1])}),
    "reduce_l1_int": (node("ReduceL1", ["i", "c"], keepdims=0), IS, np.int64, {"c": np.array([0, 2])}),
    "any": (node("ReduceMax", ["b", "c"], keepdims=0), BS, bool, {"c": np.array([1])}),
    "all": (node("ReduceMin", ["b", "c"]), BS, bool, {"c": np.array([2])}),
    "argmin": (node("ArgMin", ["i"], axis=1), IS, np.int64, {}),
    "sign_int": (node("Sign", ["i"]), IS, np.int64, {}),
    "prelu": (node("PRelu", ["x", "c"]), XS, np.float32, {"c": X[1, 0]}),
    "is_nan": (node("IsNaN", ["x"]), {"x": (EDGES, S)}, bool, {}),
    "is_inf": (node("IsInf", ["x"]), {"x": (EDGES, S)}, bool, {}),
    "is_minus_inf": (node("IsInf", ["x"], detect_positive=0), {"x": (EDGES, S)}, bool, {}),
    "swish_alpha": (node("Swish", ["x"], alpha=1.5), XS, np.float32, {}),
    "elu_alpha": (node("Elu", ["x"], alpha=0.7), XS, np.float32, {}),
    "leaky_relu_alpha": (node("LeakyRelu", ["x"], alpha=0.3), XS, np.float32, {}),
    "celu_alpha": (node("Celu", ["x"], alpha=0.7), XS, np.float32, {}),
    "hard_sigmoid_numbers": (node("HardSigmoid", ["x"], alpha=0.3, beta=0.4), XS, np.float32, {}),
    "matmul_vector": (node("MatMul", ["x", "z"]), {"x": (X, S), "z": (X[0, 0], [4])}, np.float32, {}),
    "vector_matmul": (node("MatMul", ["z", "x"]), {"x": (Y, ["a", 4, "c"]), "z": (X[0, 0], [4])}, np.float32, {}),
    "slice_every_third": (
        node("Slice", ["x", "s", "e", "a", "t"]), XS, np.float32,
        {"s": np.array([-2]), "e": np.array([2**62]), "a": np.array([1]), "t": np.array([3])},
    ),
    "slice_backwards_by_two": (
        node("Slice", ["x", "s", "e", "a", "t"]), XS, np.float32,
        {"s": np.array([-1]), "e": np.array([-(2**62)]), "a": np.array([1]), "t": np.array([-2])},
    ),
    "rms_norm_two_axes": (
        node("RMSNormalization", ["x", "w"], axis=-2, epsilon=1e-6), {"x": (X, ["a", 3, 4])}, np.float32,
        {"w": POSITIVE[0]},
    ),
    "layer_norm_two_axes": (
        node("LayerNormalization", ["x", "w", "c"], axis=1), {"x": (X, ["a", 3, 4])}, np.float32,
        {"w": POSITIVE[0], "c": X[1]},
    ),
    "layer_norm_no_bias_computed_scale": (
        node("LayerNormalization", ["x", "z"]), {"x": (X, S), "z": (POSITIVE[0, 0], [4])}, np.float32, {}
    ),
    "group_norm": (
        node("GroupNormalization", ["x", "w", "c"], num_groups=2), {"x": (Y, ["a", 4, "b"])}, np.float32,
        {"w": POSITIVE[0, 0], "c": X[0, 0]},
    ),
    "instance_norm": (
        node("InstanceNormalization", ["x", "w", "c"]), {"x": (X, ["a", 3, "b"])}, np.float32,
        {"w": POSITIVE[0, :, 0].copy(), "c": X[0, :, 0].copy()},
    ),
    "argmax": (node("ArgMax", ["x"], axis=1, keepdims=0), XS, np.int64, {}),
    "matmul": (node("MatMul", ["x", "z"]), {"x": (X, S), "z": (Y, ["a", 4, "c"])}, np.float32, {}),
    "matmul_spread": (node("MatMul", ["x", "z"]), {"x": (X, S), "z": (X[0].T.copy(), [4, "c"])}, np.float32, {}),
    "gemm_two_inputs": (
        node("Gemm", ["x", "z", "c"], alpha=0.5, beta=2.0, transB=1),
        {"x": (X[0], ["b", 4]), "z": (X[1], ["c", 4])}, np.float32, {"c": X[0, 0, :3]},
    ),
    "layer_norm": (
        node("LayerNormalization", ["x", "w", "c"], epsilon=1e-5), XS, np.float32, {"w": POSITIVE[0, 0], "c": X[0, 0]}
    ),
    "rms_norm": (node("RMSNormalization", ["x", "w"], epsilon=1e-6), XS, np.float32, {"w": POSITIVE[0, 0]}),
    "size_of": (node("Shape", ["x"]), XS, np.int64, {}),
}  # fmt: skip
for _op in (
    "Sqrt",
    "Exp",
    "Log",
    "Reciprocal",
    "Sigmoid",
    "Tanh",
    "Erf",
    "Sin",
    "Cos",
    "Relu",
    "Softplus",
    "Neg",
    "Abs",
):
    CASES[_op.lower()] = (node(_op, ["x"]), {"x": (POSITIVE if _op in ("Sqrt", "Log") else X, S)}, np.float32, {})
for _op in ("Floor", "Ceil", "Round", "Sign"):
    CASES[_op.lower()] = (node(_op, ["x"]), {"x": (HALVES, S)}, np.float32, {})
for _op in (
    "LeakyRelu", "Elu", "Selu", "Celu", "HardSigmoid", "HardSwish", "ThresholdedRelu", "Softsign", "Mish", "Swish",
):  # fmt: skip
    CASES[_op.lower()] = (node(_op, ["x"]), {"x": (4 * X, S)}, np.float32, {})
for _mode in ("none", "tanh"):
    CASES[f"gelu_{_mode}"] = (node("Gelu", ["x"], approximate=_mode), XS, np.float32, {})


@pytest.mark.parametrize("case", CASES)
def test_operation_agrees_with_onnx(case, tmp_path):
    nodes, inputs, output, constants = CASES[case]
    model = model_of([nodes], inputs, {"y": output}, constants)
    got, expected = run(model, {n: a for n, (a, _) in inputs.items()}, tmp_path)
    same(got["y"], expected["y"])


@pytest.mark.parametrize(
    ("shape", "kernel", "attrs"),
    [
        ((2, 3, 9, 8), (4, 3, 3, 2), {"strides": [2, 1], "pads": [1, 0, 1, 1]}),
        ((1, 4, 16), (6, 2, 3), {"group": 2, "pads": [1, 1], "dilations": [2]}),
        ((2, 3, 8, 8), (5, 3, 4, 4), {"strides": [4, 4]}),
    ],
)
def test_convolution_agrees_with_onnx(shape, kernel, attrs, tmp_path):
    x, w = RNG.standard_normal(shape).astype(np.float32), RNG.standard_normal(kernel).astype(np.float32)
    b = RNG.standard_normal(kernel[0]).astype(np.float32)
    inputs = {"x": (x, ["n", *shape[1:-1], "l"])}
    model = model_of([node("Conv", ["x", "w", "b"], **attrs)], inputs, {"y": np.float32}, {"w": w, "b": b})
    got, expected = run(model, {"x": x}, tmp_path)
    # a sum of at most 36 products of size ~1: 36 roundings of 2^-24 times its largest partial sum (~20)
    np.testing.assert_allclose(got["y"], expected["y"], atol=36 * 2**-24 * 20)


@pytest.mark.parametrize(
    ("equation", "shapes"),
    [
        ("ibh,hnd->ibnd", [("i", "b", 4), (4, 3, 5)]),  # a Linear with several axes behind
        ("ibnd,hnd->ibh", [("i", "b", 3, 5), (4, 3, 5)]),  # and before
        ("bhqd,bhkd->bhqk", [("b", 2, "q", 4), ("b", 2, "k", 4)]),
        ("bqhd,bkhd->bhqk", [("b", "q", 2, 4), ("b", "k", 2, 4)]),
        ("bhij,bhj->bhi", [("b", 2, "i", "j"), ("b", 2, "j")]),
        ("i,j->ij", [("i",), ("j",)]),
        ("bij,k->bk", [("b", "i", 3), ("k",)]),  # axes that only one operand has are summed
        ("ij,jk,kl->il", [("i", 3), (3, 4), (4, "l")]),
        ("bij->jb", [("b", "i", "j")]),
        ("ij,jk", [("i", 3), (3, "k")]),
        ("...qhd,...khd->...hqk", [("b", "l", "q", 2, 4), ("b", "l", "k", 2, 4)]),
    ],
)
def test_einsum_agrees_with_onnx(equation, shapes, tmp_path):
    sizes = {"i": 3, "j": 4, "b": 2, "q": 5, "k": 3, "l": 2}
    inputs = {
        f"x{i}": (RNG.standard_normal([sizes.get(d, d) for d in shape]).astype(np.float32), list(shape))
        for i, shape in enumerate(shapes)
    }
    model = model_of([node("Einsum", list(inputs), equation=equation)], inputs, {"y": np.float32})
    got, expected = run(model, {n: a for n, (a, _) in inputs.items()}, tmp_path)
    # at most 15 products of size ~1 a sum, in another order: 15 roundings of 2^-24 times a partial sum (~15)
    np.testing.assert_allclose(got["y"], expected["y"], atol=15 * 2**-24 * 15)


@pytest.mark.parametrize(("start", "stop", "step"), [(0, 7, 3), (7, -7, -1), (-3, 4, 2), (6, 0, -4)])
def test_ranges_with_a_step_of_sizes(start, stop, step, tmp_path):
    """Both bounds grow with the input: Range(start + n, stop + n, step) at two n."""
    nodes = [
        helper.make_node("Shape", ["x"], ["n1"]),
        helper.make_node("Squeeze", ["n1"], ["n"]),
        helper.make_node("Mul", ["n", "sign"], ["m"]),
        helper.make_node("Add", ["n", "start"], ["first"]),
        helper.make_node("Add", ["m", "stop"], ["last"]),
        helper.make_node("Range", ["first", "last", "step"], ["y"]),
    ]
    sign = 1 if step > 0 else -1
    constants = {"start": np.array(start), "stop": np.array(stop), "step": np.array(step), "sign": np.array(sign)}
    model = model_of(nodes, {"x": (X[0, 0], ["n"])}, {"y": np.int64}, constants)
    onnx.save(model, tmp_path / "m.onnx")
    engine = NativeEngine.from_bundle(tmp_path / "m.onnx", threads=1)
    for n in (1, 4):
        got = engine.forward([({"x": X[0, 0, :n]}, engine.new_state())])[0]["y"]
        np.testing.assert_array_equal(got, np.arange(start + n, stop + sign * n, step))


REFUSED = {
    "einsum_diagonal": (node("Einsum", ["x"], equation="bii->bi"), {"x": (X[:, :, :3].copy(), ["b", 3, 3])}, {}),
    "einsum_ellipses": (
        node("Einsum", ["x", "z"], equation="...j,...j->..."), {"x": (X, S), "z": (X[0], ["b", 4])}, {}
    ),
    "einsum_of_integers": (node("Einsum", ["i"], equation="abc->a"), IS, {}),
    "range_step_at_run_time": (
        node("Range", ["s", "e", "i"]), {"i": (np.array(2), [])}, {"s": np.array(0), "e": np.array(5)}
    ),
    "slice_backwards_from_inside": (
        node("Slice", ["x", "s", "e", "a", "t"]), XS,
        {"s": np.array([1]), "e": np.array([-(2**62)]), "a": np.array([1]), "t": np.array([-1])},
    ),
    "group_norm_scale_per_group": (
        node("GroupNormalization", ["x", "w", "c"], num_groups=2), {"x": (Y, ["a", 4, "b"])},
        {"w": X[0, 0, :2], "c": X[0, 0, :2]},
    ),
    "pad_reflect": (node("Pad", ["x", "p"], mode="reflect"), XS, {"p": np.array([0, 1, 0, 0, 1, 0])}),
    "last_of_equals": (node("ArgMin", ["x"], select_last_index=1), XS, {}),
    "resize": (
        node("Resize", ["x", "", "", "c"], mode="linear"), {"x": (X, [2, 3, 4])}, {"c": np.array([2, 6, 4])}
    ),
    "nonzero": (node("NonZero", ["x"]), XS, {}),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_form_without_a_kernel_is_refused_by_name(case, tmp_path):
    nodes, inputs, constants = REFUSED[case]
    onnx.save(model_of([nodes], inputs, {"y": np.float32}, constants), tmp_path / "m.onnx")
    with pytest.raises(EngineUnavailable, match=rf"1 node\(s\): {nodes.op_type} \(output y\)"):
        NativeEngine.from_bundle(tmp_path / "m.onnx")


def test_a_norm_that_also_gives_its_mean_is_refused(tmp_path):
    nodes = [helper.make_node("LayerNormalization", ["x", "w"], ["y", "mean"])]
    model = model_of(nodes, XS, {"y": np.float32, "mean": np.float32}, {"w": POSITIVE[0, 0]})
    onnx.save(model, tmp_path / "m.onnx")
    with pytest.raises(EngineUnavailable, match="LayerNormalization"):
        NativeEngine.from_bundle(tmp_path / "m.onnx")


@pytest.mark.parametrize(("axis", "largest", "k"), [(-1, 1, 2), (1, 0, 3), (0, 1, 1)])
def test_top_k_agrees_with_onnx(axis, largest, k, tmp_path):
    """Values and indices; equal values keep the order of their indices."""
    x = np.round(X * 2) / 2
    nodes = [helper.make_node("TopK", ["x", "k"], ["v", "i"], axis=axis, largest=largest)]
    model = model_of(nodes, {"x": (x, S)}, {"v": np.float32, "i": np.int64}, {"k": np.array([k])})
    got, expected = run(model, {"x": x}, tmp_path)
    same(got["v"], expected["v"])
    order = np.argsort(-x if largest else x, axis=axis, kind="stable")
    np.testing.assert_array_equal(got["i"], np.take(order, range(k), axis=axis))


def test_negative_padding_cuts(tmp_path):
    """onnx's evaluator does not know it; the specification does."""
    model = model_of([node("Pad", ["x", "p"])], XS, {"y": np.float32}, {"p": np.array([0, 1, -1, 0, -2, -1])})
    onnx.save(model, tmp_path / "m.onnx")
    engine = NativeEngine.from_bundle(tmp_path / "m.onnx", threads=1)
    expected = np.pad(X, ((0, 0), (1, 0), (0, 0)))[:, :-2, 1:-1]
    np.testing.assert_array_equal(engine.forward([({"x": X}, engine.new_state())])[0]["y"], expected)


def test_sizes_known_only_at_run_time_flow_through_a_program(tmp_path):
    """Range, Expand, ConstantOfShape, Where and Slice whose sizes come from two inputs, at three sizes, one engine."""
    nodes = [
        helper.make_node("Shape", ["x"], ["n"], start=0, end=1),
        helper.make_node("Shape", ["z"], ["m"], start=0, end=1),
        helper.make_node("Add", ["n", "m"], ["t1"]),
        helper.make_node("Squeeze", ["t1", "zero"], ["t"]),
        helper.make_node("Range", ["nil", "t", "one"], ["r"]),
        helper.make_node("Concat", ["x", "z"], ["xz"], axis=0),
        helper.make_node("Cast", ["r"], ["rf"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["xz", "rf"], ["scaled"]),
        helper.make_node("Concat", ["t1", "t1"], ["square"], axis=0),
        helper.make_node("Expand", ["scaled", "square"], ["wide"]),
        helper.make_node("ConstantOfShape", ["square"], ["zeros"]),
        helper.make_node("Less", ["zeros", "wide"], ["positive"]),
        helper.make_node("Where", ["positive", "wide", "zeros"], ["kept"]),
        helper.make_node("Neg", ["m"], ["minus_m"]),
        helper.make_node("Slice", ["kept", "minus_m", "end", "zero"], ["y"]),
    ]
    constants = {"zero": np.array([0]), "nil": np.array(0), "one": np.array(1), "end": np.array([2**62])}
    x, z = X[0, 0], X[1, 1]
    model = model_of(nodes, {"x": (x, ["n"]), "z": (z, ["m"])}, {"y": np.float32}, constants)
    path = tmp_path / "model.onnx"
    onnx.save(model, path)
    engine = NativeEngine.from_bundle(path, threads=2)
    reference = ReferenceEvaluator(model)
    for n, m in ((4, 2), (1, 4), (3, 3)):
        feeds = {"x": x[:n], "z": z[:m]}
        got = engine.forward([(feeds, engine.new_state())])[0]["y"]
        np.testing.assert_array_equal(got, reference.run(None, feeds)[0])


def test_a_size_that_padding_gives_back_is_the_inputs_own(tmp_path):
    """x[:, 1:] padded by one row has as many rows as x; heads that are counted by -1 are a number all the same."""
    nodes = [
        helper.make_node("Slice", ["x", "one", "end", "one"], ["cut"]),
        helper.make_node("Pad", ["cut", "pads"], ["padded"]),
        helper.make_node("Add", ["padded", "x"], ["sum"]),
        helper.make_node("Shape", ["x"], ["rows"], start=0, end=2),
        helper.make_node("Concat", ["rows", "heads"], ["shape"], axis=0),
        helper.make_node("Reshape", ["sum", "shape"], ["y"]),
    ]
    constants = {
        "one": np.array([1]), "end": np.array([2**62]), "pads": np.array([0, 0, 0, 0, 1, 0]), "heads": np.array([-1, 2])
    }  # fmt: skip
    model = model_of(nodes, XS, {"y": np.float32}, constants)
    got, expected = run(model, {"x": X}, tmp_path)
    same(got["y"], expected["y"])
    program = NativeEngine.from_bundle(tmp_path / "model.onnx", threads=1).program
    assert program.slots[program.outputs["y"]].shape[2:] == (2, 2)


def test_rows_are_padded_to_a_multiple_and_cut_into_blocks(tmp_path):
    """The remainder of a size is a size: [n, 4] becomes [ceil(n / 3), 3, 4] at three n."""
    nodes = [
        helper.make_node("Shape", ["x"], ["n"], start=0, end=1),
        helper.make_node("Neg", ["n"], ["minus"]),
        helper.make_node("Mod", ["minus", "three"], ["more"]),
        helper.make_node("Concat", ["zero", "zero", "more", "zero"], ["pads"], axis=0),
        helper.make_node("Pad", ["x", "pads"], ["padded"]),
        helper.make_node("Add", ["n", "more"], ["rows"]),
        helper.make_node("Div", ["rows", "three"], ["blocks"]),
        helper.make_node("Concat", ["blocks", "three", "four"], ["shape"], axis=0),
        helper.make_node("Reshape", ["padded", "shape"], ["y"]),
    ]
    constants = {"zero": np.array([0]), "three": np.array([3]), "four": np.array([4])}
    x = X.reshape(6, 4)
    model = model_of(nodes, {"x": (x, ["n", 4])}, {"y": np.float32}, constants)
    onnx.save(model, tmp_path / "m.onnx")
    engine = NativeEngine.from_bundle(tmp_path / "m.onnx", threads=1)
    for n in (6, 1, 5):
        got = engine.forward([({"x": x[:n]}, engine.new_state())])[0]["y"]
        np.testing.assert_array_equal(got, ReferenceEvaluator(model).run(None, {"x": x[:n]})[0])


def test_one_error_names_every_node_that_cannot_be_lowered(tmp_path):
    nodes = [
        helper.make_node("NonZero", ["x"], ["where"]),
        helper.make_node("Det", ["q"], ["d"]),
        helper.make_node("Relu", ["x"], ["y"]),
    ]
    q = np.eye(2, dtype=np.float32)[None]
    inputs = {"x": (X, S), "q": (q, ["n", 2, 2])}
    model = model_of(nodes, inputs, {"where": np.int64, "d": np.float32, "y": np.float32})
    onnx.save(model, tmp_path / "m.onnx")
    with pytest.raises(EngineUnavailable, match=r"(?s)2 node.*NonZero \(output where\).*Det \(output d\)"):
        NativeEngine.from_bundle(tmp_path / "m.onnx")


def test_an_index_outside_its_table_is_refused(tmp_path):
    model = model_of([node("Gather", ["c", "i"])], {"i": (INTS[0], ["b", 4])}, {"y": np.float32}, {"c": X[0]})
    onnx.save(model, tmp_path / "m.onnx")
    engine = NativeEngine.from_bundle(tmp_path / "m.onnx", threads=1)
    with pytest.raises(InputError, match="3, expected 0 to 2"):
        engine.forward([({"i": np.array([[0, 1, 2, 3]])}, engine.new_state())])


def test_sizes_that_do_not_fit_are_refused(tmp_path):
    model = model_of([node("Add", ["x", "z"])], {"x": (X, S), "z": (X, ["a2", "b2", 4])}, {"y": np.float32})
    onnx.save(model, tmp_path / "m.onnx")
    engine = NativeEngine.from_bundle(tmp_path / "m.onnx", threads=1)
    with pytest.raises(InputError, match="do not fit"):
        engine.forward([({"x": X, "z": X[:, :2]}, engine.new_state())])


def test_products_of_unequal_batches_are_refused(tmp_path):
    inputs = {"x": (X, S), "z": (Y, ["a2", 4, "c"])}
    onnx.save(model_of([node("MatMul", ["x", "z"])], inputs, {"y": np.float32}), tmp_path / "m.onnx")
    engine = NativeEngine.from_bundle(tmp_path / "m.onnx", threads=1)
    with pytest.raises(InputError, match="do not fit"):
        engine.forward([({"x": np.concatenate([X, X]), "z": Y}, engine.new_state())])


def test_the_comparison_used_here_sees_a_wrong_sum():
    with pytest.raises(AssertionError):
        same(X, X * np.float32(1 + 1e-4))
