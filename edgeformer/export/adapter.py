"""A PEFT adapter (LoRA, DoRA) is added to the weights of its base model before anything else happens.

The format is a folder: `adapter_config.json`, and `adapter_model.safetensors` with
`base_model.model.NAME.lora_A.weight` [r, in], `...lora_B.weight` [out, r], and whole parameters that were trained
beside them. Merged, W + scale * B A (https://arxiv.org/abs/2106.09685) is one matrix, which quantizes and runs as any
other.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from edgeformer.errors import ExportError
from edgeformer.export.source import Pair, Source

_PREFIX = "base_model.model."
_PART = re.compile(r"^(?P<owner>.+)\.(?P<part>lora_(?:A|B|embedding_A|embedding_B|magnitude_vector))(?:\.weight)?$")


def with_adapter(source: Source | Pair, folder: Path) -> Source | Pair:
    """The source with the adapter in `folder` merged into its module, and said in its origin.

    Blocks that a GGUF file holds are no longer the model's, so they are not kept.

    Raises:
        ExportError: the folder is no adapter, one of a kind that cannot be merged, or one for another model.
    """
    config, tensors = _read(folder)
    if isinstance(source, Pair):
        note = merge(source.encoder.module.model, config, tensors)  # type: ignore[arg-type]
        encoder, decoder = (
            dataclasses.replace(part, origin=f"{part.origin} + adapter {folder.name} ({note})")
            for part in (source.encoder, source.decoder)
        )
        return Pair(encoder, decoder)
    note = merge(source.module, config, tensors)
    return dataclasses.replace(source, origin=f"{source.origin} + adapter {folder.name} ({note})", kept=None)


def merge(module: torch.nn.Module, config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> str:
    """Adds the adapter to the module's parameters in place; returns what was done, in words.

    Raises:
        ExportError: a tensor belongs to no parameter of the module, or has another shape.
    """
    pairs: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
    whole: dict[str, torch.Tensor] = {}
    for key, value in tensors.items():
        name = key.removeprefix(_PREFIX)
        match = _PART.match(name)
        if match is not None:
            pairs[match["owner"]][match["part"].removeprefix("lora_")] = value.float()
        else:
            whole[name.replace(".base_layer.", ".").replace(".modules_to_save.default.", ".")] = value.float()
    modules = dict(module.named_modules())
    missing = sorted([n for n in pairs if n not in modules] + [n for n in whole if _parameter(modules, n) is None])
    if missing:
        raise ExportError(
            f"the adapter has {len(missing)} parts that {type(module).__name__} has no place for, {missing[0]!r} for "
            f"one: it was trained on another model ({config.get('base_model_name_or_path') or 'its name is not told'})."
        )
    with torch.no_grad():
        for name, value in whole.items():
            _set(modules, name, value)
        for name, parts in pairs.items():
            _add(modules[name], name, parts, config)
    kind = "DoRA" if config.get("use_dora") else "LoRA"
    return f"{kind}, {len(pairs)} layers" + (f", {len(whole)} whole parameters" if whole else "")


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    from safetensors.torch import load_file

    settings, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    for path in (settings, weights):
        if not path.is_file():
            raise ExportError(
                f"{folder} is no PEFT adapter: it has no {path.name}. Save one with model.save_pretrained(folder)."
            )
    try:
        config, tensors = json.loads(settings.read_text(encoding="utf-8")), load_file(weights)
    except Exception as error:
        raise ExportError(f"the adapter {folder} cannot be read: {error}") from error
    if config.get("peft_type") != "LORA":
        raise ExportError(f"{folder} is a {config.get('peft_type')} adapter; only LORA (with DoRA) can be merged.")
    strange = [name for name in ("trainable_token_indices", "target_parameters", "megatron_config") if config.get(name)]
    if strange:
        raise ExportError(
            f"{folder}: {', '.join(strange)} cannot be merged here; merge it with peft's merge_and_unload."
        )
    return config, tensors


def _add(layer: torch.nn.Module, name: str, parts: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> None:
    embedding = "embedding_A" in parts
    a, b = (parts.get(f"embedding_{x}" if embedding else x) for x in "AB")
    weight = getattr(layer, "weight", None)
    if a is None or b is None or not isinstance(weight, torch.Tensor) or weight.ndim != 2:
        raise ExportError(f"{name}: the adapter changes a {type(layer).__name__}; linear layers and embeddings can be.")
    rank = a.shape[0]
    alpha = next(
        (
            value
            for pattern, value in (config.get("alpha_pattern") or {}).items()
            if re.match(rf"(.*\.)?({pattern})$", name)
        ),
        config.get("lora_alpha", rank),
    )
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    # [in, out] layers: transformers' Conv1D, and the rows of an embedding.
    turned = embedding or bool(config.get("fan_in_fan_out")) or type(layer).__name__ == "Conv1D"
    change = (b @ a) * scale
    change = change.T if turned else change
    if change.shape != weight.shape:
        raise ExportError(
            f"{name}: the adapter changes a matrix {tuple(change.shape)}, the model's is {tuple(weight.shape)}."
        )
    merged = weight + change
    if (magnitude := parts.get("magnitude_vector")) is not None:  # DoRA, https://arxiv.org/abs/2402.09353
        rows = merged.T if turned else merged  # [out, in]
        rows = magnitude.reshape(-1, 1) * rows / rows.norm(dim=1, keepdim=True)
        merged = rows.T if turned else rows
    weight.copy_(merged)


def _parameter(modules: Mapping[str, torch.nn.Module], name: str) -> torch.nn.Parameter | None:
    owner, _, last = name.rpartition(".")
    found = getattr(modules[owner], last, None) if owner in modules else None
    return found if isinstance(found, torch.nn.Parameter) else None


def _set(modules: Mapping[str, torch.nn.Module], name: str, value: torch.Tensor) -> None:
    """A parameter of its own: one that was tied to another is not any more, as in PEFT."""
    owner, _, last = name.rpartition(".")
    before = getattr(modules[owner], last)
    if before.shape != value.shape:
        raise ExportError(
            f"{name}: the adapter holds {tuple(value.shape)}, the model {tuple(before.shape)}; resize the base model's "
            "embeddings as they were resized for training."
        )
    setattr(modules[owner], last, torch.nn.Parameter(value.clone(), requires_grad=False))
