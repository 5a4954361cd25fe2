"""A module with the weights of its quantized graph: the reference that shows whether that graph is right."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Mapping, Sequence

import torch

from edgeformer.errors import ExportError
from edgeformer.export.quantize.weights import Parameters, QuantizedWeight
from edgeformer.export.scratch import on_disk, put


@contextlib.contextmanager
def dequantized_weights(module: torch.nn.Module, weights: Sequence[QuantizedWeight]) -> Iterator[None]:
    """Gives `module` the dequantized values of `weights`, in mapped files; restores its own when the block ends."""
    state = Parameters(module.state_dict(keep_vars=True))
    saved: list[tuple[torch.Tensor, torch.Tensor]] = []
    heads: list[tuple[torch.nn.Module, str, torch.nn.Parameter]] = []
    try:
        with torch.no_grad():
            for weight in (w for w in weights if w.own_head):
                heads += _untie(module, state, weight)
            others = [w for w in weights if not w.own_head]

            def whole(weight: QuantizedWeight) -> str:
                return state.whole(weight.name)

            for name, parts in itertools.groupby(sorted(others, key=whole), key=whole):
                saved += put(module, state[name], on_disk(_replacement(state[name], name, list(parts))))
        yield
    finally:
        for tensor, before in saved:
            tensor.data = before
        for owner, name, parameter in heads:
            setattr(owner, name, parameter)


def _replacement(original: torch.Tensor, name: str, weights: Sequence[QuantizedWeight]) -> torch.Tensor:
    """The dequantized parameter in place of `original`: one weight, or a stack of which `weights` are slices."""
    if weights[0].name == name:
        return _dequantized(weights[0], original)
    stack = Parameters({name: original.detach().clone()})
    for weight in weights:
        stack[weight.name].copy_(_dequantized(weight, stack[weight.name]))
    return stack[name]


def _dequantized(weight: QuantizedWeight, original: torch.Tensor) -> torch.Tensor:
    if weight.blocks is None:
        return original.detach()
    values = torch.from_numpy(weight.blocks.dequantize())
    return values.T if weight.transposed else values


def _untie(
    module: torch.nn.Module, state: Mapping[str, torch.Tensor], weight: QuantizedWeight
) -> list[tuple[torch.nn.Module, str, torch.nn.Parameter]]:
    """Gives a tied head a parameter of its own; returns (module, attribute, parameter) to restore."""
    shared, before = state[weight.name], []
    own = on_disk(_dequantized(weight, shared))
    for owner in module.modules():
        for name, parameter in tuple(owner.named_parameters(recurse=False)):
            if parameter.data_ptr() == shared.data_ptr() and not isinstance(owner, torch.nn.Embedding):
                before.append((owner, name, parameter))
                setattr(owner, name, torch.nn.Parameter(own))
    if not before:
        raise ExportError(
            f"no module but an embedding has {weight.name}, so the head cannot be checked; use --head tied."
        )
    return before
