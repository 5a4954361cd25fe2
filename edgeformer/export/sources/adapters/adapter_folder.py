"""Reads a PEFT adapter folder: settings and tensors. Rejects adapters that cannot be merged.

The format is PEFT's: `adapter_config.json`, and `adapter_model.safetensors` or `adapter_model.bin`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from edgeformer.errors import ExportError, pip_install

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")  # PEFT reads the first that exists
PREFIX = "base_model.model."

# Fields of every PEFT config about the adapter's origin or training; no weight depends on them.
_BOOKKEEPING = (
    "auto_mapping", "base_model_name_or_path", "inference_mode", "lora_dropout", "peft_type", "peft_version",
    "revision", "runtime_config", "task_type",
)  # fmt: skip
_CONVERT = (
    "Convert it where it was trained: model.save_pretrained(FOLDER, path_initial_model_for_weight_conversion=INITIAL) "
    "gives a plain LoRA adapter for the original base, model.merge_and_unload().save_pretrained(FOLDER) a merged "
    'model. If SOURCE is the base as the initialization changed it, set "init_lora_weights": true in '
    f"{ADAPTER_CONFIG}."
)
# Values of init_lora_weights that change the base's weights in a way that loading cannot repeat -> the reason.
_LOST_BASES = {
    "pissa_niter": "its SVD starts from random numbers",
    "corda": "the change depends on the calibration data",
    "lora_ga": "the change depends on gradients, and PEFT leaves it out when it loads the adapter",
    "loftq": "the base became its own 4- or 8-bit quantization, which needs bitsandbytes and a GPU to repeat",
}
_METHODS = {  # methods that change no weights of the base -> what they do
    "ADAPTION_PROMPT": "it adds trained keys and values to the attention",
    "LILY": "its layers share experts that are mixed for every token",
    "POLY": "it mixes its modules by a task id, which is an input",
    "SHADOW": "it adds a second network beside the model",
    "XLORA": "it mixes other adapters for every token",
}
_INPUT_DEPENDENT = {  # settings of LoRA that make the change depend on the input, so it cannot be merged
    "alora_invocation_tokens": "it acts only on the tokens after its invocation tokens",
    "arrow_config": "it routes every token to other adapters",
    "megatron_config": "it is for layers of Megatron",
}


@dataclass(frozen=True)
class Adapter:
    """A PEFT adapter. `tensors` have the names in the file: `PREFIX` and the base's name."""

    folder: Path
    settings: Mapping[str, Any]  # adapter_config.json
    changed: Mapping[str, Any]  # settings that differ from the method's defaults and change weights
    tensors: Mapping[str, torch.Tensor]
    weights: Path  # the file of the tensors

    @property
    def method(self) -> str:
        """LoRA, DoRA, or PEFT's name of another method."""
        kind = str(self.settings["peft_type"])
        return ("DoRA" if self.settings.get("use_dora") else "LoRA") if kind == "LORA" else kind


def read_adapter(folder: Path) -> Adapter:
    """The adapter in `folder`, checked as far as possible without its base model.

    Raises:
        ExportError: the folder has no adapter, a damaged one or one that cannot be merged; or PEFT is not installed or
            too old.
    """
    settings, weights = read_adapter_config(folder), _weights(folder)
    config_class = _config_class(folder, settings)
    _refuse_unmergeable(folder, settings, config_class)
    known = {field.name for field in dataclasses.fields(config_class)}
    # An unknown setting that is off (null, false, empty) has no effect.
    if unknown := sorted(name for name, value in settings.items() if name not in known and value):
        raise ExportError(
            f"{folder / ADAPTER_CONFIG} has {', '.join(f'{name} = {settings[name]!r}' for name in unknown)}, which "
            f"PEFT {peft_version()} does not know (the adapter is from {settings.get('peft_version') or 'another'}); "
            "update peft, or remove the setting if it was not used."
        )
    defaults = {field.name: _default(field) for field in dataclasses.fields(config_class)}
    changed = {
        name: value
        for name, value in sorted(settings.items())
        if name in known and name not in _BOOKKEEPING and (value or defaults[name]) and value != defaults[name]
    }
    return Adapter(folder, settings, changed, _tensors(folder, weights), weights)


