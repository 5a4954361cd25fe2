"""GPTQ: integers of a weight that minimize the error of the layer's output (Frantar et al., arXiv:2210.17323).

Columns are rounded in order; the error of each is compensated in the later columns, as far as the inputs correlate.
Unlike the paper, the scale of a block is not fixed beforehand: every candidate scale of the format's own search is
tried with error compensation inside the block, and the one with the smallest loss is taken. KL on SmolLM2 in q4, head
included: 0.38 rounded to nearest, 0.24 with the scale of least squared error for each block, 0.16 like this.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from edgeformer.bundle.signature import F32
from edgeformer.errors import ExportError
from edgeformer.export.blocks import INTEGER_RANGE, SEARCH_RANGES, Blocks, Grid, grids, require_quantizable

DAMPING = 0.01  # of the mean diagonal, added to the diagonal: the paper's
# Wider than for rounding to nearest: errors of earlier columns change a block's range. q4a gains nothing by it.
_RANGES = SEARCH_RANGES | {"q4": (-11.0, -9.8, -8.8, -8.0, -7.2, -6.4, -5.6, 5.6, 6.4, 7.2, 8.0, 9.0)}
_ROWS = 1024  # rows quantized together: one block of them, for all candidate scales, fits in the CPU's cache


def inverse_factor(hessian: torch.Tensor, damping: float = DAMPING) -> torch.Tensor:
    """float32 [K, K], upper triangular U with U^T U = (hessian + damping * mean of its diagonal)^-1.

    `hessian` [K, K] is X^T X of a layer's inputs X. An input that was always 0 counts as uncorrelated with the others.

    Raises:
        ExportError: an input was NaN or infinite.
    """
    h = hessian.double()
    if not torch.isfinite(h).all():
        raise ExportError("on the calibration text a layer's inputs are NaN or infinite; use --calibration none.")
    diagonal = h.diagonal()  # a view
    mean = float(diagonal.mean()) or 1.0
    diagonal[diagonal == 0] = mean
    diagonal += damping * mean
    # With rows and columns in reverse a lower Cholesky factor L is an upper one, V: h = V V^T, so h^-1 = V^-T V^-1.
    v = torch.linalg.cholesky(h.flip(0, 1)).flip(0, 1)
    factor: torch.Tensor = torch.linalg.solve_triangular(v, torch.eye(len(v), dtype=v.dtype), upper=True)
    return factor.float()


def fit_blocks(weight: F32, factor: torch.Tensor, scheme: str, block_size: int) -> Blocks:
    """`weight` float32 [N, K] in blocks along K, with integers and scales of the smallest loss on the layer's inputs.

    `factor` is `inverse_factor` of the inputs. Rows are independent of each other.

    Raises:
        ExportError: a weight is NaN or infinite, or the scheme is unknown.
    """
    require_quantizable(weight, scheme)
    n, k = weight.shape
    q = torch.empty(n, k, dtype=torch.int8)
    scale = torch.empty(n, -(-k // block_size))
    minimum = torch.empty_like(scale) if scheme == "q4a" else None
    for first in range(0, n, _ROWS):
        rows = slice(first, first + _ROWS)
        left = torch.from_numpy(weight[rows]).T.contiguous()  # [K, rows]: targets of the columns not yet rounded
        for index, start in enumerate(range(0, k, block_size)):
            stop = min(start + block_size, k)
            done = _block(left[start:stop], factor[start:stop, start:stop], scheme)
            left[stop:].addmm_(factor[start:stop, stop:].T, done.error, alpha=-1)
            q[rows, start:stop] = done.q.T.to(torch.int8)
            scale[rows, index] = done.scale
            if minimum is not None and done.minimum is not None:
                minimum[rows, index] = done.minimum
    return Blocks(scheme, block_size, q.numpy(), scale.numpy(), None if minimum is None else minimum.numpy())


@dataclass(frozen=True)
class _Block:
    q: torch.Tensor  # [block, rows]
    error: torch.Tensor  # [block, rows]: of each column, divided by its diagonal element of the factor
    scale: torch.Tensor  # [rows]
    minimum: torch.Tensor | None


def _block(w: torch.Tensor, factor: torch.Tensor, scheme: str) -> _Block:
    """The block of columns `w` [block, rows], rounded on every candidate grid; for each row the best."""
    size, n = w.shape
    importance = factor.diagonal() ** -2.0  # the weight of a column's squared error in GPTQ's loss
    candidates = list(grids(w.T, importance, scheme, _RANGES[scheme]))
    scales, minima = _joined(candidates)  # [candidates * rows]
    low, high = INTEGER_RANGE[scheme]
    inverse = torch.where(scales == 0, 0, 1 / scales)
    left = w.repeat(1, len(candidates))  # [block, candidates * rows]
    q, error = torch.empty_like(left), torch.empty_like(left)
    for j in range(size):
        x = left[j] if minima is None else left[j] - minima
        torch.mul(x, inverse, out=q[j]).round_().clamp_(low, high)
        torch.addcmul(x, q[j], scales, value=-1, out=error[j]).div_(factor[j, j])
        left[j + 1 :].addr_(factor[j, j + 1 :], error[j], alpha=-1)
    loss = torch.linalg.vector_norm(error, dim=0).reshape(len(candidates), n)
    chosen = loss.argmin(0) * n + torch.arange(n)  # [rows], into candidates * rows
    return _Block(q[:, chosen], error[:, chosen], scales[chosen], None if minima is None else minima[chosen])


def _joined(candidates: list[Grid]) -> Grid:
    minima = [minimum.squeeze(-1) for _, minimum in candidates if minimum is not None]
    return torch.cat([scale.squeeze(-1) for scale, _ in candidates]), torch.cat(minima) if minima else None
