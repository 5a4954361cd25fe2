"""A quantized weight, and the names that weights have: those of the module's state dict, or of slices of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from edgeformer.export.blocks import Blocks


@dataclass(frozen=True)
class QuantizedWeight:
    """One weight of the module that the bundle stores as blocks."""

    name: str  # in the module's state dict
    blocks: Blocks | None  # None: float, which only a head of its own can be
    transposed: bool = False  # the module has it as [K, N]
    own_head: bool = False  # the head's own copy of a tied embedding table
    calibrated: bool = False  # its integers were fitted to the layer's inputs


class Parameters(dict[str, torch.Tensor]):
    """A state dict in which `stack.3` is the slice 3 of the parameter `stack`, as `passes.slices` names it."""

    def __contains__(self, name: object) -> bool:
        return dict.__contains__(self, name) or (isinstance(name, str) and self._slice(name) is not None)

    def __missing__(self, name: str) -> torch.Tensor:
        found = self._slice(name)
        if found is None:
            raise KeyError(name)
        return found

    def whole(self, name: str) -> str:
        """The name of the parameter that `name` is, or is a slice of."""
        return name if dict.__contains__(self, name) else name.rpartition(".")[0]

    def _slice(self, name: str) -> torch.Tensor | None:
        stack, _, index = name.rpartition(".")
        inside = dict.__contains__(self, stack) and index.isdigit() and int(index) < len(self[stack])
        return self[stack][int(index)] if inside else None
