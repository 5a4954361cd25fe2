"""Adds a PEFT adapter to a source: merges it into the base model's weights and takes its tokenizer.

Merged, a LoRA's W + scale * B A (https://arxiv.org/abs/2106.09685) is one matrix, which is quantized and run like any
other. The same holds for every PEFT method that can be merged; the others are rejected.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgeformer.bundle.signature import F32
from edgeformer.errors import ExportError
from edgeformer.export.inputs import axes
from edgeformer.export.source import TOKENIZER_FILES, EncoderDecoderSource, Source, pytorch_outputs, vocabulary
from edgeformer.export.sources.adapters.adapter_folder import ADAPTER_CONFIG, Adapter, peft_version
from edgeformer.export.sources.adapters.adapter_merge import Merged, base_name, merge
from edgeformer.export.sources.generation import generation_settings

_GENERATION = "generation_config.json"
_PROCESSING = (  # what an app does before and after the graph
    "modules.json", "sentence_bert_config.json", "config_sentence_transformers.json", "1_Pooling/config.json",
    "preprocessor_config.json", "processor_config.json",
)  # fmt: skip
_SIZES = (2, 7)  # of the first named axis and of the others, for the comparison of merged and unmerged model
_KEPT = "The blocks of the GGUF file are not kept: the adapter changes the weights, so they are quantized again."


def with_adapter(source: Source | EncoderDecoderSource, adapter: Adapter, base: Path) -> Source | EncoderDecoderSource:
    """The source of the folder `base` with the adapter merged into its module and named in its origin.

    A tokenizer, chat template or generation_config.json in the adapter's folder replaces the base's.

    Raises:
        ExportError: the adapter cannot be merged, or belongs to another model.
    """
    folder = adapter.folder
    _require_same_processing(folder, base)
    parts = (source.encoder, source.decoder) if isinstance(source, EncoderDecoderSource) else (source,)
    module: Any = source.encoder.module.model if isinstance(source, EncoderDecoderSource) else source.module
    before = _config(module)
    merged = merge(module, adapter, lambda: _outputs(parts))
    after, texts, generation = _config(module), _tokenizer(folder), _generation(folder)
    # All files of a tokenizer are replaced: the base's chat template does not fit another vocabulary.
    replaced = TOKENIZER_FILES if "tokenizer.json" in texts else ()
    changes: dict[str, Any] = {
        "origin": f"{parts[0].origin} + adapter {folder.resolve().name} ({adapter.method}, {merged.words})",
        "adapter": _record(adapter, merged) | {"texts": sorted([*texts, *([_GENERATION] if generation else [])])},
        "kept": None,
        "config": {
            **parts[0].config,
            **{k: v for k, v in after.items() if k in parts[0].config and v != before.get(k)},
        },
        "files": {name: data for name, data in parts[0].files.items() if name not in replaced} | texts,
        "generation_config": generation or parts[0].generation_config,
        "notes": (*parts[0].notes, *merged.notes, *_read_notes(adapter, parts[0])),
    }
    _require_rows(texts, module, folder)
    made = [dataclasses.replace(part, **changes, inputs=_inputs(part, module)) for part in parts]
    return EncoderDecoderSource(*made) if isinstance(source, EncoderDecoderSource) else made[0]


def _outputs(parts: tuple[Source, ...]) -> dict[str, F32]:
    found: dict[str, F32] = {}
    for part in parts:
        sizes = {axis: _SIZES[bool(index)] for index, axis in enumerate(axes(part.inputs))}
        feeds = {value.name: value.sample(sizes, 2 * index) for index, value in enumerate(part.inputs)}
        found |= pytorch_outputs(part, feeds)
    return found


def _config(module: Any) -> dict[str, Any]:
    """The model's config; the merge may change the vocabulary, the number of layers and whether the head is tied."""
    config: Any = getattr(module, "config", None)
    return dict(json.loads(config.to_json_string(use_diff=False))) if hasattr(config, "to_diff_dict") else {}


def _inputs(part: Source, module: Any) -> tuple[Any, ...]:
    """The inputs of `part`, with token ids below the module's vocabulary after the merge."""
    if part.inputs[0].name != "input_ids" or (known := vocabulary(module)) is None:
        return part.inputs
    return (dataclasses.replace(part.inputs[0], high=known), *part.inputs[1:])


def _rows(module: Any) -> int | None:
    try:
        return int(module.get_input_embeddings().weight.shape[0])
    except (AttributeError, NotImplementedError):
        return None


