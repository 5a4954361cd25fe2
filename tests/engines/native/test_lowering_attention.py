"""Attention from graph to program: caches, masks and rotations, as operators and in decomposed forms."""

from __future__ import annotations

import numpy as np
import pytest
from support.decoder_graphs import (
    LM,
    ROWS,
    Builder,
    F,
    decoder_layer,
    decomposed_attention,
    heads,
    kinds,
    partial,
    program,
    quantized,
    quarter_rotation,
    table,
    window_mask,
)

from edgeformer.errors import EngineUnavailable

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
    assert p.ops[2].names["q_norm"] == p.ops[2].names["k_norm"] == ["rms"]


def test_partial_rotation_is_folded():
    g = Builder()
    p = program(g, LM, *decoder_layer(g, rotate=partial))
    assert [k for k in kinds(p) if k != "slice"] == SEVEN
    attend = next(op for op in p.ops if op.kind == "attend")
    assert attend.ints["rotary"] == [8]


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


def test_attention_output_that_is_not_joined_to_rows_stays_in_heads():
    g = Builder()
    q, k, v = (heads(g, "x", 4) for _ in range(3))
    p = program(g, ROWS, g("Attention", q, k, v))
    assert kinds(p) == ["attend", "transpose"]


def test_decomposed_attention_with_a_joined_cache_is_one_operation():
    """softmax(q k^T / 4 + mask) v where k, v = Concat(past, new): causality, cache and scale are found."""
    g = Builder()
    q, new_k, new_v = (heads(g, quantized(g, "x", "q8", n=32), 2) for _ in range(3))
    k, v = g("Concat", "pk", new_k, axis=2), g("Concat", "pv", new_v, axis=2)
    y = decomposed_attention(g, q, k, v, g("Where", window_mask(g, op="LessOrEqual"), 0.0, -3e38))
    rows = g("Reshape", g("Transpose", y, perm=[0, 2, 1, 3]), np.array([0, 0, 32]))
    inputs = {n: LM[n] for n in ("x", "pk", "pv")}
    p = program(g, inputs, rows, k, v)
    assert "attend" in kinds(p) and "matmul" not in kinds(p)
    attend = next(op for op in p.ops if op.kind == "attend")
    assert attend.floats["scale"] == [0.25]
    assert attend.ints["layer"] == [0]
    assert list(p.outputs) == [rows]


def test_a_cache_that_the_graph_reads_itself_is_a_history():
    g = Builder()
    k = g("Concat", "pk", heads(g, "x", 4), axis=2)
    total = g("ReduceSum", k, np.array([2]), keepdims=0)
    p = program(g, {"x": LM["x"], "pk": (F, ["batch", 4, "past", 16])}, total, k)
    assert "history" in kinds(p)
    assert [c.plain for c in p.caches] == [True]
    assert list(p.outputs) == [total]
    assert not p.row_local


def test_products_and_sums_of_scalars_are_no_rotation():
    g = Builder()
    number = g("ReduceSum", "x", keepdims=0)
    scaled = g("Add", g("Mul", number, number), g("Mul", g("Neg", number), number))
    program(g, ROWS, g("Mul", "x", scaled))


def test_a_cache_input_with_an_unsupported_consumer_is_refused_by_name():
    g = Builder()
    y = g("Add", "x", g("ReduceSum", "past_key_values.0.key", np.array([0, 1, 2, 3]), keepdims=0))
    with pytest.raises(EngineUnavailable, match=r"past_key_values\.0\.key"):
        program(g, {"x": LM["x"], "past_key_values.0.key": LM["pk"]}, y)


# -- decomposed rotations --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("interleaved", [False, True])
def test_a_decomposed_rotation_is_folded_into_attention(interleaved):
    g = Builder()
    tables = table(g, interleaved)

    def rotate(g, x):
        return g("Add", g("Mul", x, tables[0]), g("Mul", quarter_rotation(g, x, interleaved), tables[1]))

    inputs = {k: v for k, v in LM.items() if k not in ("cos", "sin")} | {"angle": LM["cos"]}
    p = program(g, inputs, *decoder_layer(g, rotate=rotate))
    assert [k for k in kinds(p) if k in SEVEN] == SEVEN
    attend = next(op for op in p.ops if op.kind == "attend")
    assert attend.ints["rotary"] == attend.ints["rotary_k"] == [16]
    assert attend.ints["interleaved"] == [int(interleaved)]
    assert p.row_local


@pytest.mark.parametrize("interleaved", [False, True])
def test_a_rotation_the_other_way_is_not_folded(interleaved):
    g = Builder()
    tables = table(g, interleaved)

    def rotate(g, x):
        return g("Add", g("Mul", x, tables[0]), g("Mul", quarter_rotation(g, x, interleaved, wrong=True), tables[1]))

    inputs = {k: v for k, v in LM.items() if k not in ("cos", "sin")} | {"angle": LM["cos"]}
    p = program(g, inputs, *decoder_layer(g, rotate=rotate))
    assert next(op for op in p.ops if op.kind == "attend").ints["rotary"] == [0]
