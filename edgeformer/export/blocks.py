"""Block quantization: a weight [N, K] as integers with one scale (and minimum) for each block along K."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray

from edgeformer.bundle.signature import F32
from edgeformer.errors import ExportError

_PIECE = 1 << 18  # elements: the dozen temporary arrays of a search stay in the CPU's cache
MAX_Q8 = 127  # never -128: kernels negate weights, and -(-128) does not fit


@dataclass(frozen=True)
class Blocks:
    """A quantized weight: `w[n, k] = scale[n, k // block_size] * q[n, k] (+ minimum[n, k // block_size])`.

    `q` is int8 [N, K]: in [-8, 7] for q4, [0, 15] for q4a, [-127, 127] for q8 (or [0, 31] with a minimum, as five-bit
    GGUF types have it). `scale` and `minimum` are float32 [N, ceil(K / block_size)].
    """

    scheme: str
    block_size: int
    q: NDArray[np.int8]
    scale: F32
    minimum: F32 | None = None

    @property
    def bits_per_weight(self) -> float:
        """Bits of one weight as an engine packs it: scales and minima as float16."""
        width = 8 if self.scheme == "q8" else 4
        return width + (16 if self.minimum is None else 32) / self.block_size

    def dequantize(self) -> F32:
        """float32 [N, K], each operation rounded once, as the file format defines it."""
        k = self.q.shape[1]
        values = np.empty(self.q.shape, np.float32)
        for rows in _pieces(values):
            np.multiply(_spread(self.scale[rows], self.block_size, k), self.q[rows], out=values[rows])
            if self.minimum is not None:
                values[rows] += _spread(self.minimum[rows], self.block_size, k)
        return values

    def rows(self, index: NDArray[np.intp]) -> Blocks:
        """The same blocks with the rows `index`, in that order."""
        minimum = None if self.minimum is None else self.minimum[index]
        return Blocks(self.scheme, self.block_size, self.q[index], self.scale[index], minimum)

    def stored(self) -> tuple[ir.TensorProtocol, F32, F32 | None]:
        """(q, scale, minimum) as the file stores them: with a minimum, q is centred (q4a: q - 8, minimum + 8 * scale).

        Centred integers have a mean of about 0, so that rounding the activations costs least.
        """
        centre = 0 if self.minimum is None else 16 if self.scheme == "q8" else 8
        minimum = None if self.minimum is None else self.minimum + np.float32(centre) * self.scale
        wide = self.scheme == "q8"

        def centred() -> ir.TensorProtocol:  # lazily: a second copy would live until the end of the export
            q = self.q - np.int8(centre)
            return ir.Tensor(q) if wide else ir.Tensor(q.astype(ml_dtypes.int4), dtype=ir.DataType.INT4)

        dtype = ir.DataType.INT8 if wide else ir.DataType.INT4
        return ir.LazyTensor(centred, dtype, ir.Shape(self.q.shape)), self.scale, minimum


def _spread(per_block: F32, block_size: int, k: int) -> F32:
    return np.repeat(per_block, block_size, axis=1)[:, :k]


def _pieces(matrix: NDArray[Any]) -> list[slice]:
    """Slices of the matrix's rows, of about 2**18 elements each."""
    step = max(1, _PIECE // max(1, matrix.shape[1]))
    return [slice(start, start + step) for start in range(0, max(1, len(matrix)), step)]


def require_quantizable(weight: F32, scheme: str) -> None:
    """Refuses a weight or a scheme that cannot be quantized.

    Raises:
        ExportError: a weight is NaN or infinite, or the scheme is unknown.
    """
    if not all(np.isfinite(weight[rows]).all() for rows in _pieces(weight)):
        raise ExportError(
            "a weight contains NaN or infinity, which no block format can represent; check the checkpoint."
        )
    if scheme not in _GRIDS:
        raise ExportError(f"unknown quantization {scheme!r}; choose one of {', '.join(_GRIDS)}.")


def quantize(weight: F32, scheme: str, block_size: int) -> Blocks:
    """`weight` float32 [N, K] in blocks of `block_size` along K, each with the scale of the smallest squared error.

    Raises:
        ExportError: a weight is NaN or infinite, or the scheme is unknown.
    """
    require_quantizable(weight, scheme)
    parts = [_quantize_rows(np.ascontiguousarray(weight[rows]), scheme, block_size) for rows in _pieces(weight)]
    q, scale, minimum = (None if part[0] is None else np.concatenate(part) for part in zip(*parts, strict=True))
    assert q is not None and scale is not None
    return Blocks(scheme, block_size, q, scale, minimum)


def _quantize_rows(rows: F32, scheme: str, block_size: int) -> tuple[NDArray[np.int8], F32, F32 | None]:
    """(q, scale, minimum) of `Blocks` for these rows."""
    n, k = rows.shape
    padded = -(-k // block_size) * block_size
    blocks = torch.nn.functional.pad(torch.from_numpy(rows), (0, padded - k)).reshape(n, -1, block_size)
    inside = torch.nn.functional.pad(torch.ones(k), (0, padded - k)).reshape(1, -1, block_size)
    q, scale, minimum = _best(blocks, inside, scheme)
    return (
        q.reshape(n, padded)[:, :k].to(torch.int8).numpy(),
        scale.squeeze(-1).contiguous().numpy(),
        None if minimum is None else minimum.squeeze(-1).contiguous().numpy(),
    )


Grid = tuple[torch.Tensor, torch.Tensor | None]  # a block's (scale, minimum), [..., 1] each
INTEGER_RANGE = {"q8": (-MAX_Q8, MAX_Q8), "q4": (-8, 7), "q4a": (0, 15)}  # the integers of a scheme, both ends included


def grids(w: torch.Tensor, importance: torch.Tensor, scheme: str, ranges: Sequence[float]) -> Iterator[Grid]:
    """One grid for each of `ranges` and each block of `w` [..., block].

    A range gives integers: that many steps from 0 to the weight of the largest magnitude (q4), or from the smallest to
    the largest weight (q4a). The grid is the least-squares fit to these integers, in float16 as engines pack it. q8 has
    one grid and uses no range. `importance`, broadcast over `w`, weights the squared errors; it is 0 for padding.
    """
    yield from _GRIDS[scheme](w, importance, ranges)


def nearest(w: torch.Tensor, grid: Grid, scheme: str) -> torch.Tensor:
    """The integers, as floats, whose grid values are nearest to `w`."""
    scale, minimum = grid
    return _divide(w if minimum is None else w - minimum, scale).round().clamp(*INTEGER_RANGE[scheme])


def _half(x: torch.Tensor) -> torch.Tensor:
    """The nearest finite float16 value as float32: what engines pack."""
    return x.clamp(-65504, 65504).to(torch.float16).to(torch.float32)


def _divide(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return torch.where(scale == 0, torch.zeros_like(x), x / torch.where(scale == 0, 1, scale))


def _q8(w: torch.Tensor, importance: torch.Tensor, ranges: Sequence[float]) -> Iterator[Grid]:  # noqa: ARG001
    yield _half(w.abs().amax(-1, keepdim=True) / MAX_Q8), None


def _q4(w: torch.Tensor, importance: torch.Tensor, ranges: Sequence[float]) -> Iterator[Grid]:
    extreme = w.gather(-1, w.abs().argmax(-1, keepdim=True))
    for steps in ranges:
        q = nearest(w, (extreme / steps, None), "q4")
        part = q * importance
        yield _half(_divide((w * part).sum(-1, keepdim=True), (q * part).sum(-1, keepdim=True))), None


def _q4a(w: torch.Tensor, importance: torch.Tensor, ranges: Sequence[float]) -> Iterator[Grid]:
    low, high = w.amin(-1, keepdim=True), w.amax(-1, keepdim=True)
    total = importance.sum(-1, keepdim=True)
    sum_w = (w * importance).sum(-1, keepdim=True)
    for steps in ranges:
        q = nearest(w, ((high - low) / steps, low), "q4a")
        part = q * importance
        sum_q = part.sum(-1, keepdim=True)
        spread = total * (q * part).sum(-1, keepdim=True) - sum_q * sum_q
        scale = _half(_divide(total * (w * part).sum(-1, keepdim=True) - sum_q * sum_w, spread))
        yield scale, _half((sum_w - scale * sum_q) / total)


_GRIDS = {"q8": _q8, "q4": _q4, "q4a": _q4a}
SEARCH_RANGES = {  # around the whole range; a negative one of q4 maps the largest weight to -8, a positive one to 7
    "q8": (MAX_Q8,),
    "q4": (-8.8, -8.4, -8.0, -7.6, -7.2, -6.8, 7.0, 7.4, 7.8),
    "q4a": (13.0, 13.6, 14.2, 14.6, 15.0, 15.4, 15.8, 16.4),
}


def _best(w: torch.Tensor, inside: torch.Tensor, scheme: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """(q, scale, minimum): for each block, those of the grid with the smallest squared error."""
    least = torch.full_like(w[..., :1], torch.inf)
    q, scale, minimum = torch.zeros_like(w), torch.zeros_like(least), torch.zeros_like(least)
    affine = False
    for grid in grids(w, inside, scheme, SEARCH_RANGES[scheme]):
        rounded = nearest(w, grid, scheme) * inside
        off = grid[0] * rounded - w if grid[1] is None else grid[0] * rounded + grid[1] - w
        error = (off * off * inside).sum(-1, keepdim=True)
        better = error < least
        least = torch.where(better, error, least)
        q, scale = torch.where(better, rounded, q), torch.where(better, grid[0], scale)
        if grid[1] is not None:
            affine, minimum = True, torch.where(better, grid[1], minimum)
    return q, scale, minimum if affine else None
