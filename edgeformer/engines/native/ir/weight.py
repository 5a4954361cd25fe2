"""A weight matrix as the file stores it, before it is packed."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

WEIGHT_TYPES = ("q4a", "q4", "q4x64", "q8", "q8x16", "q8x128", "f32")  # csrc/kernels/kernels.h: enum class WeightType


@dataclass(frozen=True, slots=True)
class Weight:
    """A constant matrix W[n, k] as the file stores it; its bytes are not read until it is packed.

    type: one of WEIGHT_TYPES. q, scale, min: names of constants; q is stored [n, k], or [k, n] when
    `transposed`. selected: the rows of q that W consists of, in order; None for all.
    """

    type: str
    q: str
    n: int
    k: int
    block: int = 32
    scale: str = ""
    min: str = ""
    transposed: bool = False
    selected: tuple[tuple[int, int], ...] | None = None  # (start, stop) runs of rows

    def ranges(self) -> tuple[tuple[int, int], ...]:
        """The (start, stop) runs of stored rows that make up this weight."""
        return self.selected or ((0, self.n),)

    def part(self, runs: list[tuple[int, int]]) -> Weight:
        """The weight made of these (start, stop) runs of rows of this one."""
        index = np.concatenate([np.arange(a, b) for a, b in self.ranges()])
        rows = np.concatenate([index[a:b] for a, b in runs])
        breaks = [0, *(np.flatnonzero(np.diff(rows) != 1) + 1).tolist(), len(rows)]
        chosen = tuple((int(rows[a]), int(rows[b - 1]) + 1) for a, b in pairwise(breaks))
        return Weight(
            self.type, self.q, len(rows), self.k, self.block, self.scale, self.min, self.transposed, chosen
        )  # fmt: skip