def supplied_names(adapter: Adapter) -> frozenset[str]:
    """Names in the base of the parameters that the adapter replaces, such as a trained head."""
    return frozenset(map(base_name, adapter.tensors))


def _tokenizer(folder: Path) -> dict[str, bytes]:
    """{name: content} of the tokenizer's files in the adapter's folder, or only a chat template."""
    from edgeformer.export.sources.tokenizer_export import folder_files

    found = {name for name in (*TOKENIZER_FILES, "tokenizer.model", "vocab.json") if (folder / name).is_file()}
    template = {name: (folder / name).read_bytes() for name in found & {"chat_template.jinja"}}
    if not found - {"chat_template.jinja"}:
        return template
    try:
        return folder_files(folder)
    except ExportError as error:
        raise ExportError(
            f"the adapter {folder} has a tokenizer ({', '.join(sorted(found))}): {error} Or remove its files to use "
            "the base's."
        ) from error


def _generation(folder: Path) -> dict[str, Any]:
    """generation_config.json of the adapter's folder, as transformers reads it; {} if there is none."""
    from transformers import GenerationConfig

    if not (folder / _GENERATION).is_file():
        return {}
    try:
        return generation_settings(GenerationConfig.from_pretrained(str(folder)))
    except Exception as error:
        raise ExportError(f"transformers cannot read {folder / _GENERATION}: {str(error)[:300]}") from error


def _require_same_processing(folder: Path, base: Path) -> None:
    """Rejects preprocessing settings in the adapter's folder that differ from the base's."""
    for name in _PROCESSING:
        if (folder / name).is_file() and _json(folder / name) != _json(base / name):
            raise ExportError(
                f"the adapter {folder} has a {name} that differs from the base's; only a tokenizer, a chat template "
                f"and {_GENERATION} are read from an adapter. Copy it to the base's folder if the model was trained "
                "with it, or remove it."
            )


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    except ValueError as error:
        raise ExportError(f"{path} is not JSON: {error}") from error


def _require_rows(texts: Mapping[str, bytes], module: Any, folder: Path) -> None:
    """Rejects a tokenizer in the adapter's folder that has ids without an embedding."""
    rows = _rows(module)
    if rows is None or "tokenizer.json" not in texts:
        return
    from tokenizers import Tokenizer

    tokens = Tokenizer.from_buffer(texts["tokenizer.json"]).get_vocab(with_added_tokens=True)
    last = max(tokens, key=lambda token: tokens[token], default=None)
    if last is not None and tokens[last] >= rows:
        raise ExportError(
            f"the tokenizer in the adapter {folder} has the token {last!r} with id {tokens[last]}, and the model has "
            f"{rows} embeddings. Save the adapter with save_embedding_layers=True, to store the new rows."
        )


def _read_notes(adapter: Adapter, source: Source) -> list[str]:
    """Notes for the manifest about the adapter's folder and its base."""
    notes, folder = [], adapter.folder
    base = str(adapter.settings.get("base_model_name_or_path") or "")
    named = Path(base).name
    if named and named not in source.origin and named != str(source.config.get("_name_or_path") or ""):
        notes.append(f"The adapter was trained on {base}; it was merged into {source.origin}, whose shapes fit.")
    if (folder / _GENERATION).is_file():
        notes.append(f"{_GENERATION} is the one in the adapter's folder.")
    if (folder / "config.json").is_file():
        notes.append("config.json in the adapter's folder is not read, only the base's.")
    if others := sorted(path.parent.name for path in folder.glob(f"*/{ADAPTER_CONFIG}")):
        notes.append(f"The adapter's folder has other adapters in {', '.join(others)}; they are not merged.")
    if source.kept is not None:
        notes.append(_KEPT)
    return notes


def _record(adapter: Adapter, merged: Merged) -> dict[str, Any]:
    """The record of the adapter for edgeformer.json."""
    with adapter.weights.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {
        "name": adapter.folder.resolve().name,
        "method": adapter.method,
        "settings": dict(adapter.changed),
        "base": adapter.settings.get("base_model_name_or_path"),
        "layers": merged.layers,
        "whole_parameters": merged.whole,
        "tensors": len(adapter.tensors),
        "parameters": sum(value.numel() for value in adapter.tensors.values()),
        "file": {"name": adapter.weights.name, "sha256": digest},
        "peft": peft_version(),
    }
