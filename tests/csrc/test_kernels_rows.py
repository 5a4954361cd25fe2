"""Elementwise and row kernels: float64 numpy within a stated error, and the same bits from every table."""

from __future__ import annotations

import math

import numpy as np
import pytest
from support.kernel_reference import POISON, U, assert_same_bits, assert_within

native = pytest.importorskip("edgeformer._native")
testing = native.testing
ISAS = native.isas()
SIZES = [1, 2, 3, 15, 16, 17, 31, 32, 33, 47, 64, 577]
erf, erfc = np.vectorize(math.erf), np.vectorize(math.erfc)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return np.exp(-np.logaddexp(0, -x))


def gelu_tanh(x: np.ndarray) -> np.ndarray:
    # 0.5 (1 + tanh u) as a sigmoid: 1 + tanh cancels for negative x, in float64 too
    return x * sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))


# name -> (exact, relative error in units of U, absolute error in units of U)
UNARY = {
    "identity": (lambda x: x, 0, 0),
    "exp": (np.exp, 4, 0),
    "sigmoid": (sigmoid, 5, 0),
    "tanh": (np.tanh, 6, 0),
    "erf": (erf, 6, 0),
    "sqrt": (np.sqrt, 1, 0),
    "sin": (np.sin, 1.01, 0),
    "cos": (np.cos, 1.01, 0),
    "log": (np.log, 1.01, 0),
    "softplus": (lambda x: np.logaddexp(0, x), 6, 0),
    "relu": (lambda x: np.maximum(x, 0), 0, 0),
    "relu2": (lambda x: np.maximum(x, 0) ** 2, 1, 0),
    "silu": (lambda x: x * sigmoid(x), 6, 0),
    # derived at gelu1; 1 + erf would cancel for negative x
    "gelu": (lambda x: 0.5 * x * erfc(-x / math.sqrt(2)), 1.01, 2.3),
    # e^-u carries u's own rounding, u <= 2 |x| (0.8 + 0.036 x^2) <= 90 on the range below: 3 roundings of it
    "gelu_tanh": (gelu_tanh, 300, 0),
    "quick_gelu": (lambda x: x * sigmoid(1.702 * x), 60, 0),
    "neg": (np.negative, 0, 0),
    "abs": (np.abs, 0, 0),
    "reciprocal": (np.reciprocal, 1, 0),
    "rsqrt": (lambda x: 1 / np.sqrt(x), 2.01, 0),
}
POSITIVE = {"sqrt", "log", "rsqrt", "reciprocal"}


def arguments(op: str) -> np.ndarray:
    rng = np.random.default_rng(5)
    x = np.concatenate([rng.standard_normal(3000) * s for s in (0.01, 0.3, 1, 3)])
    x = np.clip(np.concatenate([x, np.linspace(-10, 10, 4001)]), -10, 10)
    if op == "exp":
        x = np.concatenate([x, np.linspace(-86.9, 88.7, 5001)])
    if op in ("sin", "cos"):
        # positions times frequencies, and multiples of pi/2 as near as floats come; then the whole range of float
        near = np.arange(-70000, 70000, 7) * (np.pi / 2)
        x = np.concatenate([x, near, rng.uniform(-2e6, 2e6, 5000), np.exp(rng.uniform(14, 88.7, 5000))])
        x = np.append(x, [16367173.0 * 2.0**72, 3.4028234e38, -3.4028234e38, 2.0**20, 2.0**20 - 0.0625])
    if op in POSITIVE:
        x = np.exp(np.concatenate([rng.uniform(-80, 80, 5000), rng.standard_normal(5000) * 0.01]))
    return x.astype(np.float32)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("op", UNARY)
def test_unary_is_within_its_error(isa: str, op: str) -> None:
    exact, relative, absolute = UNARY[op]
    x = arguments(op)
    y = np.empty_like(x)
    testing.Table(isa).unary(op, x, y)
    value = exact(x.astype(np.float64))
    # sigmoid and silu: e^-|x| carries the roundings of |x| log2(e), see sigmoid1
    scale = relative + (1.3 * np.abs(x) if op in ("sigmoid", "silu") else 0)
    assert_within(y, value, (scale * np.abs(value) + absolute) * U + 2.0**-126, op)


