"""Traces a transformers decoder with a KV cache, so its own code computes masks and positions after a prefill.

transformers passes the keys and values of every attention to a cache object. The cache class here reads the past from
inputs of the trace, and traces `edgeformer::Append(new, past)` where it joins both. The pass `join_cache` makes of that
node the cache inputs and outputs of the standard Attention, or a Concat. So ALiBi, chunked attention, sliding windows
and positions that a model counts itself are right at every length, without code for each.
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
    """The module that is traced in place of a source's: the same forward, with past inputs and present outputs."""

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
        ExportError: the model's cache has more than keys and values, or the model does not run with this cache.
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
    """The layers whose cache one forward of the module fills, in order."""
    feeds = {value.name: value.sample({"batch": 2, "sequence": 3}, 0) for value in source.inputs}
    cache = _cache({})
    try:
        with torch.no_grad():
            source.module(**feeds, **_with_cache(source, cache))
    except Exception as error:
        name, summary = type(source.module).__name__, str(error).strip().splitlines()
        lines = [frame.line or "" for frame in traceback.extract_tb(error.__traceback__)]
        text = " ".join((str(error), *lines))
        if any(word in text for word in ("LinearAttention", "conv_state", "recurrent", "has_previous_state")):
            raise ExportError(
                f"{name} has a recurrent or convolution state beside keys and values (a state-space or linear "
                "attention model); expected a KV cache only. It cannot be exported."
            ) from error
        if "update_indexer" in text or "compression" in text:
            raise ExportError(
                f"{name} caches an index or compressed blocks beside keys and values (sparse attention that selects "
                "its keys); expected a KV cache only, since no standard operator has more. It cannot be exported."
            ) from error
        raise ExportError(
            f"{name} does not run with a plain key-value cache: {type(error).__name__}: {(summary or [''])[0][:300]}"
        ) from error
    found = []
    for index, layer in enumerate(cache.layers):
        if layer.updates > 1:
            raise ExportError(
                f"{type(source.module).__name__} fills the cache of layer {index} twice a step; expected once."
            )
        if layer.updates:
            shapes = layer.keys.shape, layer.values.shape
            if any(len(shape) != 4 for shape in shapes):
                raise ExportError(f"layer {index} caches keys and values of shapes {shapes}; expected four axes each.")
            found.append(_Layer(index, (shapes[0][1], shapes[1][1]), (shapes[0][3], shapes[1][3])))
    return found


class _Stepper(torch.nn.Module):
    """The source's module with positional arguments: its inputs, then (key, value) of every layer with a cache."""

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
    """The arguments of the source's forward that are not graph inputs, `cache` included."""
    assert source.past is not None, "the module takes no cache"
    return {**source.fixed, "use_cache": True, source.past: cache}


def _cache(past: Mapping[int, Sequence[torch.Tensor]]) -> Any:
    """A transformers cache from {layer: (key, value) of the past}; layers without a past start empty."""
    from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

    class Layer(DynamicLayer):
        """Joins past and new keys, and values, by one node each; `updates` counts the calls of `update`."""

        def __init__(self, pair: Sequence[torch.Tensor] | None, length: Any) -> None:
            super().__init__()  # type: ignore[no-untyped-call]
            self.pair, self.length, self.updates = pair, length, 0

        def update(
            self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
        ) -> tuple[torch.Tensor, torch.Tensor]:
            self.updates += 1
            self.is_initialized = True
            if self.pair is None:
                self.keys, self.values = key_states, value_states
            else:
                self.keys, self.values = _append(key_states, self.pair[0]), _append(value_states, self.pair[1])
            return self.keys, self.values

        def get_seq_length(self) -> Any:
            # Tokens in the cache at the time of the call: some models ask before `update`, some after it.
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