def peft_version() -> str:
    """The version of the installed PEFT.

    Raises:
        ExportError: PEFT is not installed.
    """
    try:
        import peft
    except ImportError as error:
        raise ExportError(
            f"adapters are merged by PEFT, which cannot be imported ({error}): {pip_install('peft')}"
        ) from error
    return str(peft.__version__)


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """The folder's adapter_config.json.

    Raises:
        ExportError: there is none, or it does not describe an adapter.
    """
    path = folder / ADAPTER_CONFIG
    if not folder.is_dir():
        raise ExportError(f"there is no adapter folder {folder}; download the adapter and pass its folder.")
    if not path.is_file():
        inner = sorted(found.parent.name for found in folder.glob(f"*/{ADAPTER_CONFIG}"))
        hint = (
            f"Its subfolders {', '.join(inner)} have adapters: pass one of them."
            if inner
            else "Save one with model.save_pretrained(folder)."
        )
        raise ExportError(f"{folder} is not a PEFT adapter: it has no {ADAPTER_CONFIG}. {hint}")
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ExportError(f"{path} is not JSON: {error}") from error
    if not isinstance(settings, dict) or not isinstance(settings.get("peft_type"), str):
        raise ExportError(f"{path} names no peft_type; expected a PEFT adapter's config. Save it again with PEFT.")
    return settings


def _weights(folder: Path) -> Path:
    found = next((folder / name for name in ADAPTER_WEIGHTS if (folder / name).is_file()), None)
    if found is None:
        raise ExportError(
            f"{folder} is not a PEFT adapter: it has no {' or '.join(ADAPTER_WEIGHTS)}. Save one with "
            "model.save_pretrained(folder)."
        )
    return found


def _config_class(folder: Path, settings: Mapping[str, Any]) -> Any:
    version = peft_version()
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    found = PEFT_TYPE_TO_CONFIG_MAPPING.get(settings["peft_type"])
    if found is None:
        kind = settings["peft_type"]
        raise ExportError(f"{folder} is a {kind} adapter, which PEFT {version} does not know; update peft.")
    return found


def _refuse_unmergeable(folder: Path, settings: Mapping[str, Any], config_class: Any) -> None:
    from peft import PromptLearningConfig

    kind = settings["peft_type"]
    if issubclass(config_class, PromptLearningConfig):
        raise ExportError(
            f"{folder} is a {kind} adapter: it adds trained tokens or keys and values to the input and changes no "
            "weights, so it cannot be merged. Train a LoRA adapter instead."
        )
    if kind in _METHODS:
        raise ExportError(f"{folder} is a {kind} adapter: {_METHODS[kind]}, so it cannot be merged.")
    if kind != "LORA":
        return
    init = settings.get("init_lora_weights")
    lost = next((r for n, r in _LOST_BASES.items() if isinstance(init, str) and init.startswith(n)), None)
    if lost is not None:
        raise ExportError(
            f"{folder} was trained with init_lora_weights = {init!r}, which changed the base's weights, and {lost}: "
            f"the adapter is wrong for the original base. {_CONVERT}"
        )
    for name, reason in _INPUT_DEPENDENT.items():
        if settings.get(name):
            raise ExportError(f"{folder} has {name} = {settings[name]!r}: {reason}, so it cannot be merged.")


def _tensors(folder: Path, path: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors":
            found = load_file(path)
        else:
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        raise ExportError(f"the adapter {path} cannot be read: {str(error)[:300]}") from error
    if not isinstance(found, dict) or not all(isinstance(value, torch.Tensor) for value in found.values()):
        raise ExportError(f"{path} has a {type(found).__name__}; expected named tensors, as PEFT saves them.")
    if not found:
        raise ExportError(f"the adapter {path} has no tensors; save it again, or copy the whole folder.")
    if bad := [n for n, value in found.items() if value.is_floating_point() and not torch.isfinite(value).all()]:
        raise ExportError(
            f"the adapter {folder} has NaN or infinity in {len(bad)} of {len(found)} tensors, such as {bad[0]}: its "
            "training diverged; use an earlier checkpoint."
        )
    return found


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None if field.default is dataclasses.MISSING else field.default