def test_a_wrong_function_is_outside_its_error() -> None:
    x, y = arguments("gelu"), np.empty_like(arguments("gelu"))
    testing.Table("scalar").unary("gelu_tanh", x, y)
    with pytest.raises(AssertionError, match="outside"):
        assert_within(y, UNARY["gelu"][0](x.astype(np.float64)), 100 * U)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("op", UNARY)
def test_unary_has_the_same_bits_and_keeps_to_its_length(isa: str, op: str) -> None:
    special = [0.0, -0.0, 1e-40, -1e-40, 1e-30, 88.0, 88.72, 88.73, 89.5, 1e10, -87.0, -87.01, -88, -1e10, 0.625, 1.0]
    x = np.concatenate([arguments(op), np.array([*special, np.inf, -np.inf], np.float32)])
    with np.errstate(all="ignore"):
        found, expected = np.empty_like(x), np.empty_like(x)
        testing.Table(isa).unary(op, x, found)
        testing.Table("scalar").unary(op, x, expected)
    assert (np.isnan(found) == np.isnan(expected)).all()
    assert_same_bits(np.nan_to_num(found, nan=7.0), np.nan_to_num(expected, nan=7.0), op)
    for n in SIZES:
        y = np.full(n + 5, POISON)
        testing.Table(isa).unary(op, x[:n].copy(), y)
        assert_same_bits(y[:n], found[:n])
        assert (y[n:] == POISON).all()


@pytest.mark.parametrize("isa", ISAS)
def test_nan_stays_nan(isa: str) -> None:
    # the usual one, and payloads whose low bits an exponent's arithmetic could turn into a number
    payloads = np.append([0], np.arange(1, 512, 28)).astype(np.uint32)
    x = (np.uint32(0x7FC00000) + payloads).view(np.float32)
    for op in UNARY:
        y = np.zeros_like(x)
        testing.Table(isa).unary(op, x, y)
        assert np.isnan(y).all(), op
    x = x[:19].copy()
    y = np.zeros((1, 19), np.float32)
    testing.Table(isa).softmax(x[None], 19, y)
    assert np.isnan(y).all()


def rows(m: int, n: int, spare: int, seed: int = 0) -> np.ndarray:
    x = np.full((m, n + spare), POISON)
    x[:, :n] = np.random.default_rng([seed, m, n]).standard_normal((m, n)) * 3 + 0.5
    return x


