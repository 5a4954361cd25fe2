"""The passes that cover any architecture: the graph before and after, and that the numbers are the same."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the toolchain needs torch")
pytest.importorskip("onnx_ir", reason="the toolchain needs onnx-ir")
pytest.importorskip("onnxruntime", reason="the toolchain needs onnxruntime")

from support.graphs import ops, parse, run

from edgeformer.export.passes.causal import name_causality
from edgeformer.export.passes.einsum import plain_products
from edgeformer.export.passes.kv_cache import join_cache
from edgeformer.export.passes.masked_assignment import masked_assignments
from edgeformer.export.passes.masks import drop_true, spread_rows
from edgeformer.export.passes.names import merge_tied
from edgeformer.export.passes.slices import slice_parameters
from edgeformer.export.passes.softmax import fuse_softmax

RNG = np.random.default_rng(0)


def floats(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize(
    ("equation", "a", "b"),
    [
        ("bhqd,bhkd->bhqk", "float[b,2,s,4]", "float[b,2,t,4]"),
        ("bhqk,bhkd->bqhd", "float[b,2,s,t]", "float[b,2,t,4]"),
        ("bqhd,bkhd->bhqk", "float[b,s,2,4]", "float[b,t,2,4]"),
    ],
)
def test_an_einsum_over_one_index_becomes_a_matmul(equation, a, b):
    sizes = {"b": 2, "s": 3, "t": 5, "2": 2, "4": 4}
    x, y = (floats(*(sizes[d] for d in t[6:-1].split(","))) for t in (a, b))
    model = parse(f'({a} x, {b} y) => (float[b,p,q,r] z) {{ z = Einsum<equation="{equation}">(x, y) }}')
    before = run(model, x=x, y=y)[0]
    plain_products(model)
    assert set(ops(model)) <= {"MatMul", "Transpose"}
    np.testing.assert_allclose(run(model, x=x, y=y)[0], before, rtol=1e-5, atol=1e-5)


def test_an_einsum_that_is_no_product_of_matrices_stays():
    model = parse('(float[s,4] x, float[s,4] y) => (float[s,4] z) { z = Einsum<equation="sd,sd->sd">(x, y) }')
    plain_products(model)
    assert ops(model) == ["Einsum"]


def test_an_experts_slice_becomes_a_parameter_of_its_own():
    w, x = floats(3, 4, 8), floats(2, 8)
    model = parse(
        """(float[n,8] x) => (float[n,4] y) {
            one = Gather<axis=0>(experts, i)
            turned = Transpose<perm=[1, 0]>(one)
            y = MatMul(x, turned)
        }""",
        experts=w,
        i=np.array(2),
    )
    before = run(model, x=x)[0]
    slice_parameters(model)
    assert "Gather" not in ops(model)
    assert list(model.graph.initializers) == ["experts.2"]
    np.testing.assert_array_equal(run(model, x=x)[0], before)


def test_and_with_true_is_dropped_and_with_false_is_not():
    for value, left in ((True, ["Not"]), (False, ["Not", "And"])):
        model = parse(
            "(bool[s] x) => (bool[s] y) { z = Not(x) w = And(z, c) y = Not(w) }",
            c=np.array(value),
        )
        drop_true(model)
        assert ops(model) == [*left, "Not"]


def test_a_key_padding_mask_is_spread_over_the_queries():
    q, mask = floats(2, 1, 3, 4), np.array([[1, 1, 0], [1, 0, 0]], bool).reshape(2, 1, 1, 3)
    model = parse("(float[2,1,s,4] q, bool[2,1,1,s] m) => (float[2,1,s,4] y) { y = Attention(q, q, q, m) }")
    with pytest.raises(Exception, match="q_sequence_length"):
        run(model, q=q, m=mask)
    spread_rows(model)
    scores = q @ q.transpose(0, 1, 3, 2) / 2 + np.where(mask, 0, -np.inf)
    weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    np.testing.assert_allclose(run(model, q=q, m=mask)[0], weights @ q, rtol=1e-5, atol=1e-5)


NUMBERS = {"half": np.array(0.5, np.float32), "low": np.array(-1e30, np.float32)}
HAND = """(float[b,2,s,4] q, float[b,2,s,4] k, float[b,2,s,4] v, bool[s,s] seen) => (float[b,2,s,4] y) {{
    turned = Transpose<perm=[0, 1, 3, 2]>(k)
    raw = MatMul(q, turned)
    {steps}
    weights = Softmax<axis=-1>(scores)
    y = MatMul(weights, v)
}}"""


@pytest.mark.parametrize(
    "steps",
    [
        "scores = Mul(raw, half)",
        "scaled = Mul(raw, half) scores = Where(seen, scaled, low)",
        "scaled = Div(raw, half) hidden = Not(seen) scores = Where(hidden, low, scaled)",
        "scaled = Mul(half, raw) scores = Add(scaled, bias)",
        "scaled = Mul(half, raw) biased = Add(bias, scaled) scores = Where(seen, biased, low)",
    ],
)
def test_softmax_attention_becomes_one_node(steps):
    q, k, v, bias = floats(2, 2, 3, 4), floats(2, 2, 3, 4), floats(2, 2, 3, 4), floats(1, 2, 3, 3)
    feeds = {"q": q, "k": k, "v": v, "seen": np.tril(np.ones((3, 3), bool))}
    model = parse(HAND.format(steps=steps), **NUMBERS, **({"bias": bias} if "bias" in steps else {}))
    before = run(model, **feeds)[0]
    assert fuse_softmax(model) == 1
    assert ops(model).count("Attention") == 1
    assert "Softmax" not in ops(model)
    np.testing.assert_allclose(run(model, **feeds)[0], before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("steps", ["scores = Tanh(raw)", "b = Add(raw, bias) scores = Mul(b, half)"])
def test_scores_that_the_node_cannot_say_stay_as_they_are(steps):
    model = parse(HAND.format(steps=steps), **NUMBERS, **({"bias": floats(1, 2, 3, 3)} if "bias" in steps else {}))
    assert fuse_softmax(model) == 0
    assert "Softmax" in ops(model)


MASKED = """(float[b,2,sequence,4] q, int64[b,sequence] given) => (float[b,2,sequence,4] y) {{
    size = Shape<start=2, end=3>(q)
    length = Squeeze(size)
    zero = Constant<value_int=0>()
    one = Constant<value_int=1>()
    first = Constant<value_ints=[0]>()
    second = Constant<value_ints=[1]>()
    place = Range(zero, length, one)
    columns = Unsqueeze(place, first)
    rows = Unsqueeze(place, second)
    {mask}
    y = Attention(q, q, q, m)
}}"""
HIDE = "seen = LessOrEqual(columns, rows) none = Constant<value_float=0.0>() low = Constant<value_float=-1e30>() "


@pytest.mark.parametrize(
    ("mask", "causal", "stays"),
    [
        ("m = LessOrEqual(columns, rows)", True, False),
        ("later = Greater(columns, rows) m = Not(later)", True, False),
        (HIDE + "m = Where(seen, none, low)", True, False),
        (HIDE + "d = Sub(columns, rows) f = Cast<to=1>(d) m = Where(seen, f, low)", True, True),
        ("m = Less(columns, rows)", False, True),
        ("m = GreaterOrEqual(columns, rows)", False, True),
        ("here = Equal(given, given) wide = Unsqueeze(given, second) t = Greater(wide, zero)"
         " c = LessOrEqual(columns, rows) m = And(c, t)", False, True),
    ],
)  # fmt: skip
def test_a_mask_is_causal_by_what_it_computes(mask, causal, stays):
    model = parse(MASKED.format(mask=mask))
    name_causality(model)
    node = next(n for n in model.graph if n.op_type == "Attention")
    attribute = node.attributes.get("is_causal")
    assert bool(attribute and attribute.value) == causal
    assert (len(node.inputs) > 3 and node.inputs[3] is not None) == stays


APPENDED = """(float[1,2,s,4] q, float[1,2,s,4] k, float[1,2,s,4] v, float[1,2,p,4] pk, float[1,2,p,4] pv)
    => (float[1,2,s,4] y, float[1,2,t,4] present_key, float[1,2,t,4] present_value) {{
    key = edgeformer.Append(k, pk)
    value = edgeformer.Append(v, pv)
    {body}
    present_key = Identity(key)
    present_value = Identity(value)
}}"""


def reference(q, k, v):
    scores = q @ k.transpose(0, 1, 3, 2) / np.sqrt(q.shape[-1])
    later = np.arange(k.shape[2])[None] > np.arange(q.shape[2])[:, None] + k.shape[2] - q.shape[2]
    weights = np.exp(np.where(later, -np.inf, scores))
    return weights / weights.sum(-1, keepdims=True) @ v


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("y = Attention<is_causal=1>(q, key, value)", ["Attention"]),
        # a second attention on the same keys reads the present, with causality as a mask
        ("a = Attention<is_causal=1>(q, key, value) b = Attention<is_causal=1>(q, key, value) "
         "c = Sub(b, a) y = Add(a, c)", ["Attention", "Attention"]),
        # another operator reads the keys before: a plain concatenation
        ("w = Mul(value, one) y = Attention<is_causal=1>(q, key, w)", ["Attention", "Concat", "Concat"]),
    ],
)  # fmt: skip
def test_appended_keys_move_into_their_attention(body, expected):
    model = parse(APPENDED.format(body=body), **({"one": np.ones(1, np.float32)} if "one" in body else {}))
    for output in model.graph.outputs[1:]:
        output.name = output.name.replace("present_", "present.0.")
    assert join_cache(model) == 1
    found = [op for op in ops(model) if op in ("Attention", "Concat", "edgeformer::Append")]
    assert sorted(found) == sorted(expected)
    for past in (0, 3):
        q, k, v, pk, pv = (floats(1, 2, n, 4) for n in (2, 2, 2, past, past))
        y, key, value = run(model, q=q, k=k, v=v, pk=pk, pv=pv)
        np.testing.assert_array_equal(key, np.concatenate([pk, k], 2))
        np.testing.assert_array_equal(value, np.concatenate([pv, v], 2))
        np.testing.assert_allclose(y, reference(q, key, value), rtol=1e-4, atol=1e-5)


def test_tied_parameters_become_one_initializer():
    table = torch.from_numpy(floats(8, 4))
    model = parse(
        """(int64[s] ids) => (float[s,8] y) {
            x = Gather(embed, ids)
            turned = Transpose<perm=[1, 0]>(head)
            y = MatMul(x, turned)
        }""",
        embed=table.numpy(),
        head=table.numpy(),
    )
    ids = np.array([1, 5])
    before = run(model, ids=ids)[0]
    merge_tied(model, {"embed": table, "head": table})
    assert list(model.graph.initializers) == ["embed"]
    np.testing.assert_array_equal(run(model, ids=ids)[0], before)
    other = parse(
        "(int64[s] ids) => (float[s,4] y) { a = Gather(embed, ids) b = Gather(head, ids) y = Add(a, b) }",
        embed=table.numpy(),
        head=table.numpy(),
    )
    merge_tied(other, {"embed": table, "head": table.clone()})
    assert len(other.graph.initializers) == 2, "equal is not tied"


GATHERED = """
    found = NonZero({mask})
    places = Transpose<perm=[1, 0]>(found)
    rows = GatherND(x, places)
