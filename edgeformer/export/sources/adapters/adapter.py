"""A PEFT adapter is merged into the weights of its base model before anything else happens.

Merged, a LoRA's W + scale * B A (https://arxiv.org/abs/2106.09685) is one matrix, which quantizes and runs as any
other. So it is with every method of PEFT that can be merged; the others are refused.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgeformer.errors import ExportError
from edgeformer.export.blocks import F32
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
_SIZES = (2, 7)  # of the first named axis and the others, in what the merged and unmerged model are compared on
_KEPT = "The blocks of the GGUF file are not kept: the adapter changes its weights, so they are quantized anew."


def with_adapter(source: Source | EncoderDecoderSource, adapter: Adapter, base: Path) -> Source | EncoderDecoderSource:
    """The source of the folder `base` with the adapter merged into its module, and said in its origin.

    A tokenizer, chat template or generation_config.json in the adapter's folder replaces the base's.

    Raises:
        ExportError: it cannot be merged, or is one for another model.
    """
    folder = adapter.folder
    _require_same_processing(folder, base)
    parts = (source.encoder, source.decoder) if isinstance(source, EncoderDecoderSource) else (source,)
    module: Any = source.encoder.module.model if isinstance(source, EncoderDecoderSource) else source.module
    before = _config(module)
    merged = merge(module, adapter, lambda: _outputs(parts))
    after, texts, generation = _config(module), _tokenizer(folder), _generation(folder)
    # A tokenizer is taken whole: the base's chat template does not fit another vocabulary.
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
    """What the merge may change: the vocabulary, the number of layers, whether the head is tied."""
    config: Any = getattr(module, "config", None)
    return dict(json.loads(config.to_json_string(use_diff=False))) if hasattr(config, "to_diff_dict") else {}


def _inputs(part: Source, module: Any) -> tuple[Any, ...]:
    """The inputs; ids below the number that the module knows now."""
    if part.inputs[0].name != "input_ids" or (known := vocabulary(module)) is None:
        return part.inputs
    return (dataclasses.replace(part.inputs[0], high=known), *part.inputs[1:])


def _rows(module: Any) -> int | None:
    try:
        return int(module.get_input_embeddings().weight.shape[0])
    except (AttributeError, NotImplementedError):
        return None


def supplied_names(adapter: Adapter) -> frozenset[str]:
    """Parameters of the base that the adapter brings whole (a trained head), by the base's names for them."""
    return frozenset(map(base_name, adapter.tensors))


def _tokenizer(folder: Path) -> dict[str, bytes]:
    """The files of the tokenizer in the adapter's folder; a lone chat template is one too."""
    from edgeformer.export.sources.tokenizer_export import folder_files

    found = {name for name in (*TOKENIZER_FILES, "tokenizer.model", "vocab.json") if (folder / name).is_file()}
    template = {name: (folder / name).read_bytes() for name in found & {"chat_template.jinja"}}
    if not found - {"chat_template.jinja"}:
        return template
    try:
        return folder_files(folder)
    except ExportError as error:
        raise ExportError(
            f"the adapter {folder} brings a tokenizer ({', '.join(sorted(found))}): {error} Or take its files away to "
            "use the base's."
        ) from error


def _generation(folder: Path) -> dict[str, Any]:
    """generation_config.json of the adapter's folder, as transformers reads it; empty where there is none."""
    from transformers import GenerationConfig

    if not (folder / _GENERATION).is_file():
        return {}
    try:
        return generation_settings(GenerationConfig.from_pretrained(str(folder)))
    except Exception as error:
        raise ExportError(f"transformers cannot read {folder / _GENERATION}: {str(error)[:300]}") from error


def _require_same_processing(folder: Path, base: Path) -> None:
    """Refuses texts and pictures that are prepared otherwise than the base says: those settings are the base's."""
    for name in _PROCESSING:
        if (folder / name).is_file() and _json(folder / name) != _json(base / name):
            raise ExportError(
                f"the adapter {folder} has a {name} of its own, which is not the base's; only a tokenizer, a chat "
                f"template and {_GENERATION} are taken from an adapter. Copy it to the base's folder if the model was "
                "trained with it, or take it out of the adapter's."
            )


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    except ValueError as error:
        raise ExportError(f"{path} is no JSON: {error}") from error


def _require_rows(texts: Mapping[str, bytes], module: Any, folder: Path) -> None:
    """Refuses a tokenizer of the adapter's that has ids without an embedding."""
    rows = _rows(module)
    if rows is None or "tokenizer.json" not in texts:
        return
    from tokenizers import Tokenizer

    tokens = Tokenizer.from_buffer(texts["tokenizer.json"]).get_vocab(with_added_tokens=True)
    last = max(tokens, key=lambda token: tokens[token], default=None)
    if last is not None and tokens[last] >= rows:
        raise ExportError(
            f"the tokenizer in the adapter {folder} has the token {last!r} with id {tokens[last]}, and the model has "
            f"{rows} embeddings. Save the adapter with save_embedding_layers=True, so that it has the new rows."
        )


def _read_notes(adapter: Adapter, source: Source) -> list[str]:
    """What the user should know of this folder and base, though nothing is wrong with them."""
    notes, folder = [], adapter.folder
    base = str(adapter.settings.get("base_model_name_or_path") or "")
    named = Path(base).name
    if named and named not in source.origin and named != str(source.config.get("_name_or_path") or ""):
        notes.append(f"The adapter was trained on {base}; it was merged into {source.origin}, whose shapes fit.")
    if (folder / _GENERATION).is_file():
        notes.append(f"{_GENERATION} is the one in the adapter's folder.")
    if (folder / "config.json").is_file():
        notes.append("config.json in the adapter's folder is not read: the base's says what the model is.")
    if others := sorted(path.parent.name for path in folder.glob(f"*/{ADAPTER_CONFIG}")):
        notes.append(f"The adapter's folder has more adapters in {', '.join(others)}; they are not merged.")
    if source.kept is not None:
        notes.append(_KEPT)
    return notes


def _record(adapter: Adapter, merged: Merged) -> dict[str, Any]:
    """What edgeformer.json says of the adapter."""
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