def on_all(call) -> np.ndarray:
    """y of the scalar table; checks that call(table) gives the same bits for every table."""
    expected = call(testing.Table("scalar"))
    for isa in ISAS:
        assert_same_bits(call(testing.Table(isa)), expected, isa)
    return expected


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("op", ["identity", "silu", "gelu", "softplus"])
def test_epilogue(n: int, op: str) -> None:
    start, residual = rows(3, n, 4), rows(3, n, 2, seed=1)
    bias = rows(1, n, 0, seed=2)[0]
    exact, relative, absolute = UNARY[op]
    for with_bias in (False, True):
        for scale in (1.0, 0.22):
            for with_residual in (False, True):

                def call(table, b=bias if with_bias else None, s=scale, r=residual if with_residual else None):
                    y = start.copy()
                    table.epilogue(y, n, b, op, s, r)
                    assert (y[:, n:] == POISON).all()
                    return y[:, :n].copy()

                y = on_all(call)
                # x is the kernel's own float32 sum: its rounding is not an error of the function
                x = (start[:, :n] + bias if with_bias else start[:, :n]).astype(np.float64)
                value = exact(x)
                bound = ((relative * (1 + np.abs(x)) * np.abs(value) + absolute) * U + np.abs(value) * 2 * U) * scale
                value = value * np.float32(scale)
                if with_residual:
                    value = value + residual[:, :n]
                    bound = bound + U * np.abs(value)
                assert_within(y, value, bound * 1.001 + 1e-37, op)


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("in_place", [False, True])
def test_gated(n: int, in_place: bool) -> None:
    wide = -(-n // 16) * 32
    start, bias = rows(3, wide, 3), rows(1, wide, 0, seed=4)[0]
    at = np.arange(n) // 16 * 32 + np.arange(n) % 16
    for b in (None, bias):

        def call(table, b=b):
            y = start.copy()
            out = y if in_place else np.full((3, n + 2), POISON)
            table.gated(y, n, b, "silu", out)
            assert in_place or (out[:, n:] == POISON).all()
            return out[:, :n].copy()

        y = on_all(call)
        x = start[:, :wide] + (0 if b is None else b)
        gate, up = x[:, at].astype(np.float64), x[:, at + 16].astype(np.float64)
        value = gate * sigmoid(gate) * up
        assert_within(y, value, (7.1 + 1.3 * np.abs(gate)) * U * np.abs(value) + 1e-37)


@pytest.mark.parametrize("n", SIZES)
def test_rms_norm(n: int) -> None:
    x, weight = rows(4, n, 3), rows(1, n, 0, seed=1)[0]
    x[1, :n] = 0
    for w in (None, weight):

        def call(table, w=w):
            y = np.full((4, n + 2), POISON)
            table.rms_norm(x, n, w, 1e-5, y)
            assert (y[:, n:] == POISON).all()
            return y[:, :n].copy()

        y = on_all(call)
        z = x[:, :n].astype(np.float64)
        value = z / np.sqrt((z * z).mean(1, keepdims=True) + np.float32(1e-5)) * (1 if w is None else w)
        # the mean has n / 16 + 4 roundings of positive terms, halved by the root; then / + sqrt / * *
        assert_within(y, value, ((n / 16 + 8) / 2 + 5) * U * np.abs(value) + 1e-37)


@pytest.mark.parametrize("n", SIZES)
def test_layer_norm(n: int) -> None:
    x, weight, bias = rows(4, n, 3), rows(1, n, 0, seed=1)[0], rows(1, n, 0, seed=2)[0]
    for w, b in ((None, None), (weight, None), (weight, bias), (None, bias)):

        def call(table, w=w, b=b):
            y = np.full((4, n + 2), POISON)
            table.layer_norm(x, n, w, b, 1e-3, y)
            assert (y[:, n:] == POISON).all()
            return y[:, :n].copy()

        y = on_all(call)
        z = x[:, :n].astype(np.float64)
        centred = z - z.mean(1, keepdims=True)
        r = 1 / np.sqrt((centred**2).mean(1, keepdims=True) + np.float32(1e-3))
        value = centred * r * (1 if w is None else w) + (0 if b is None else b)
        # the mean's own error, (n / 16 + 6) U mean|x|, shifts every element; the rest is as in rms_norm
        shift = (n / 16 + 6) * U * np.abs(z).mean(1, keepdims=True)
        scale = np.abs(r * (1 if w is None else w))
        size = np.abs(centred) * scale + np.abs(0 if b is None else b)
        assert_within(y, value, (shift * scale) * (2 + np.abs(centred * r)) + ((n / 16 + 8) / 2 + 6) * U * size + 1e-37)


@pytest.mark.parametrize("n", SIZES)
def test_softmax(n: int) -> None:
    x = rows(5, n, 3)
    x[1, :n] = -np.inf
    x[2, : n // 2] = -np.inf
    x[3, :n] *= 50
    x[4, :n] = 1e4

    def call(table):
        y = np.full((5, n + 2), POISON)
        table.softmax(x, n, y)
        assert (y[:, n:] == POISON).all()
        return y[:, :n].copy()

    y = on_all(call)
    z = x[[0, 2, 3, 4], :n].astype(np.float64)
    e = np.exp(z - z.max(1, keepdims=True))
    value = e / e.sum(1, keepdims=True)
    # the difference is rounded at its own size, exp adds 4, the sum n / 16 + 4, the quotient 1
    span = z.max(1, keepdims=True) - np.where(np.isfinite(z), z, z.max(1, keepdims=True))
    assert_within(y[[0, 2, 3, 4]], value, (2 * span + n / 16 + 12) * U * value + 2e-38)
    assert (y[1] == 0).all()


@pytest.mark.parametrize("n", [0, *SIZES, 255, 256, 257, 5000])
def test_exponential_sums(n: int) -> None:
    x = rows(1, n, 3)[0, :n].copy()
    x[n // 3 : n // 2] = -np.inf
    top = np.float32(x.max(initial=1.0))
    sums = on_all(lambda table: table.exponential_sums(x, top)[0])
    products = on_all(lambda table: np.array([table.exponential_sums(x, top)[1]]))
    d = np.maximum(x.astype(np.float64) - float(top), -1e4)
    e = np.exp(d)
    starts = np.arange(0, n, 256)
    assert sums.dtype == np.float64 and len(sums) == len(starts)
    # the difference is rounded at its own size, exp adds 4, the sum 15 additions in a lane and 4 of lanes
    size = e * (np.abs(d) + 4 + 19) * U
    assert_within(sums, np.add.reduceat(e, starts) if n else e, np.add.reduceat(size, starts) if n else e)
    # a product has its own rounding, and d's once more
    assert abs(products[0] - (e * d).sum()) <= (np.abs(d) * (size + 2 * U * e)).sum()


def test_a_nan_makes_the_exponential_sums_of_its_block_nan() -> None:
    x = np.zeros(600, np.float32)
    x[300] = np.nan
    for isa in ISAS:
        sums, products = testing.Table(isa).exponential_sums(x, 0.0)
        assert np.isnan(sums).tolist() == [False, True, False] and math.isnan(products), isa


@pytest.mark.parametrize("n", [0, *SIZES, 63, 65, 5000])
@pytest.mark.parametrize("bound", [-np.inf, 0.0, 2.0, 100.0, np.inf, np.nan])
def test_places_reaching(n: int, bound: float) -> None:
    x = np.round(rows(1, n, 3)[0, :n])  # many are equal to a bound
    x[::5], x[1::7] = -np.inf, np.nan
    assert np.array_equal(on_all(lambda table: table.places_reaching(x, bound)), np.flatnonzero(x >= bound))


@pytest.mark.parametrize("n", [*SIZES, 63, 65, 129, 5000])
@pytest.mark.parametrize("special", [[], [np.inf], [-np.inf], [np.inf, -np.inf], [np.nan], [np.nan, np.inf], [-np.nan]])
def test_place_of_largest(n: int, special: list[float]) -> None:
    """numpy's: the first of equal numbers, and the first NaN. The largest stands at each place in turn."""
    rng = np.random.default_rng(n)
    for place in range(0, n, max(1, n // 37)):
        x = np.round(rows(1, n, 3)[0, :n])  # many are equal
        x[place] = x.max() + rng.integers(0, 2)  # equal to another, or larger
        for value in special:
            x[rng.integers(0, n, 1 + n // 100)] = value
        assert on_all(lambda table: np.array([table.place_of_largest(x)]))[0] == x.argmax()  # noqa: B023


def test_place_of_largest_of_infinities_alone() -> None:
    x = np.full(100, -np.inf, np.float32)
    assert on_all(lambda table: np.array([table.place_of_largest(x)]))[0] == 0


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("head_dim", "rotary"), [(2, 2), (8, 4), (32, 32), (64, 64), (80, 32), (96, 38), (5, 4)])
def test_rope(interleaved: bool, head_dim: int, rotary: int) -> None:
    heads, m = 3, 4
    x = rows(m, heads * head_dim, 2)
    angle = np.random.default_rng(0).uniform(-3, 3, (m, rotary // 2))
    cos, sin = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)

    def call(table, in_place=False):
        y = x.copy() if in_place else np.full((m, heads * head_dim + 3), POISON)
        rope = testing.Rope(heads=heads, head_dim=head_dim, rotary=rotary, interleaved=interleaved)
        table.rope(y if in_place else x, rope, cos, sin, y)
        assert (y[:, heads * head_dim :] == POISON).all()
        return y[:, : heads * head_dim].copy()

    y = on_all(call)
    assert_same_bits(on_all(lambda table: call(table, True)), y)
    z = x[:, : heads * head_dim].reshape(m, heads, head_dim).astype(np.float64)
    a = np.arange(0, rotary, 2) if interleaved else np.arange(rotary // 2)
    b = a + (1 if interleaved else rotary // 2)
    value, size = z.copy(), np.zeros_like(z)
    c, s = cos[:, None].astype(np.float64), sin[:, None].astype(np.float64)
    value[..., a], value[..., b] = z[..., a] * c - z[..., b] * s, z[..., b] * c + z[..., a] * s
    size[..., a], size[..., b] = (
        np.abs(z[..., a] * c) + np.abs(z[..., b] * s),
        np.abs(z[..., b] * c) + np.abs(z[..., a] * s),
    )
    assert_within(y.reshape(value.shape), value, 2 * U * size)
