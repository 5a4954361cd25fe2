"""Activation quantization, packing and linears. References: float64 numpy for all tables, the scalar table for SIMD."""

from __future__ import annotations

import numpy as np
import pytest
from support.kernel_reference import POISON, XBLOCK, U, Weights, assert_same_bits, assert_within, linear, quantized

native = pytest.importorskip("edgeformer._native")
testing = native.testing
ISAS = native.isas()
BLOCKS = {"q4a": 32, "q4": 32, "q4x64": 64, "q8": 32, "q8x16": 16, "q8x128": 128, "f32": 32}
KINDS = ["q4a", "q4", "q4x64", "q8", "q8x16", "q8x128"]
SPANS = {"q4x64": 64, "q8x128": 128}  # columns that share an activation scale, where they are not 32
# Around every edge: one row, panels of 16 rows, tiles of 32; blocks of 32 columns, halves of 16, 24 blocks in a tile.
SIZES = [(1, 1), (2, 16), (3, 17), (15, 31), (16, 32), (17, 33), (31, 63), (32, 64), (33, 95), (49, 800), (70, 1570)]
ROWS = [1, 2, 3, 4, 5, 7, 8, 9, 13, 16, 17, 25, 35, 48]  # from 25 on every table takes tiles
# Multiples of the span; a tile is 6 blocks of 128 columns or 12 of 64.
WIDE_SIZES = {
    64: [(1, 64), (2, 128), (17, 64), (31, 192), (33, 768), (49, 832), (70, 1600)],
    128: [(1, 128), (2, 256), (17, 128), (31, 384), (33, 768), (49, 896), (70, 1664)],
}


def activations(m: int, k: int, seed: int = 1) -> np.ndarray:
    rng = np.random.default_rng([seed, m, k])
    x = rng.standard_normal((m, k)).astype(np.float32)
    x *= np.exp(rng.uniform(-6, 6, (m, 1))).astype(np.float32)
    if k > 40:
        x[:, 32:64] = 0  # a block of zeros
    if k > 300:
        x[:, 128:256] = 0  # a wide one
    if m > 1:
        x[1] = np.where(rng.random(k) < 0.5, -1, 1)  # every value becomes +-127
    return x


def sizes(kind: str) -> list[tuple[int, int]]:
    return WIDE_SIZES[SPANS[kind]] if kind in SPANS else SIZES


def quantize(isa: str, kind: str, x: np.ndarray, k: int):
    """x quantized with the span of this weight type."""
    return testing.Table(isa).quantize(x, k, SPANS.get(kind, 32))


def run(
    isa: str, weights: Weights, x: np.ndarray, begin: int = 0, end: int | None = None, prefetch: int | None = None
) -> np.ndarray:
    """y of the panels [begin, end); checks that 3 poisoned columns behind them are untouched."""
    table, packed = testing.Table(isa), weights.packed(testing)
    if prefetch is not None:
        table.prefetch = (prefetch, prefetch)
    end = -(-weights.n // 16) if end is None else end
    y = np.full((x.shape[0], min(weights.n, end * 16) - begin * 16 + 3), POISON)
    if weights.kind == "f32":
        table.linear_f32(packed, x, y, begin, end)
    else:
        table.linear(packed, quantize(isa, weights.kind, x, weights.k), y, begin, end)
    assert (y[:, -3:] == POISON).all(), "wrote beyond its columns"
    return y[:, :-3]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("m", "k"), [(1, 1), (2, 15), (3, 16), (2, 17), (4, 31), (3, 32), (3, 33), (2, 64), (5, 577)])
