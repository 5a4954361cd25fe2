"""The kernels' formulas (csrc/kernels/kernels.h) in float64 numpy, with the rounding bounds that follow from them.

Nothing here shares code with the extension. `U` is the unit roundoff of float32: one operation's relative error.
"""

from __future__ import annotations

import numpy as np

U = 2.0**-24
XBLOCK = np.dtype([("scale", "<f4"), ("scaled_sum", "<f4"), ("offset", "<i4"), ("offset_part", "<i4")])
POISON = np.float32(1.2345e30)


def assert_same_bits(a: np.ndarray, b: np.ndarray, what: str = "") -> None:
    """Equal dtype, shape and bytes; float differences are shown with their place."""
    assert a.dtype == b.dtype
    assert a.shape == b.shape
    if a.tobytes() == b.tobytes():
        return
    raw = a.view(np.uint32) != b.view(np.uint32) if a.dtype == np.float32 else a != b
    at = tuple(np.argwhere(raw)[0])
    raise AssertionError(f"{what}: {raw.sum()} of {a.size} differ, first at {at}: {a[at]!r} and {b[at]!r}")


def assert_within(found: np.ndarray, exact: np.ndarray, bound: np.ndarray, what: str = "") -> None:
    """Every element of `found` is finite and at most `bound` from `exact` (both float64, same shape)."""
    assert found.shape == exact.shape
    error = np.abs(found.astype(np.float64) - exact)
    bad = ~(error <= bound)
    if bad.any():
        at = tuple(np.argwhere(bad)[0])
        raise AssertionError(
            f"{what}: {bad.sum()} of {bad.size} outside; at {at} found {found[at]}, exact {exact[at]}, "
            f"error {error[at]:.3e}, bound {np.broadcast_to(bound, bad.shape)[at]:.3e}"
        )


def fp16(x: np.ndarray) -> np.ndarray:
    """float32 values that fp16 holds exactly."""
    return x.astype(np.float16).astype(np.float32)


class Weights:
    """Random W[n, k] of one type: the arrays of a model file, and `dense` in float64."""

    def __init__(self, kind: str, n: int, k: int, block: int = 32, seed: int = 0, extreme: bool = False) -> None:
        rng = np.random.default_rng([seed, n, k, block])
        self.kind, self.n, self.k, self.block = kind, n, k, block
        groups = -(-k // block)
        self.scale = fp16(rng.uniform(0.001, 0.1, (n, groups)) * rng.choice([-1, 1], (n, groups)))
        self.min: np.ndarray | None = None
        if kind == "f32":
            self.q = rng.standard_normal((n, k)).astype(np.float32)
            self.dense = self.q.astype(np.float64)
            return
        if kind in ("q4", "q4a", "q4x64"):
            q = rng.integers(-8, 8, (n, k))
            if extreme:
                q = rng.choice([-8, 7], (n, k))
            flat = np.append(q.ravel(), 0)[: (n * k + 1) // 2 * 2].astype(np.uint8) & 15
            self.q = (flat[0::2] | flat[1::2] << 4).astype(np.uint8)
        else:
            q = rng.integers(-127, 128, (n, k))
            if extreme:
                q = rng.choice([-127, 127], (n, k))
            self.q = q.astype(np.int8)
        if n > 2:
            self.scale[n // 2] = 0  # a row of zeros
        self.values = q + 8 if kind == "q4a" else q  # [n, k] integers
        wide = np.repeat(self.scale.astype(np.float64), block, axis=1)[:, :k]
        self.dense = wide * self.values
        if kind == "q4a":
            self.min = fp16(rng.uniform(-0.5, 0.5, (n, groups)))
            self.dense = self.dense + np.repeat(self.min.astype(np.float64), block, axis=1)[:, :k]

    def packed(self, testing, dest: np.ndarray | None = None, total: int | None = None):
        """Packed by the extension."""
        packed = testing.Packed(self.kind, total or self.n, self.k)
        self.pack_into(packed, dest)
        return packed

    def pack_into(self, packed, dest: np.ndarray | None = None) -> None:
        if self.kind == "f32":
            packed.pack(self.q, dest=dest)
        else:
            packed.pack(self.q, self.scale, self.min, self.block, dest)


def quantized(blocks: np.ndarray, q: np.ndarray, m: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The extension's activations as (records [m, groups] of XBLOCK, integers [m, groups * 32])."""
    groups = -(-k // 32)
    return blocks.view(XBLOCK).reshape(m, groups), q.reshape(m, groups * 32)


def linear(weights: Weights, records: np.ndarray, xq: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(y, bound) in float64 of the block-quantized linear, from the quantized activations.

    Every block adds one or two fma (one rounding each, of a partial sum that is at most abs_sum) of a term whose scale
    product or scaled sum was rounded once: |error| <= (steps + 1) U abs_sum to first order; + 2 leaves the second.
    """
    m, groups = records.shape
    k = weights.k
    x = xq[:, :k].astype(np.float64) * np.repeat(records["scale"].astype(np.float64), 32, axis=1)[:, :k]
    y = x @ weights.dense.T
    steps = groups * (2 if weights.kind in ("q4a", "q8x16") else 1)
    block = 16 if weights.kind == "q8x16" else 32  # of wide blocks, parts of a block: the bound is the larger for it
    abs_sum = np.zeros((m, weights.n))
    wide = np.repeat(weights.scale.astype(np.float64), weights.block, axis=1)[:, :k]
    for g in range(0, k, block):
        part = slice(g, min(g + block, k))
        dot = x[:, part] @ (weights.values[:, part] * wide[:, part]).T
        abs_sum += np.abs(dot)
        if weights.min is not None:
            low = np.repeat(weights.min.astype(np.float64), weights.block, axis=1)[:, g]
            abs_sum += np.abs(x[:, part].sum(1)[:, None] * low[None, :])
    return y, (steps + 2) * U * abs_sum + 1e-300
