"""What an export starts from: a module with named inputs, and the files that are copied into the bundle."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch

from edgeformer.bundle.context import context_length
from edgeformer.bundle.signature import F32
from edgeformer.errors import ExportError
from edgeformer.export.blocks import Blocks
from edgeformer.export.inputs import Input
from edgeformer.export.positions import learned_positions

# Tensors and axes of an encoder-decoder's two graphs, as transformers and its ONNX exports name them.
ENCODER_OUTPUT = "last_hidden_state"  # the encoder's output ...
ENCODER_STATES = "encoder_hidden_states"  # ... and the decoder's input for it
ENCODER_MASK = "encoder_attention_mask"  # the decoder's input for the encoder's attention_mask
SOURCE_AXIS = "source_sequence"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


@dataclass(frozen=True)
class Source:
    """A model that becomes one graph. `module` is in eval mode, on the CPU, in float32."""

    module: torch.nn.Module
    inputs: tuple[Input, ...]
    outputs: tuple[str, ...]
    task: str
    origin: str  # where the model comes from, for the manifest
    config: Mapping[str, Any] = field(default_factory=dict)
    generation_config: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, bytes] = field(default_factory=dict)  # tokenizer.json, ...
    fixed: Mapping[str, Any] = field(default_factory=dict)  # arguments of forward that are not inputs
    tracing: Callable[[], AbstractContextManager[Any]] = nullcontext  # entered while the module is traced
    past: str | None = None  # forward's argument for a KV-cache object; the module is then traced with a cache
    kept: Callable[[F32], Blocks | None] | None = None  # the blocks that a quantized source (GGUF) has for a weight
    license: str | None = None
    processing: Mapping[str, Any] = field(default_factory=dict)  # pre- and postprocessing, for the manifest
    notes: tuple[str, ...] = ()  # limitations of the bundle, for the manifest
    adapter: Mapping[str, Any] | None = None  # the adapter that was merged into the module, for the manifest
    completeness: Mapping[str, Any] = field(default_factory=dict)  # tensors that were missing or unused, and why

    @property
    def first(self) -> Source:
        """The source whose module, config and files are the bundle's: this one."""
        return self

    @property
    def parts(self) -> dict[str, Source]:
        """{name of the graph: its source}."""
        return {"model": self}

    @property
    def is_language_model(self) -> bool:
        """Whether it takes token ids and gives logits of the next token."""
        tokens = self.inputs[0].name == "input_ids" and self.outputs == ("logits",)
        return tokens and self.task == "text-generation"

    @cached_property
    def positions(self) -> int | None:
        """Tokens that fit the module's tables of learned positions; None if it has none."""
        return learned_positions(partial(self.module, **self.fixed), self.inputs, self.config.get("pad_token_id"))

    @property
    def context(self) -> int | None:
        """The context length in tokens; None if neither the position tables nor the config set a limit."""
        return self.positions or context_length(self.config)


@dataclass(frozen=True)
class EncoderDecoderSource:
    """An encoder-decoder model: two sources with one module, each traced to a graph of its own.

    The decoder takes `input_ids` and the encoder's output as `encoder_hidden_states`, and `encoder_attention_mask`
    if the encoder has an `attention_mask`. Config, files and notes of the bundle are those of the encoder's source.
    """

    encoder: Source
    decoder: Source

    @property
    def first(self) -> Source:
        """The source whose module, config and files are the bundle's."""
        return self.encoder

    @property
    def parts(self) -> dict[str, Source]:
        """{name of the graph: its source}."""
        return {"encoder": self.encoder, "decoder": self.decoder}


AnySource = Source | EncoderDecoderSource


def vocabulary(model: Any) -> int | None:
    """The number of token ids that a transformers model both embeds and scores; None if it embeds none.

    An embedding may have more rows than the head (padding, image tokens); no text contains those ids.
    """
    try:
        tables = [model.get_input_embeddings(), model.get_output_embeddings()]
    except (AttributeError, NotImplementedError):
        return None
    return min((int(table.weight.shape[0]) for table in tables if hasattr(table, "weight")), default=None)


class Positional(torch.nn.Module):
    """The module with positional tensors as arguments and a tuple of tensors as result: what the tracer needs."""

    PREFIX = "module."

    def __init__(self, source: Source) -> None:
        super().__init__()
        self.module = source.module
        self._names = [value.name for value in source.inputs]
        self._outputs = source.outputs
        self._fixed = dict(source.fixed)

    def forward(self, *arrays: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The outputs, in the order of the source's; `arrays` are in the order of its inputs."""
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


def pytorch_outputs(source: Source, feeds: Mapping[str, torch.Tensor]) -> dict[str, F32]:
    """PyTorch's outputs in float32: the reference of every check."""
    with torch.no_grad():
        values = Positional(source)(*(feeds[value.name] for value in source.inputs))
    return {name: value.float().numpy() for name, value in zip(source.outputs, values, strict=True)}