def test_quantize_rounds_to_nearest_even_with_exact_sums(isa: str, m: int, k: int) -> None:
    x = activations(m, k)
    x[0, 0] = 127.0
    x[0, 1:32] = (np.arange(min(31, k - 1)) - 15) + 0.5  # absmax 127: ties, which go to even
    records, q = quantized(*(lambda v: (v.blocks, v.q))(testing.Table(isa).quantize(x, k)), m, k)
    groups = -(-k // 32)
    padded = np.zeros((m, groups * 32), np.float32)
    padded[:, :k] = x
    blocks = padded.reshape(m, groups, 32)
    absmax = np.abs(blocks).max(2)
    scale = absmax / np.float32(127)
    assert_same_bits(records["scale"], scale)
    with np.errstate(divide="ignore", invalid="ignore"):
        inverse = np.where(absmax > 0, np.float32(127) / absmax, np.float32(0))
    expected = np.rint(blocks * inverse[:, :, None]).astype(np.int8)
    assert_same_bits(q, expected.reshape(m, -1))
    sums = expected.astype(np.int32).sum(2, dtype=np.int32)
    assert_same_bits(records["offset"], -128 * sums)
    assert_same_bits(records["offset_part"], -128 * expected[:, :, :16].astype(np.int32).sum(2, dtype=np.int32))
    assert_same_bits(records["scaled_sum"], scale * sums.astype(np.float32))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    ("span", "m", "k"),
    [(64, 1, 64), (64, 3, 192), (64, 2, 576), (64, 7, 640), (128, 1, 128), (128, 3, 256), (128, 2, 384), (128, 7, 640)],
)
def test_wide_quantization_has_one_scale_for_its_span(isa: str, span: int, m: int, k: int) -> None:
    x = activations(m, k)
    x[0, 5] = np.float32(3.0e38)  # where the others round to zero
    result = testing.Table(isa).quantize(x, k, span)
    records, q = quantized(result.blocks, result.q, m, k)
    wides = x.reshape(m, -1, span)
    absmax = np.abs(wides).max(2)
    scale = absmax / np.float32(127)
    assert_same_bits(records["scale"], np.repeat(scale, span // 32, axis=1))
    with np.errstate(divide="ignore"):
        inverse = np.where(absmax > 0, np.float32(127) / absmax, np.float32(0))
    expected = np.rint(wides * inverse[:, :, None]).astype(np.int8)
    assert_same_bits(q, expected.reshape(m, -1))
    sums = expected.reshape(m, -1, 32).sum(2, dtype=np.int32)
    assert_same_bits(records["offset"], -128 * sums)
    parts = np.repeat(-128 * expected.sum(2, dtype=np.int32), span // 32, axis=1).astype(np.int32)
    assert_same_bits(records["offset_part"], parts)
    assert_same_bits(records["scaled_sum"], records["scale"] * sums.astype(np.float32))


def test_wide_quantization_refuses_other_widths() -> None:
    for span in (64, 128):
        with pytest.raises(ValueError, match="no multiple of the span"):
            testing.Table("scalar").quantize(np.ones((1, 160), np.float32), 160, span)
    with pytest.raises(ValueError, match="32, 64 or 128"):
        testing.Table("scalar").quantize(np.ones((1, 160), np.float32), 160, 160)


@pytest.mark.parametrize("isa", ISAS)
def test_quantize_of_tiny_values_gives_zero_and_of_nan_gives_nan(isa: str) -> None:
    table = testing.Table(isa)
    x = np.zeros((4, 64), np.float32)
    x[0, 3], x[1, 3], x[2, 40] = 1e-38, np.nan, -np.inf
    result = table.quantize(x, 64)
    records = result.blocks.view(XBLOCK).reshape(4, 2)
    assert records["scale"][0, 0] == 0
    assert np.isnan(records["scale"][1, 0])
    assert np.isinf(records["scale"][2, 1])
    weights = Weights("q8", 5, 64)
    y = run(isa, weights, x)
    assert not np.isfinite(np.delete(y[1:3], 2, axis=1)).any(), "NaN and infinity must not be lost"
    assert (y[[0, 3]] == 0).all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", KINDS)
def test_linear_is_within_its_rounding_bound(isa: str, kind: str) -> None:
    for n, k in sizes(kind):
        weights = Weights(kind, n, k, BLOCKS[kind])
        for m in (1, 3, 8, 17):
            x = activations(m, k)
            result = quantize(isa, kind, x, k)
            exact, bound = linear(weights, *quantized(result.blocks, result.q, m, k))
            assert_within(run(isa, weights, x), exact, bound, f"{kind} n={n} k={k} m={m}")


@pytest.mark.parametrize("kind", KINDS)
def test_one_wrong_weight_is_outside_the_bound(kind: str) -> None:
    k = SPANS.get(kind, 95)
    weights, x = Weights(kind, 33, k, BLOCKS[kind]), activations(3, k)
    result = quantize("scalar", kind, x, k)
    y = run("scalar", weights, x)
    at = k - 5
    weights.values[7, at] += 1
    weights.dense[7, at] += weights.scale[7, at // weights.block]
    exact, bound = linear(weights, *quantized(result.blocks, result.q, 3, k))
    with pytest.raises(AssertionError, match="outside"):
        assert_within(y, exact, bound)


@pytest.mark.parametrize("isa", [isa for isa in ISAS if isa != "scalar"])
@pytest.mark.parametrize("kind", [*KINDS, "f32"])
@pytest.mark.parametrize("extreme", [False, True])
def test_every_isa_gives_the_same_bits(isa: str, kind: str, extreme: bool) -> None:
    for n, k in sizes(kind):
        weights = Weights(kind, n, k, BLOCKS[kind], extreme=extreme)
        for m in ROWS if n * k < 3000 else (1, 6, 19, 31):
            x = activations(m, k)
            expected = run("scalar", weights, x)
            for prefetch in (0, 4096):  # both are in use, see csrc/engine/dispatch.cpp
                found = run(isa, weights, x, prefetch=prefetch)
                assert_same_bits(found, expected, f"{kind} n={n} k={k} m={m} prefetch={prefetch}")


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", [*KINDS, "f32"])
def test_a_row_depends_on_neither_its_neighbours_nor_the_panel_range(isa: str, kind: str) -> None:
    n, k = sizes(kind)[-1]
    weights, x = Weights(kind, n, k, BLOCKS[kind]), activations(19, k)
    whole = run(isa, weights, x)
    for i in (0, 7, 18):
        assert_same_bits(run(isa, weights, x[i : i + 1]), whole[i : i + 1], f"row {i} alone")
    for begin, end in ((0, 1), (1, 4), (2, 5), (4, 5)):
        assert_same_bits(run(isa, weights, x, begin, end), np.ascontiguousarray(whole[:, begin * 16 : end * 16]))


@pytest.mark.parametrize("isa", ISAS)
def test_f32_linear_is_within_its_rounding_bound(isa: str) -> None:
    for n, k in SIZES:
        weights = Weights("f32", n, k)
        for m in (1, 5, 9):
            x = activations(m, k)
            # k fused steps, one rounding each
            bound = k * U * (np.abs(x).astype(np.float64) @ np.abs(weights.dense).T) + 1e-300
            assert_within(run(isa, weights, x), x.astype(np.float64) @ weights.dense.T, bound * (1 + 1e-6), f"{n} {k}")


@pytest.mark.parametrize(
    ("kind", "block"), [("q4", 64), ("q4a", 128), ("q8", 64), ("q8", 128), ("q8x16", 16), ("q4x64", 128)]
)
def test_wide_blocks_are_packed_as_blocks_of_32(kind: str, block: int) -> None:
    weights = Weights(kind, 20, 290, block)
    packed = weights.packed(testing)
    for r in range(20):
        assert_within(packed.row(r), weights.dense[r], np.abs(weights.dense[r]) * U + 1e-300)


@pytest.mark.parametrize("kind", [*KINDS, "f32"])
def test_rows_of_several_sources_can_be_interleaved(kind: str) -> None:
    block, k = BLOCKS[kind], 256 if kind in SPANS else 70
    a, b = Weights(kind, 40, k, block, seed=1), Weights(kind, 24, k, block, seed=2)
    order = np.random.default_rng(3).permutation(64).astype(np.int64)
    packed = testing.Packed(kind, 64, k)
    a.pack_into(packed, order[:40])
    b.pack_into(packed, order[40:])
    for source, dest in ((a, order[:40]), (b, order[40:])):
        for r in range(source.n):
            assert_within(packed.row(dest[r]), source.dense[r], np.abs(source.dense[r]) * 2 * U + 1e-300)


def test_packing_refuses_scales_beyond_fp16_and_minus_128() -> None:
    weights = Weights("q4a", 3, 40)
    weights.scale[1, 1] = np.nan
    with pytest.raises(ValueError, match="scale is beyond fp16"):
        weights.packed(testing)
    weights = Weights("q4a", 3, 40)
    assert weights.min is not None
    weights.min[2, 0] = 65520.0  # the first that rounds to infinity
    with pytest.raises(ValueError, match="minimum is beyond fp16"):
        weights.packed(testing)
    weights = Weights("q8", 3, 40)
    weights.q[2, 39] = -128
    with pytest.raises(ValueError, match="-128"):
        weights.packed(testing)


def test_inexact_scales_are_rounded_to_the_nearest_fp16_and_reported() -> None:
    rng = np.random.default_rng(0)
    ties = (np.arange(1, 2049, dtype=np.float32) + np.float32(0.5)) * np.float32(2**-24)  # between two subnormals
    spread = np.exp(rng.uniform(np.log(1e-9), np.log(65519), 4094)).astype(np.float32)
    scale = np.concatenate([ties, spread, [np.float32(65519.99), np.float32(2**-26)]]).reshape(-1, 1).astype(np.float32)
    packed = testing.Packed("q8", scale.size, 32)
    assert packed.pack(np.ones((scale.size, 32), np.int8), scale)
    raw = np.frombuffer(packed.raw(), np.uint8).reshape(-1, 544)[:, :32].copy().view(np.float16).ravel()
    assert_same_bits(raw[: scale.size], scale[:, 0].astype(np.float16))  # numpy rounds to nearest even


def test_every_fp16_scale_survives_packing() -> None:
    half = np.arange(65536, dtype=np.uint16).view(np.float16)
    half = half[np.isfinite(half)]
    scale = half.astype(np.float32).reshape(-1, 1)
    packed = testing.Packed("q8", scale.size, 32)
    assert not packed.pack(np.ones((scale.size, 32), np.int8), scale)
    raw = np.frombuffer(packed.raw(), np.uint8).reshape(-1, 544)[:, :32].copy().view(np.float16).ravel()
    assert_same_bits(raw[: half.size], half)
    x = np.zeros((1, 32), np.float32)
    x[0, 0] = 127.0
    for isa in ISAS:
        table, y = testing.Table(isa), np.zeros((1, scale.size), np.float32)
        table.linear(packed, table.quantize(x, 32), y, 0, -(-scale.size // 16))
        assert_same_bits(y[0], scale[:, 0] * np.float32(127) + np.float32(0), isa)
