"""Every plain operation that the native engine knows, against onnx's ReferenceEvaluator, which shares no code."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

pytest.importorskip("edgeformer._native", reason="the native extension is not built")

from support.one_graph import (
    BS,
    EDGES,
    HALVES,
    INTS,
    IS,
    POSITIVE,
    RNG,
    TABLE,
    XS,
    XZ,
    B,
    S,
    X,
    Y,
    model_of,
    node,
    run,
    same,
)

from edgeformer.engines.native.engine import NativeEngine

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


def test_the_comparison_used_here_sees_a_wrong_sum():
    with pytest.raises(AssertionError):
        same(X, X * np.float32(1 + 1e-4))
