"""A transformers decoder traced with its past: the model itself says what its masks and positions are after a prefill.

transformers hands every attention's keys and values to a cache object. The one here takes its past from inputs of the
trace and leaves a node, `edgeformer::Append(new, past)`, where the two are joined; a pass makes of it the cache inputs
and outputs of the standard Attention, or a plain Concat. So ALiBi, chunks, windows and positions that a model counts
for itself come out right at every length, without code of their own.
"""

from __future__ import annotations

import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from edgeformer.errors import ExportError
from edgeformer.export.inputs import Input
from edgeformer.export.source import Source
from edgeformer.export.trace.attention_interface import DOMAIN

APPEND = "Append"


@dataclass(frozen=True)
class Cached:
    """What is traced in place of a source's module: the same forward, with a past and a present."""

    module: torch.nn.Module
    inputs: tuple[Input, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class _Layer:
    """One layer's cache: [batch, heads, tokens, size] for keys and for values."""

    index: int
    heads: tuple[int, int]
    sizes: tuple[int, int]


def with_past(source: Source) -> Cached:
    """`source` with inputs `past_key_values.{i}.key|value` and outputs `present.{i}.key|value`.

    Raises:
        ExportError: the model keeps something else than keys and values, which no cache of theirs can hold.
    """
    layers = _layers(source)
    inputs, outputs = list(source.inputs), list(source.outputs)
    for number, layer in enumerate(layers):
        for part, heads, size in zip(("key", "value"), layer.heads, layer.sizes, strict=True):
            shape = ("batch", heads, "past_sequence", size)
            inputs.append(Input(f"past_key_values.{number}.{part}", torch.float32, shape))
            outputs.append(f"present.{number}.{part}")
    return Cached(_Stepper(source, tuple(layer.index for layer in layers)), tuple(inputs), tuple(outputs))


def _layers(source: Source) -> list[_Layer]:
    """The caches that one forward of the module fills, in the order of its layers."""
    feeds = {value.name: value.sample({"batch": 2, "sequence": 3}, 0) for value in source.inputs}
    cache = _cache({})
    try:
        with torch.no_grad():
            source.module(**feeds, **_with_cache(source, cache))
    except Exception as error:
        name, told = type(source.module).__name__, str(error).strip().splitlines()
        lines = [frame.line or "" for frame in traceback.extract_tb(error.__traceback__)]
        asked = " ".join((str(error), *lines))
        if any(word in asked for word in ("LinearAttention", "conv_state", "recurrent", "has_previous_state")):
            raise ExportError(
                f"{name} keeps a recurrent or convolution state beside keys and values (a state-space or linear "
                "attention model), which is not a Transformer's cache; it cannot be exported."
            ) from error
        if "update_indexer" in asked or "compression" in asked:
            raise ExportError(
                f"{name} caches an index or compressed blocks beside keys and values (sparse attention that selects "
                "its keys), which no standard operator can hold; it cannot be exported."
            ) from error
        raise ExportError(
            f"{name} does not run with a plain key-value cache: {type(error).__name__}: {(told or [''])[0][:300]}"
        ) from error
    found = []
    for index, layer in enumerate(cache.layers):
        if layer.updates > 1:
            raise ExportError(f"{type(source.module).__name__} fills the cache of layer {index} more than once a step.")
        if layer.updates:
            shapes = layer.keys.shape, layer.values.shape
            if any(len(shape) != 4 for shape in shapes):
                raise ExportError(f"layer {index} caches keys and values of shapes {shapes}; expected four axes.")
            found.append(_Layer(index, (shapes[0][1], shapes[1][1]), (shapes[0][3], shapes[1][3])))
    return found


class _Stepper(torch.nn.Module):
    """The source's module, fed with positional arrays: its inputs, then (key, value) of every layer with a cache."""

    def __init__(self, source: Source, indices: tuple[int, ...]) -> None:
        super().__init__()
        self.module = source.module
        self._source, self._indices = source, indices
        self._names = [value.name for value in source.inputs]

    def forward(self, *arrays: torch.Tensor) -> tuple[torch.Tensor, ...]:
        own, past = arrays[: len(self._names)], arrays[len(self._names) :]
        pairs = dict(zip(self._indices, zip(past[::2], past[1::2], strict=True), strict=True))
        cache = _cache(pairs)
        result = self.module(**dict(zip(self._names, own, strict=True)), **_with_cache(self._source, cache))
        present = [part for index in self._indices for part in (cache.layers[index].keys, cache.layers[index].values)]
        return (*(result[name] for name in self._source.outputs), *present)


def _with_cache(source: Source, cache: Any) -> dict[str, Any]:
    """The arguments of the source's forward that are not its inputs, `cache` among them."""
    assert source.past is not None, "only a module that takes a cache is traced with one"
    return {**source.fixed, "use_cache": True, source.past: cache}


def _cache(past: Mapping[int, Sequence[torch.Tensor]]) -> Any:
    """A cache for transformers: layer -> (key, value) of the past; layers without one start empty."""
    from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

    class Layer(DynamicLayer):
        """Joins the past and the new by one node each; counts how often it was asked to."""

        def __init__(self, pair: Sequence[torch.Tensor] | None, length: Any) -> None:
            super().__init__()  # type: ignore[no-untyped-call]
            self.pair, self.length, self.updates = pair, length, 0

        def update(
            self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
        ) -> tuple[torch.Tensor, torch.Tensor]:
            self.updates += 1
            self.is_initialized = True
            if self.pair is None:
                self.keys, self.values = key_states, value_states
            else:
                self.keys, self.values = _append(key_states, self.pair[0]), _append(value_states, self.pair[1])
            return self.keys, self.values

        def get_seq_length(self) -> Any:
            # After an update, as before it in the models that ask late: the tokens in the cache by then.
            return self.length if self.updates == 0 or self.keys is None else self.keys.shape[2]

        def get_mask_sizes(self, query_length: int) -> tuple[Any, int]:
            return self.get_seq_length() + query_length, 0

    length = next((pair[0].shape[2] for pair in past.values()), 0)

    class Past(DynamicCache):
        def __init__(self) -> None:
            count = max(past, default=-1) + 1
            layers: Any = [Layer(past.get(index), length) for index in range(count)]
            more: Any = {"layers": layers} if past else {"layer_class_to_replicate": lambda: Layer(None, 0)}
            Cache.__init__(self, **more)

        def get_seq_length(self, layer_idx: int = 0) -> Any:
            return super().get_seq_length(layer_idx) if layer_idx < len(self.layers) else length

    return Past()


def _append(new: torch.Tensor, past: torch.Tensor) -> torch.Tensor:
    """[B, H, past + new, D]"""
    shape = [*new.shape[:2], past.shape[2] + new.shape[2], new.shape[3]]
    joined: torch.Tensor = torch.onnx.ops.symbolic(
        f"{DOMAIN}::{APPEND}", [new, past], dtype=new.dtype, shape=shape, version=1
    )
    return joined
