"""The rows that `logits_to_keep` asks for, of values of every rank and type, against onnx's evaluator."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx.reference import ReferenceEvaluator
from support.decoder_graphs import I64, ROWS, Builder, F

native = pytest.importorskip("edgeformer._native", reason="the native extension is not built")

from edgeformer.engines.native.engine import NativeEngine
from edgeformer.engines.native.ir.dims import INT64_MAX

BATCH, LENGTH = 2, 5
INPUTS = {**ROWS, "ids": (I64, ["batch", "sequence"]), "table": (F, [1, "sequence", 3])}
RNG = np.random.default_rng(0)
W = (RNG.standard_normal((64, 48)) / 8).astype(np.float32)


def last(g, x):
    start = g("Unsqueeze", g("Neg", "logits_to_keep"), np.array([0]))
    return g("Slice", x, start, np.array([INT64_MAX]), np.array([1]))


def heads(g, x, *shape):
    """x as [batch, sequence, *shape], its first axis of heads reversed: Keep does not move up past the reversal."""
    split = g("Reshape", x, np.array([0, 0, *shape]))
    return g("Slice", split, np.array([-1]), np.array([-99]), np.array([2]), np.array([-1]))


def flat(g, x):
    return g("Reshape", x, np.array([0, 0, 64]))


# name -> the kept rows of a value. Keep moves up through row-wise operations, so it is applied to values with heads.
CASES = {
    "one_row_a_token": lambda g: last(g, g("Exp", "x")),
    "heads": lambda g: last(g, heads(g, "x", 4, 16)),
    "heads_in_groups": lambda g: last(g, heads(g, "x", 2, 2, 16)),
    "joined_heads": lambda g: last(g, flat(g, g("Tanh", heads(g, "x", 4, 16)))),
    # a former error with XGLM and DiffLlama: decomposed attention ends in a Transpose that has heads
    "transposed_heads": lambda g: last(g, flat(g, g("Transpose", heads(g, "x", 4, 16), perm=[0, 1, 3, 2]))),
    "norm_of_each_head": lambda g: last(
        g, flat(g, g("RMSNormalization", heads(g, "x", 4, 16), np.ones(16, np.float32), epsilon=1e-6))
    ),
    "linear_of_joined_heads": lambda g: g("MatMul", last(g, flat(g, heads(g, "x", 8, 8))), W),
    "residual_with_heads": lambda g: last(
        g, g("Add", "x", flat(g, g("Mul", heads(g, "x", 4, 16), heads(g, g("Tanh", "x"), 4, 16))))
    ),
    "token_ids": lambda g: g("Cast", last(g, "ids"), to=F),
    "a_table_of_positions": lambda g: last(g, g("Neg", "table")),  # its rows are not tokens: axis 0 is 1
}


def built(case, folder, **options):
    g = Builder()
    y = CASES[case](g)
    used = {i for n in g.nodes for i in n.input}
    inputs = {k: v for k, v in {**INPUTS, "logits_to_keep": (I64, [])}.items() if k in used | {"x"}}
    model = g.model(inputs, [y])
    onnx.save(model, folder / "model.onnx")
    return model, NativeEngine.from_bundle(folder / "model.onnx", **options), inputs, y


def feeds(inputs, keep, length=LENGTH, batch=BATCH):
    rng = np.random.default_rng(length)
    values = {
        "x": rng.standard_normal((batch, length, 64)).astype(np.float32),
        "ids": rng.integers(0, 90, (batch, length)),
        "table": rng.standard_normal((1, length, 3)).astype(np.float32),
        "logits_to_keep": np.array(keep),
    }
    return {name: values[name] for name in inputs}


@pytest.mark.parametrize("keep", [0, 1, 3, LENGTH])
@pytest.mark.parametrize("case", CASES)
def test_kept_rows_agree_with_onnx(case, keep, tmp_path):
    for isa in native.isas():
        model, engine, inputs, y = built(case, tmp_path, threads=2, isa=isa)
        given = feeds(inputs, keep)
        got = engine.forward([(given, engine.new_state())])[0][y]
        expected = ReferenceEvaluator(model).run(None, given)[0]
        assert got.shape == expected.shape
        # sums of 64 products of size 1, one polynomial activation: 64 roundings of 2^-24, values of size 1 to 20
        np.testing.assert_allclose(got, expected, rtol=64 * 2**-24, atol=64 * 2**-24, err_msg=isa)


@pytest.mark.parametrize("case", ["heads", "norm_of_each_head", "linear_of_joined_heads"])
def test_states_of_several_lengths_keep_their_own_last_rows(case, tmp_path):
    model, engine, inputs, y = built(case, tmp_path, threads=1)
    calls = [feeds(inputs, 2, length, batch) for length, batch in ((5, 1), (1, 2), (7, 2), (2, 1))]
    got = engine.forward([(given, engine.new_state()) for given in calls])
    for given, found in zip(calls, got, strict=True):
        expected = ReferenceEvaluator(model).run(None, given)[0]
        np.testing.assert_allclose(found[y], expected, rtol=64 * 2**-24, atol=64 * 2**-24)


def test_the_comparison_sees_the_rows_of_another_head(tmp_path):
    model, _, inputs, _ = built("joined_heads", tmp_path, threads=1)
    given = feeds(inputs, 1)
    expected = ReferenceEvaluator(model).run(None, given)[0]
    wrong = np.roll(expected, 16, axis=-1)
    assert np.abs(wrong - expected).max() > 1000 * 64 * 2**-24


@pytest.mark.parametrize(
    ("case", "kind", "dtype"),
    [("one_row_a_token", "keep", "f32"), ("token_ids", "keep", "i64"), ("a_table_of_positions", "slice", "f32")],
)
def test_only_values_with_a_row_for_each_token_are_kept_by_rows_and_keep_their_type(case, kind, dtype, tmp_path):
    program = built(case, tmp_path, threads=1)[1].program
    (op,) = [op for op in program.ops if op.kind in ("keep", "slice")]
    assert (op.kind, program.slots[op.outputs[0]].dtype) == (kind, dtype)
