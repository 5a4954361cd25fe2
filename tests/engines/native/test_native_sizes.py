"""Sizes that are known at run time only, through whole programs, at several sizes with one engine."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

pytest.importorskip("edgeformer._native", reason="the native extension is not built")

from support.one_graph import XS, X, model_of, run, same

from edgeformer.engines.native.engine import NativeEngine


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
