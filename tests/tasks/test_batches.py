"""Encoders on the native engine: large batches run in pieces with the same bits; the error of int8 attention."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx.reference import ReferenceEvaluator
from support import decoder_graphs as graphs

pytest.importorskip("edgeformer._native", reason="the native extension is not built")

from edgeformer.engines.native.engine import PREFILL_ROWS, NativeEngine
from edgeformer.errors import InputError

RNG = np.random.default_rng(5)
INPUTS = {"x": (graphs.F, ["batch", "sequence", 64]), "seen": (onnx.TensorProto.BOOL, ["batch", "sequence"])}


def encoder(g, scheme="q8", mask=True):
    """A graph of one attention layer between linears; `mask` hides padded keys. An empty `scheme` is float weights."""
    make = graphs.quantized if scheme else float_linear
    q, k, v = (graphs.heads(g, make(g, "x", scheme, n=64), 4) for _ in range(3))
    hidden = g("Unsqueeze", "seen", np.array([1, 2])) if mask else ""
    y = g("Attention", q, k, v, hidden)
    y = g("Reshape", g("Transpose", y, perm=[0, 2, 1, 3]), np.array([0, 0, 64]))
    return g("Add", "x", make(g, y, scheme, n=64))


def float_linear(g, x, scheme, n):
    return g("MatMul", x, graphs.fp16(RNG.standard_normal((64, n)) / 8))


def mixing(how):
    """A builder of an encoder in which the items of a batch affect each other."""

    def make(g):
        y = encoder(g, "", mask=False)
        if how == "mean over the batch":
            return g("Add", y, g("ReduceMean", y, np.array([0]), keepdims=1))
        if how == "softmax over the batch":
            return g("Softmax", y, axis=0)
        return g("Reshape", g("Transpose", y, perm=[1, 0, 2]), np.array([0, 0, 64]))

    return make


def engine(tmp_path, make, **options):
    g = graphs.Builder()
    model = g.model(INPUTS, [make(g)])
    onnx.save(model, tmp_path / "model.onnx")
    return NativeEngine.from_bundle(tmp_path / "model.onnx", threads=2, **options), model


def feeds(batch, length):
    seen = np.ones((batch, length), bool)
    seen[::2, length - length // 4 :] = False
    return {"x": RNG.standard_normal((batch, length, 64)).astype(np.float32), "seen": seen}


def run(e, x):
    return next(iter(e.forward([(x, e.new_state())])[0].values()))


@pytest.mark.parametrize(("batch", "length"), [(7, 300), (3, PREFILL_ROWS), (2, 600), (33, 16), (40, 50)])
def test_a_batch_in_pieces_has_the_bits_of_its_items(tmp_path, batch, length):
    e, _ = engine(tmp_path, encoder)
    assert e.program.batch_local
    x = feeds(batch, length)
    whole = run(e, x)
    for i in range(batch):
        np.testing.assert_array_equal(whole[i : i + 1], run(e, {n: a[i : i + 1] for n, a in x.items()}))


@pytest.mark.parametrize("how", ["mean over the batch", "softmax over the batch", "batch and sequence swapped"])
def test_a_batch_whose_items_mix_is_not_split(tmp_path, how):
    e, model = engine(tmp_path, mixing(how))
    assert not e.program.batch_local
    x = feeds(5, 200)  # more rows than one piece has
    (expected,) = ReferenceEvaluator(model).run(None, x)
    got = run(e, x)
    assert np.linalg.norm(got - expected) < 1e-5 * np.linalg.norm(expected)


def test_inputs_of_unequal_batches_are_refused_as_a_whole(tmp_path):
    e, _ = engine(tmp_path, encoder)
    x = feeds(8, 200)
    with pytest.raises(InputError):
        run(e, {**x, "seen": x["seen"][:5]})


def test_keys_and_values_from_quantized_weights_are_int8(tmp_path):
    """The error of int8 attention is at most twice that of float attention.

    int8 activations round two tensors, x and the attended values; int8 attention rounds q, k and v as well. If all
    five errors are equal and independent, the total grows by sqrt(5 / 2) = 1.58.
    """
    errors = {}
    x = feeds(2, 140)
    for kv in ("float32", "int8"):
        RNG.bit_generator.state = np.random.default_rng(6).bit_generator.state
        graphs.RNG.bit_generator.state = np.random.default_rng(7).bit_generator.state
        (tmp_path / kv).mkdir()
        e, model = engine(tmp_path / kv, encoder, kv=kv)
        assert [o.ints["integers"] for o in e.program.ops if o.kind == "attend"] == [[1]]
        (expected,) = ReferenceEvaluator(model).run(None, x)
        errors[kv] = np.linalg.norm(run(e, x) - expected) / np.linalg.norm(expected)
    assert errors["float32"] < errors["int8"] < 2 * errors["float32"]


def test_attention_after_float_weights_is_float(tmp_path):
    e, model = engine(tmp_path, lambda g: encoder(g, ""))
    assert [o.ints["integers"] for o in e.program.ops if o.kind == "attend"] == [[0]]
    x = feeds(2, 140)
    (expected,) = ReferenceEvaluator(model).run(None, x)
    assert np.linalg.norm(run(e, x) - expected) < 1e-5 * np.linalg.norm(expected)


def test_cross_attention_is_float(tmp_path):
    """Its keys would have to be packed again at every decode step."""
    g = graphs.Builder()
    q = graphs.heads(g, graphs.quantized(g, "x", "q8", n=64), 4)
    k, v = (graphs.heads(g, graphs.quantized(g, "source", "q8", n=64), 4) for _ in range(2))
    y = g("Reshape", g("Transpose", g("Attention", q, k, v), perm=[0, 2, 1, 3]), np.array([0, 0, 64]))
    inputs = {"x": (graphs.F, ["batch", "sequence", 64]), "source": (graphs.F, ["batch", "far", 64])}
    p = graphs.program(g, inputs, y)
    assert [o.ints["integers"] for o in p.ops if o.kind == "attend"] == [[0]]
