"""The source of a GGUF file: checks header, metadata, tensors and tokenizer, then builds the model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from edgeformer.errors import EdgeformerError, ExportError, first_line
from edgeformer.export.quiet import quiet
from edgeformer.export.source import Source
from edgeformer.export.sources.completeness import Loaded, require_complete
from edgeformer.export.sources.gguf import rope, tensors
from edgeformer.export.sources.gguf.config_builder import EDIT, ConfigBuilder
from edgeformer.export.sources.gguf.gguf_config import build_config
from edgeformer.export.sources.gguf.gguf_tokenizer import read_gguf_tokenizer
from edgeformer.export.sources.gguf.kept_blocks import KeptRows
from edgeformer.export.sources.gguf.shards import GgufFile, open_gguf
from edgeformer.export.sources.hub.hub import language_model
from edgeformer.export.sources.hub.hub_weights import LoadRules
from edgeformer.export.sources.tokenizer_export import NO_TOKENIZER, compact_tokenizer, folder_files


def gguf_source(path: Path, rules: LoadRules | None = None, tokenizer: Path | None = None) -> Source:
    """The model of a GGUF file or of all its shards, with its tokenizer, chat templates and quantized blocks.

    `tokenizer` is the folder of another tokenizer, or `tokenizer_export.NO_TOKENIZER`.

    Raises:
        ExportError: the file is damaged or incomplete, transformers does not support its architecture, or a key or a
            tensor is unsupported. The message names it.
    """
    model = open_gguf(path)
    model.architecture  # noqa: B018 (raises if the file has none)
    if rules is not None and rules.allow:
        raise ExportError(
            f"--allow-missing is not for GGUF files: one without a tensor is damaged. Remove it for {model.name}."
        )
    tensors.check_types(model)
    tokens = read_gguf_tokenizer(model)
    if rules is not None:
        rules.room(sum(tensor.elements for tensor in model.tensors.values()))
    with quiet():
        settings, meta = _structure(model, tokens.config)
        loaded = _weights(meta, settings)
    if settings.rotary is not None:
        rope.apply(loaded, settings.rotary, model.name)
    rows = KeptRows(*(shard.path for shard in model.shards))
    files = tokens.files if tokenizer is None else {} if tokenizer == NO_TOKENIZER else folder_files(tokenizer)
    if "tokenizer.json" in files:
        files = files | {"tokenizer.json": compact_tokenizer(files["tokenizer.json"])}
    source = language_model(loaded, _origin(model), files=files, kept=rows.find if rows.types else None)
    config = dict(source.config) | _described(settings, source.config)
    return dataclasses.replace(
        source,
        config=config,
        generation_config=tokens.generation,
        license=tokens.license,
        completeness=_completeness(model, loaded),
        notes=(*source.notes, *settings.notes, *tokens.notes, *rows.notes()),
    )


def _completeness(model: GgufFile, loaded: Any) -> dict[str, Any]:
    """The record of the load for edgeformer.json; `tensors` has checked that it is complete."""
    loaded_tensors = Loaded(
        tied=dict(getattr(loaded, "all_tied_weights_keys", None) or {}),
        derived=[name for name in model.tensors if name.endswith(rope.TENSORS)],
        tensors=len(model.tensors),
    )
    return require_complete(loaded_tensors, model.name, type(loaded).__name__)


def _origin(model: GgufFile) -> str:
    kinds: dict[str, int] = {}
    for tensor in model.tensors.values():
        if len(tensor.shape) > 1:
            kinds[tensor.type.name] = kinds.get(tensor.type.name, 0) + 1
    types = ", ".join(f"{count} {name}" for name, count in kinds.items())
    shards = f", {len(model.shards)} shards" if len(model.shards) > 1 else ""
    return f"GGUF {model.name} ({types}{shards})"


def _structure(model: GgufFile, special: Mapping[str, Any]) -> tuple[ConfigBuilder, Any]:
    """(the config, the model on the meta device, which allocates nothing)."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    try:
        started = _started(model)
        settings = build_config(model, started, CONFIG_MAPPING[started["model_type"]])
        settings.fields |= special
        tensors.check_layers(model, settings.size("block_count") or 0)
        fields = {name: value for name, value in settings.fields.items() if name != "model_type"}
        config = AutoConfig.for_model(started["model_type"], **fields)
        with torch.device("meta"):
            meta = AutoModelForCausalLM.from_config(config, attn_implementation="eager")  # type: ignore[no-untyped-call]
    except EdgeformerError:
        raise
    except Exception as error:
        raise _failure(model, error) from error
    return settings, meta


def _started(model: GgufFile) -> dict[str, Any]:
    """The config fields that transformers' reader takes from the metadata, `model_type` included."""
    from transformers.integrations.gguf.gguf_config_mapping import GGUF_CONFIG_ARCHS, get_gguf_config
    from transformers.integrations.gguf.reader import read_gguf_metadata
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    path = str(model.shards[0].path)
    if model.architecture in GGUF_CONFIG_ARCHS:
        try:
            return dict(get_gguf_config(read_gguf_metadata(path)[0], tuple(model.tensors)))
        except KeyError as error:
            raise ExportError(f"{model.name} has no {error.args[0]}, which has no default. {EDIT}") from error
    try:
        return dict(load_gguf_checkpoint(path, return_tensors=False)["config"])  # type: ignore[no-untyped-call]
    except ValueError as error:
        if "not supported yet" not in str(error):
            raise
        raise ExportError(
            f"{model.name}: general.architecture is {model.architecture!r}, which the installed transformers cannot "
            "read from GGUF. Export the original model's folder, or use a newer transformers."
        ) from error


def _weights(meta: Any, settings: ConfigBuilder) -> Any:
    from transformers.integrations.gguf.utils import is_gguf_arch_supported

    model = settings.model
    try:
        if not is_gguf_arch_supported(model.architecture):
            return tensors.load_gguf_weights(meta, settings)
        tensors.parameters_of(meta, settings)
        with model.whole() as path:  # this reader of transformers takes one file
            loaded, report = type(meta).from_pretrained(
                str(path.parent),
                gguf_file=path.name,
                config=meta.config,
                dtype=torch.float32,
                attn_implementation="eager",
                output_loading_info=True,
            )
        tensors.check_report(model.name, report)
        return loaded
    except EdgeformerError:
        raise
    except Exception as error:
        raise _failure(model, error) from error


def _failure(model: GgufFile, error: Exception) -> ExportError:
    return ExportError(f"transformers cannot load {model.name}: {type(error).__name__}: {first_line(error)[:400]}")


def _described(settings: ConfigBuilder, config: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of config.json for RoPE factors from tensors: transformers' `longrope` with equal short and long ones."""
    rotary = settings.rotary
    if rotary is None:
        return {}
    parameters = dict(config.get("rope_parameters") or {})
    if rotary.factors is None:
        return {"rope_parameters": parameters | {"attention_factor": rotary.scale}}
    factors = [float(value) for value in rotary.factors]
    limit = {"original_max_position_embeddings": config.get("max_position_embeddings")}
    longrope = {"rope_type": "longrope", "short_factor": factors, "long_factor": factors}
    return {"rope_parameters": parameters | longrope | limit | {"attention_factor": rotary.scale}}
