"""Block quantization: values, bounds with their derivation, and GGUF's own blocks against the gguf package."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("torch", reason="the toolchain needs torch")
gguf = pytest.importorskip("gguf", reason="the toolchain needs gguf")

from gguf import quants

from edgeformer.errors import ExportError
from edgeformer.export.blocks import Blocks, quantize
from edgeformer.export.sources.gguf.kept_blocks import _READERS, KeptRows, read_matrices

SCHEMES = ("q8", "q4", "q4a")


def weights(n=24, k=96, seed=0):
    return np.random.default_rng(seed).standard_normal((n, k)).astype(np.float32)


def half_step(blocks: Blocks) -> np.ndarray:
    """[N, K]: half of each block's step, the most that rounding to its nearest integer can be off."""
    return np.repeat(np.abs(blocks.scale) / 2, blocks.block_size, axis=1)[:, : blocks.q.shape[1]]


@pytest.mark.parametrize("block_size", [16, 32, 64, 128])
@pytest.mark.parametrize("k", [96, 100, 31])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_integers_stay_in_their_range_and_scales_are_float16(scheme, k, block_size):
    blocks = quantize(weights(k=k), scheme, block_size)
    low, high = {"q8": (-127, 127), "q4": (-8, 7), "q4a": (0, 15)}[scheme]
    assert blocks.q.dtype == np.int8 and blocks.q.shape == (24, k)
    assert blocks.q.min() >= low and blocks.q.max() <= high
    for part in filter(lambda part: part is not None, (blocks.scale, blocks.minimum)):
        assert part.shape == (24, -(-k // block_size))
        np.testing.assert_array_equal(part, part.astype(np.float16).astype(np.float32))


@pytest.mark.parametrize("block_size", [16, 32, 128])
def test_q8_is_within_half_a_step(block_size):
    w = weights()
    blocks = quantize(w, "q8", block_size)
    # The scale is rounded to 11 bits: the largest weight may lie 127.5 steps away and is clipped to 127.
    slack = 127 * 2.0**-11 * np.repeat(blocks.scale, block_size, axis=1)[:, : w.shape[1]]
    assert (np.abs(blocks.dequantize() - w) <= half_step(blocks) + slack + 1e-7).all()


@pytest.mark.parametrize("scheme", ["q4", "q4a"])
def test_four_bits_lose_no_more_than_plain_range_quantization(scheme):
    """The search starts from the plain range, so it may only be better; the plain one is computed here by numpy."""
    w = weights(64, 256)
    blocks = w.reshape(64, -1, 32)
    if scheme == "q4a":
        low, high = blocks.min(-1, keepdims=True), blocks.max(-1, keepdims=True)
        step = (high - low) / 15
        plain = np.round((blocks - low) / step) * step + low
    else:
        step = np.abs(blocks).max(-1, keepdims=True) / 7
        plain = np.round(blocks / step) * step
    found = quantize(w, scheme, 32).dequantize().reshape(blocks.shape)
    assert ((found - blocks) ** 2).mean() < ((plain - blocks) ** 2).mean()


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("value", [0.0, 1.0, -3.5])
def test_constant_and_zero_blocks_are_exact(scheme, value):
    w = np.full((3, 64), value, np.float32)
    blocks = quantize(w, scheme, 32)
    np.testing.assert_allclose(blocks.dequantize(), w, rtol=2**-11)  # one rounding of the scale to float16
    assert np.isfinite(blocks.scale).all()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_stored_form_gives_the_same_numbers(scheme):
    blocks = quantize(weights(), scheme, 32)
    q, scale, minimum = blocks.stored()
    values = np.repeat(scale, 32, axis=1) * q.numpy().astype(np.float32)
    if minimum is not None:
        values = values + np.repeat(minimum, 32, axis=1)
    # q4a: (q - 8) s + (m + 8 s) is two roundings more than q s + m, each at most 2**-24 of a term below 16 s + |m|.
    bound = 2**-22 * (16 * np.repeat(np.abs(scale), 32, axis=1) + np.abs(values))
    assert (np.abs(values - blocks.dequantize()) <= bound).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_refused(bad):
    w = weights()
    w[3, 5] = bad
    with pytest.raises(ExportError, match="NaN or infinity"):
        quantize(w, "q8", 32)


def test_an_unknown_scheme_is_refused():
    with pytest.raises(ExportError, match="q3"):
        quantize(weights(), "q3", 32)


# ---------------------------------------------------------------------------------------- GGUF


def raw_blocks(name: str, n: int, k: int) -> np.ndarray:
    """uint8 [N, bytes]: any bit pattern is a valid block but for its float16 fields, which are made finite."""
    generator = np.random.default_rng(7)
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]
    raw = generator.integers(0, 256, (n, k // block, size), dtype=np.uint8)
    halves = {"Q6_K": (208,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q4_1": (0, 2), "Q5_1": (0, 2)}.get(name, (0,))
    for offset in halves:
        values = generator.standard_normal(raw.shape[:2]).astype(np.float16)
        raw[..., offset : offset + 2] = values[..., None].view(np.uint8)
    if name == "Q8_0":  # llama.cpp never writes -128, and the format of a bundle has none
        raw[..., 2:][raw[..., 2:] == 128] = 129
    return raw.reshape(n, -1)


@pytest.mark.parametrize("name", sorted(_READERS))
def test_gguf_blocks_have_the_values_of_the_gguf_package(name):
    raw = raw_blocks(name, 6, 512)
    expected = quants.dequantize(raw, gguf.GGMLQuantizationType[name])
    np.testing.assert_array_equal(_READERS[name](raw, 512).dequantize(), expected)


def write_gguf(path, tensors):
    writer = gguf.GGUFWriter(path, "llama")
    for name, (kind, raw) in tensors.items():
        writer.add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_rows_are_found_by_content_in_any_order(tmp_path):
    write_gguf(tmp_path / "m.gguf", {n: ("Q4_1", raw_blocks("Q4_1", 8, 64)) for n in ("a", "b")})
    _, _, matrix = next(read_matrices(tmp_path / "m.gguf"))
    order = np.array([5, 0, 3, 7])
    found = KeptRows(tmp_path / "m.gguf").find(matrix.values[order])
    assert found is not None
    np.testing.assert_array_equal(found.q, matrix.blocks.q[order])
    np.testing.assert_array_equal(found.minimum, matrix.blocks.minimum[order])


def test_a_weight_that_is_not_in_the_file_is_not_kept(tmp_path):
    write_gguf(tmp_path / "m.gguf", {"a": ("Q8_0", raw_blocks("Q8_0", 8, 64))})
    _, _, matrix = next(read_matrices(tmp_path / "m.gguf"))
    values = matrix.values.copy()
    values[2, 9] = np.nextafter(values[2, 9], np.float32(9))
    assert KeptRows(tmp_path / "m.gguf").find(values) is None


def test_types_without_scales_are_not_kept_and_named(tmp_path):
    kind = gguf.GGMLQuantizationType.IQ4_NL
    size = gguf.GGML_QUANT_SIZES[kind][1]
    write_gguf(tmp_path / "m.gguf", {"odd": ("IQ4_NL", np.zeros((4, 2 * size), np.uint8))})
    rows = KeptRows(tmp_path / "m.gguf")
    assert rows.types == {}
    assert "1 IQ4_NL (odd)" in rows.notes()[0] and "--quantize" in rows.notes()[0]
