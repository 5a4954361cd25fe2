"""Loads a transformers model and checks that every weight comes from its checkpoint.

transformers renames, fuses and splits tensors when it loads, so names cannot be compared directly. Instead the library
first loads the checkpoint's headers into a model on the meta device, which allocates nothing; its loading report is
checked, and then the weights are loaded.
"""

from __future__ import annotations

import contextlib
import copy
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from edgeformer.errors import ExportError
from edgeformer.export.sources.checkpoint_files import INDEX_SUFFIX, WEIGHT_FILES, StoredTensor, read_headers
from edgeformer.export.sources.completeness import INNER_WRAPPERS, Loaded, Mismatch, common_prefixes, require_complete
from edgeformer.export.sources.memory_bounds import construction, require_plausible

_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
Room = Callable[[int], object]


@dataclass(frozen=True)
class LoadRules:
    """Which tensors may be missing or unused in a load, and the check of memory and disk."""

    allow: tuple[str, ...] = ()  # patterns of --allow-missing
    room: Room = lambda _: None  # called with the number of parameters; raises if the machine has too little space
    part: bool = False  # the user chose the class: tensors of modules that it lacks (the other tower) may be unused
    unread: tuple[str, ...] = ()  # prefixes of modules whose outputs the export does not read; may be missing
    supplied: frozenset[str] = frozenset()  # parameters that the adapter has; may be missing


def checked_headers(name: str) -> dict[str, StoredTensor]:
    """{name: header} of the tensors of a model folder or hub model, whose config is checked to be plausible.

    Raises:
        ExportError: a file is missing or damaged, the weights are quantized, or the config describes a larger model.
    """
    folder = model_folder(name)
    config = _raw_config(folder)
    if isinstance(quantized := config.get("quantization_config"), Mapping):
        method = quantized.get("quant_method") or "an unnamed method"
        raise ExportError(
            f"{name} has weights quantized by {method} (quantization_config in config.json), which would be "
            "quantized a second time; expected float weights. Export the original model; or save a dequantized "
            "one where its library is installed: "
            "AutoModelForCausalLM.from_pretrained(folder).dequantize().save_pretrained(other)."
        )
    if (folder / "adapter_config.json").is_file():
        raise ExportError(
            f"{name} has a model and an adapter (adapter_config.json): pass the model's folder without it as the "
            "source, and the adapter's folder with --adapter."
        )
    explicit = config.get("transformers_weights")
    headers = read_headers(_inside(folder, explicit) if explicit else _weights(folder))
    if not headers:
        raise ExportError(
            f"the weights of {name} have no named tensor at their top level; save the model with "
            "model.save_pretrained(folder)."
        )
    require_plausible(config, (stored.shape for stored in headers.values()), f"config.json of {name}")
    return headers


def load_complete(
    loader: Any, name: str, headers: Mapping[str, StoredTensor], rules: LoadRules
) -> tuple[Any, dict[str, Any]]:
    """(model in float32 with all its weights, record of the load for edgeformer.json).

    Raises:
        ExportError: a weight of the model is not in the checkpoint, or one of the checkpoint is not used.
    """
    dry_run = _dry_run(loader, name, headers, rules)
    if dry_run.report is not None:
        require_complete(dry_run.report, name, dry_run.model, rules.allow)
    safe = all(stored.file.suffix == ".safetensors" for stored in headers.values())
    more = {"key_mapping": dict(dry_run.mapping)} if dry_run.mapping else {}
    model, info = loader.from_pretrained(
        name,
        dtype=torch.float32,
        attn_implementation="eager",
        trust_remote_code=False,
        use_safetensors=safe,
        output_loading_info=True,
        **more,
    )
    notes = list(dry_run.notes)
    kept = dict(getattr(model, "all_tied_weights_keys", None) or {})
    if dry_run.report is not None and (untied := sorted(set(dry_run.report.tied) - set(kept))):
        notes.append(
            f"config.json ties {', '.join(untied)}, but the checkpoint has other values: these are used, untied"
        )
        for config in (model.config, model.config.get_text_config()):
            config.tie_word_embeddings = False
    loaded, other = _report(model, info, headers, notes, rules)
    return model, require_complete(loaded, name, type(model).__name__, rules.allow) | other