"""
SPREAD = """
    wide = Unsqueeze(mask, axis)
    like = Shape(base)
    spread = Expand(wide, like)
    all = NonZero(spread)
    elements = Transpose<perm=[1, 0]>(all)
    flat = Reshape(made, minus)
    y = ScatterND(base, elements, flat)
"""
CONSTANTS = {"axis": np.array([1]), "minus": np.array([-1])}


def masked(body, outputs="float[s,4] y", inputs="float[s,4] x, float[s,4] base, bool[s] mask", **weights):
    return parse(f"({inputs}) => ({outputs}) {{ {body} }}", **CONSTANTS, **weights)


MASKS = (np.array([True, False, True]), np.zeros(3, bool), np.ones(3, bool))


@pytest.mark.parametrize(
    "function",
    [
        "h = MatMul(rows, w) g = Gelu(h) made = Add(g, b)",
        "h = Mul(rows, rows) made = LayerNormalization<axis=-1>(h, b)",
        "made = Neg(rows)",
    ],
)
def test_a_function_of_the_selected_rows_becomes_a_where_of_all(function):
    body = GATHERED.format(mask="mask") + function + SPREAD
    for mask in MASKS:
        model = masked(body, w=floats(4, 4), b=floats(4))
        feeds = {"x": floats(3, 4), "base": floats(3, 4), "mask": mask}
        before = run(model, **feeds)[0]
        masked_assignments(model)
        assert not {"NonZero", "GatherND", "ScatterND", "Expand"} & set(ops(model))
        assert ops(model).count("Where") == 1
        np.testing.assert_allclose(run(model, **feeds)[0], before, rtol=1e-6, atol=1e-6)


def test_a_number_for_the_selected_elements_becomes_a_where():
    model = parse(
        """(int64[b,s] ids, bool[b,s] mask) => (int64[b,s] y) {
            found = NonZero(mask)
            places = Transpose<perm=[1, 0]>(found)
            flat = Reshape(mask, minus)
            ones = Cast<to=7>(flat)
            count = ReduceSum(ones)
            numbers = Expand(zero, count)
            y = ScatterND(ids, places, numbers)
        }""",
        minus=np.array([-1]),
        zero=np.array(0),
    )
    feeds = {"ids": np.arange(6).reshape(2, 3) + 5, "mask": np.array([[True, False, True], [False, False, True]])}
    before = run(model, **feeds)[0]
    masked_assignments(model)
    assert ops(model) == ["Where"]
    np.testing.assert_array_equal(run(model, **feeds)[0], before)


@pytest.mark.parametrize(
    "body",
    [
        GATHERED.format(mask="mask") + "made = Softmax<axis=0>(rows)" + SPREAD,  # mixes the selected rows
        GATHERED.format(mask="mask") + "made = LayerNormalization<axis=0>(rows, b)" + SPREAD,
        GATHERED.format(mask="mask") + "m = Transpose(rows) n = MatMul(w, m) made = Transpose(n)" + SPREAD,
        "other = Not(mask)" + GATHERED.format(mask="other") + "made = Neg(rows)" + SPREAD,  # other rows
        "first = Slice(x, zero, one) made = Neg(first)" + SPREAD,  # not selected by the mask at all
    ],
)
def test_what_mixes_selected_rows_or_takes_other_ones_stays(body):
    constants = {"zero": np.array([0]), "one": np.array([1])}
    model = masked(body, w=floats(4, 4), b=floats(4), **constants)
    before = ops(model)
    masked_assignments(model)
    assert ops(model) == before
