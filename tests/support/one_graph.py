"""Small graphs run by the native engine and by onnx's ReferenceEvaluator, which shares no code with it."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from edgeformer.engines.native.engine import NativeEngine

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
