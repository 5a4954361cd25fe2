"""Unsupported graphs and wrong inputs are refused, and the error names each."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import helper

pytest.importorskip("edgeformer._native", reason="the native extension is not built")

from support.one_graph import INTS, IS, POSITIVE, XS, S, X, Y, model_of, node

from edgeformer.engines.native.engine import NativeEngine
from edgeformer.errors import EngineUnavailable, InputError

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


def test_a_norm_with_a_second_output_is_refused(tmp_path):
    nodes = [helper.make_node("LayerNormalization", ["x", "w"], ["y", "mean"])]
    model = model_of(nodes, XS, {"y": np.float32, "mean": np.float32}, {"w": POSITIVE[0, 0]})
    onnx.save(model, tmp_path / "m.onnx")
    with pytest.raises(EngineUnavailable, match="LayerNormalization"):
        NativeEngine.from_bundle(tmp_path / "m.onnx")


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
