"""What an export starts from: a module with named inputs, and the files that travel with it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from edgeformer.errors import ExportError
from edgeformer.export.blocks import Blocks
from edgeformer.export.options import ExportOptions
from edgeformer.export.trace import Input

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

    @property
    def is_language_model(self) -> bool:
        """Token ids in, logits of the next token out."""
        tokens = self.inputs[0].name == "input_ids" and self.outputs == ("logits",)
        return tokens and self.task == "text-generation"

    @property
    def context(self) -> int | None:
        """Positions that the model was made for; None where its config sets no limit."""
        found = (self.config.get(name) for name in ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"))
        return next((value for value in found if isinstance(value, int) and value > 0), None)


@dataclass(frozen=True)
class Pair:
    """An encoder-decoder model: two sources over one module, traced apart.

    The decoder takes `input_ids` and what the encoder gives, `encoder_hidden_states`, with `encoder_attention_mask`
    where the encoder has an `attention_mask`.
    """

    encoder: Source
    decoder: Source


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


def load_source(options: ExportOptions) -> Source | Pair:
    """The source that `options.source` names, with `options.adapter` merged into it.

    Raises:
        ExportError: it is none of the known kinds, or cannot be loaded; the message says which and why.
    """
    source = _base_source(options)
    if options.adapter is None:
        return source
    from edgeformer.export.adapter import with_adapter

    return with_adapter(source, options.adapter)


def _base_source(options: ExportOptions) -> Source | Pair:
    name, path = options.source, Path(options.source)
    if options.tokenizer is not None and (":" not in name or path.exists()):
        raise ExportError(f"--tokenizer is for module:factory; {name} brings its own.")
    if path.is_file() and path.suffix.lower() == ".gguf":
        from edgeformer.export.hub import gguf_source

        return gguf_source(path)
    if (path / "config.json").is_file():
        return _folder_source(path, options.architecture)
    if ":" in name and not path.exists():
        from edgeformer.export.factory import factory_source

        return factory_source(options)
    if path.exists():
        kind = "folder without a config.json" if path.is_dir() else f"{path.suffix or 'nameless'} file"
        raise ExportError(
            f"{name} is a {kind}; expected a .gguf file, a Hugging Face or checkpoint folder (with config.json), or "
            "path/to/file.py:factory."
        )
    if path.suffix or path.is_absolute() or name.count("/") > 1:
        raise ExportError(f"{name} does not exist.")
    from edgeformer.export.hub import hub_source

    return hub_source(name, options.architecture)


def _folder_source(path: Path, architecture: str | None) -> Source | Pair:
    from edgeformer.models.checkpoint import read_config

    if "edgeformer_factory" in read_config(path):
        from edgeformer.export.factory import checkpoint_source

        return checkpoint_source(path)
    from edgeformer.export.hub import folder_source

    return folder_source(path, architecture)
