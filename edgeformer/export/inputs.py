"""The inputs of a traced module: names, types and axes, and random arrays of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Input:
    """One input of `forward`: named axes (`batch`, `sequence`, ...) are dynamic, numbers are fixed."""

    name: str
    dtype: torch.dtype
    shape: tuple[int | str, ...]
    high: int = 2  # integers are drawn from [0, high)
    unit: int = 1  # every named axis but the first is this many times as long as the size that a check asks for

    def sample(self, sizes: Mapping[str, int], seed: int) -> torch.Tensor:
        """A random array of this input: [*shape] with the sizes of its named axes from `sizes`.

        Arrays of two elements or more contain both ends of an integer's range, and both booleans. In a mask the first
        row has no padding; the others are padded on the right, for an odd `seed` on the left.
        """
        generator = torch.Generator().manual_seed(seed)
        shape = [
            dim if isinstance(dim, int) else sizes[dim] * (self.unit if axis else 1)
            for axis, dim in enumerate(self.shape)
        ]
        if self.name == "position_ids":
            return torch.arange(shape[-1]).expand(shape).contiguous()
        if self.name.endswith(("attention_mask", "pooling_mask")):
            lengths = torch.randint(1, shape[-1] + 1, (shape[0], 1), generator=generator)
            lengths[0] = shape[-1]
            places = torch.arange(shape[-1])
            seen = places >= shape[-1] - lengths if seed % 2 else places < lengths
            return seen.to(self.dtype)
        if self.dtype == torch.bool:
            chosen = torch.rand(shape, generator=generator) < 0.5
            chosen.view(-1)[:2] = torch.tensor([True, False])[: chosen.numel()]
            return chosen
        if self.dtype.is_floating_point:
            return torch.randn(shape, generator=generator, dtype=self.dtype)
        numbers = torch.randint(0, self.high, shape, generator=generator, dtype=self.dtype)
        if numbers.numel() > 2:
            ends = torch.randperm(numbers.numel(), generator=generator)[:2]
            numbers.view(-1)[ends] = torch.tensor([0, self.high - 1], dtype=self.dtype)
        return numbers


def axes(inputs: tuple[Input, ...]) -> list[str]:
    """The named axes of all inputs, each once, in order of appearance."""
    return list(dict.fromkeys(dim for value in inputs for dim in value.shape if isinstance(dim, str)))