@dataclass(frozen=True)
class _DryRun:
    """The result of a load without values."""

    report: Loaded | None  # None: the class is not known before the load; then only the load itself is checked
    model: str  # the name of the class
    mapping: Mapping[str, str] = field(default_factory=dict)  # transformers' key_mapping that makes names fit
    notes: tuple[str, ...] = ()


def _dry_run(loader: Any, name: str, headers: Mapping[str, StoredTensor], rules: LoadRules) -> _DryRun:
    """Loads the headers into a model on the meta device, with the first renaming that fits, if any does."""
    cls, config = _class_of(loader, name)
    if cls is None:
        return _DryRun(None, getattr(loader, "__name__", "the model"))
    first = None
    headers = {**headers, **_extra(config, name)}
    elements = sum(math.prod(stored.shape) for stored in headers.values())
    for mapping, note in _renamings(headers):
        empty = {key: torch.empty(s.shape, dtype=s.dtype or torch.uint8, device="meta") for key, s in headers.items()}
        with construction(elements, len(headers), f"config.json of {name}"):
            model, info = cls.from_pretrained(
                None,
                config=copy.deepcopy(config),
                state_dict=empty,
                device_map={"": "meta"},
                dtype=torch.float32,
                attn_implementation="eager",
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                **({"key_mapping": mapping} if mapping else {}),
            )
        report, _ = _report(model, info, headers, [note] if note else [], rules)
        if first is None:
            rules.room(sum(parameter.numel() for parameter in model.parameters()))
            _require_float(headers, model, name)
            first = report
        if report.complete or _allowed(report, rules.allow):
            return _DryRun(report, cls.__name__, mapping, (note,) if note else ())
        if report.mismatched and not report.unexpected:
            break  # the names are right, the shapes are not
    return _DryRun(first, cls.__name__)


def _class_of(loader: Any, name: str) -> tuple[Any, Any]:
    """(model class, config) that `loader.from_pretrained(name)` would use; (None, None) where it would raise."""
    from transformers import AutoConfig
    from transformers.models.auto.auto_factory import _get_model_class

    if not hasattr(loader, "_model_mapping"):
        return loader, loader.config_class.from_pretrained(name)
    config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    if type(config) not in loader._model_mapping:
        return None, None
    cls = _get_model_class(config, loader._model_mapping)  # type: ignore[no-untyped-call]
    text = config.sub_configs.get("text_config")
    return cls, config.get_text_config() if text is not None and cls.config_class == text else config


def _extra(config: Any, name: str) -> dict[str, StoredTensor]:
    """The tensors of additional files that the config's class names, such as a separate head."""
    from transformers.utils.hub import cached_file

    found: dict[str, StoredTensor] = {}
    for file in getattr(type(config), "extra_files", ()):
        path = cached_file(name, file, _raise_exceptions_for_missing_entries=False)
        found |= read_headers(Path(path)) if path else {}
    return found


def _renamings(headers: Mapping[str, StoredTensor]) -> Iterator[tuple[dict[str, str], str]]:
    """The (key mapping, note) to try, first the unchanged names."""
    yield {}, ""
    names = list(headers)
    inside = {part for name in names for part in INNER_WRAPPERS.findall(name)}
    inner = [INNER_WRAPPERS.sub("", name) for name in names]
    base = {INNER_WRAPPERS.pattern: ""} if inside else {}
    for prefix in common_prefixes(inner):
        if prefix or inside:
            removed = " and ".join(repr(part) for part in (prefix, *sorted(inside)) if part)
            anchored = {f"^{re.escape(prefix)}": ""} if prefix else {}
            yield base | anchored, f"{removed} stripped from the names of the checkpoint"


