"""What an export starts from: a module with named inputs, and the files that travel with it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from edgeformer.bundle.context import context_length
from edgeformer.errors import ExportError
from edgeformer.export.blocks import Blocks
from edgeformer.export.inputs import Input

F32 = NDArray[np.float32]
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


@dataclass(frozen=True)
class Source:
    """A model ready to be traced. `module` is in eval mode, on the CPU, in float32."""

    module: torch.nn.Module
    inputs: tuple[Input, ...]
    outputs: tuple[str, ...]
    task: str
    origin: str  # where it came from, for the manifest
    config: Mapping[str, Any] = field(default_factory=dict)
    generation_config: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, bytes] = field(default_factory=dict)  # tokenizer.json, ...
    fixed: Mapping[str, Any] = field(default_factory=dict)  # arguments of forward that are not inputs
    tracing: Callable[[], AbstractContextManager[Any]] = nullcontext  # entered while the module is traced
    past: str | None = None  # forward's argument for a cache of its own kind, with which it is then traced
    kept: Callable[[F32], Blocks | None] | None = None  # a weight's own blocks, where the source has them
    license: str | None = None
    processing: Mapping[str, Any] = field(default_factory=dict)  # what an app does before and after the graph
    notes: tuple[str, ...] = ()  # what a user of the bundle must know, for the manifest
    adapter: Mapping[str, Any] | None = None  # the adapter that was merged into the module, for the manifest
    completeness: Mapping[str, Any] = field(default_factory=dict)  # what loading the weights left out, and why

    @property
    def is_language_model(self) -> bool:
        """Token ids in, logits of the next token out."""
        tokens = self.inputs[0].name == "input_ids" and self.outputs == ("logits",)
        return tokens and self.task == "text-generation"

    @cached_property
    def positions(self) -> int | None:
        """Tokens that fit the module's tables of learned positions; None where it has none."""
        from edgeformer.export.positions import learned_positions

        return learned_positions(self)

    @property
    def context(self) -> int | None:
        """Positions that the model was made for; None where neither its tables nor its config set a limit."""
        return self.positions or context_length(self.config)


@dataclass(frozen=True)
class Pair:
    """An encoder-decoder model: two sources over one module, traced apart.

    The decoder takes `input_ids` and what the encoder gives, `encoder_hidden_states`, with `encoder_attention_mask`
    where the encoder has an `attention_mask`.
    """

    encoder: Source
    decoder: Source


def vocabulary(model: Any) -> int | None:
    """Token ids that a transformers model both embeds and scores run below this; None where it embeds none.

    An embedding may have more rows than the head, for padding or for pictures: no text holds those.
    """
    try:
        tables = [model.get_input_embeddings(), model.get_output_embeddings()]
    except (AttributeError, NotImplementedError):
        return None
    return min((int(table.weight.shape[0]) for table in tables if hasattr(table, "weight")), default=None)


class Positional(torch.nn.Module):
    """The module with positional tensors in and a tuple of tensors out, as the tracer wants it."""

    PREFIX = "module."

    def __init__(self, source: Source) -> None:
        super().__init__()
        self.module = source.module
        self._names = [value.name for value in source.inputs]
        self._outputs = source.outputs
        self._fixed = dict(source.fixed)

    def forward(self, *arrays: torch.Tensor) -> tuple[torch.Tensor, ...]:
        result = self.module(**dict(zip(self._names, arrays, strict=True)), **self._fixed)
        return _as_tuple(result, self._outputs)


def _as_tuple(result: Any, names: Sequence[str]) -> tuple[torch.Tensor, ...]:
    if isinstance(result, torch.Tensor):
        found: tuple[Any, ...] = (result,)
    elif isinstance(result, Mapping):
        missing = [name for name in names if name not in result]
        if missing:
            raise ExportError(f"forward returns {', '.join(result)}, not {', '.join(missing)}; name the outputs.")
        found = tuple(result[name] for name in names)
    else:
        found = tuple(result)
    if len(found) != len(names) or not all(isinstance(value, torch.Tensor) for value in found):
        kinds = ", ".join(type(value).__name__ for value in found)
        raise ExportError(f"forward returns {len(found)} values ({kinds}); expected tensors for {', '.join(names)}.")
    return found


def run(source: Source, feeds: Mapping[str, torch.Tensor]) -> dict[str, F32]:
    """PyTorch's own outputs, the truth that every check compares with."""
    with torch.no_grad():
        values = Positional(source)(*(feeds[value.name] for value in source.inputs))
    return {name: value.float().numpy() for name, value in zip(source.outputs, values, strict=True)}