def _report(
    model: Any, info: Mapping[str, Any], headers: Mapping[str, StoredTensor], notes: Sequence[str], rules: LoadRules
) -> tuple[Loaded, dict[str, Any]]:
    """(transformers' loading report, the names that `rules` allow to be left out, for edgeformer.json)."""
    state = model.state_dict()
    tied = dict(getattr(model, "all_tied_weights_keys", None) or {})
    unexpected = sorted(info["unexpected_keys"])
    outside: list[str] = []
    if rules.part:
        own = {name for name, _ in model.named_children()} | {name for name, _ in model.named_parameters(recurse=False)}
        base = f"{model.base_model_prefix}."
        own |= {name for name, _ in getattr(model, model.base_model_prefix or "-", model).named_children()}
        outside = [name for name in unexpected if name.removeprefix(base).partition(".")[0] not in own]
    # The report has no names that the library's own patterns ignore.
    patterns = [*(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()), r"rotary_emb\.inv_freq"]
    patterns += [r"(^|\.)position_ids$"]
    known = {*state, *(name.removeprefix(f"{model.base_model_prefix}.") for name in state)}
    ignorable = [n for n in headers if n not in known and any(re.search(p, n) for p in patterns)]
    spared = {n for n in info["missing_keys"] if n.startswith(rules.unread) or n in rules.supplied}
    loaded = Loaded(
        missing=[name for name in sorted(info["missing_keys"]) if name not in spared],
        unexpected=[name for name in unexpected if name not in set(outside)],
        mismatched=[
            Mismatch(name, tuple(found), tuple(expected))
            for name, found, expected in sorted(info["mismatched_keys"], key=lambda one: str(one[0]))
        ],
        tied=tied,
        ignorable=[name for name in ignorable if name not in info["unexpected_keys"]],
        derived=[name for name, _ in model.named_buffers() if name not in state],
        tensors=len(headers),
        stored=list(headers),
        notes=notes,
    )
    unread = sorted(name for name in spared if name not in rules.supplied)
    record = {"other_parts": outside, "unread": unread, "from_adapter": sorted(spared & rules.supplied)}
    return loaded, {key: names for key, names in record.items() if names}


def _allowed(report: Loaded, allow: Sequence[str]) -> bool:
    if report.mismatched or not allow:
        return False
    with contextlib.suppress(ExportError):
        require_complete(report, "", "", allow)
        return True
    return False


def _require_float(headers: Mapping[str, StoredTensor], model: Any, name: str) -> None:
    """Rejects integer and 8-bit float tensors that are not integer buffers: as weights they need scales."""
    whole = {key for key, value in model.named_buffers() if not value.is_floating_point()}
    ends = (".position_ids", ".num_batches_tracked", *(f".{key.rpartition('.')[2]}" for key in whole))
    bad = [
        f"{key} ({str(stored.dtype).removeprefix('torch.') if stored.dtype else 'an unknown type'})"
        for key, stored in headers.items()
        if stored.dtype not in _FLOATS and not f".{key}".endswith(ends)
    ]
    if bad:
        raise ExportError(
            f"{name} has {len(bad)} weights that are not floats: {', '.join(bad[:4])}. A quantized weight needs its "
            "scale; export the original model, or save a dequantized one."
        )


def _weights(folder: Path) -> Path:
    if not any((folder / name).is_file() for name in WEIGHT_FILES):
        others = [f.name for f in sorted(folder.iterdir()) if f.suffix in (".pt", ".pth", ".ckpt", ".bin")]
        found = f"; it has {', '.join(others[:4])}" if others else ""
        raise ExportError(
            f"{folder} has no {' or '.join(WEIGHT_FILES)}{found}. Save the model with model.save_pretrained(folder)."
        )
    return folder


def _inside(folder: Path, file: Any) -> Path:
    path = folder / str(file)
    if path.resolve().parent != folder.resolve() or not path.name.endswith(
        (".safetensors", f".safetensors{INDEX_SUFFIX}")
    ):
        raise ExportError(
            f"transformers_weights in {folder / 'config.json'} is {file!r}, expected a .safetensors file beside it."
        )
    return path


def _raw_config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ExportError(f"{folder / 'config.json'} cannot be read as JSON: {error}") from error
    if not isinstance(config, dict):
        raise ExportError(f"{folder / 'config.json'} has a {type(config).__name__}; expected an object.")
    return config


def model_folder(name: str, subfolder: str = "") -> Path:
    """The local folder of a model: `name` itself, or its folder in the hub's cache, downloaded if needed."""
    if Path(name).is_dir():
        return Path(name) / subfolder
    from transformers.utils.hub import cached_file, get_checkpoint_shard_files

    config = cached_file(name, "config.json", subfolder=subfolder)
    for file in WEIGHT_FILES:
        found = cached_file(name, file, subfolder=subfolder, _raise_exceptions_for_missing_entries=False)
        if found is not None:
            if file.endswith(INDEX_SUFFIX):
                get_checkpoint_shard_files(name, found, subfolder=subfolder)  # type: ignore[no-untyped-call]
            break
    return Path(str(config)).parent
