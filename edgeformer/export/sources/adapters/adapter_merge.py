"""Merges an adapter with PEFT and checks that the merged model gives the same results as the unmerged one.

PEFT is the reference for the meaning of every setting, so it does the merging. This module rejects what PEFT ignores
silently: unused tensors, missing weights, a base that the initialization changes at random, and methods whose merged
weights are a different function.
"""

from __future__ import annotations

import contextlib
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from edgeformer.bundle.signature import F32
from edgeformer.errors import ExportError, ParityError
from edgeformer.export.check import parity
from edgeformer.export.quiet import quiet
from edgeformer.export.sources.adapters.adapter_folder import ADAPTER_CONFIG, PREFIX, Adapter

Probe = Callable[[], Mapping[str, F32]]  # the model's outputs for fixed inputs
_NAME = "default"  # PEFT's name of a single adapter
_SHAPES = re.compile(r"size mismatch for (\S+): \D+(\[[\d, ]*\])\)\D+(\[[\d, ]*\])")  # of load_state_dict
_WRAPS = (".base_layer", ".original_module", ".modules_to_save", ".token_adapter")
# Values of init_lora_weights that change the base by a decomposition of its own weights: loading repeats that up to
# rounding. KaSA does so too. No other method of PEFT 0.21 changes the base when it is loaded.
_REPEATABLE = ("pissa", "olora")


@dataclass(frozen=True)
class Merged:
    """The result of a merge."""

    layers: int  # adapted by PEFT
    whole: int  # parameters of the base that the adapter replaced
    notes: list[str]  # for the manifest

    @property
    def words(self) -> str:
        """For example "6 layers, 2 whole parameters"."""
        counted = f"{self.layers} layer{'s' if self.layers != 1 else ''}"
        return counted + (f", {self.whole} whole parameters" if self.whole else "")


def merge(module: torch.nn.Module, adapter: Adapter, probe: Probe) -> Merged:
    """Merges the adapter into the module in place. `probe` runs the model that contains the module.

    Raises:
        ExportError: the adapter does not fit the module, or cannot be merged into its weights.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    notes = _resize(module, adapter)
    plain = probe()
    with quiet():
        wrapped, base_changed = _inject(module, adapter)
    module.eval()
    if base_changed:
        notes.append(_changed_note(adapter, base_changed))
    layers = sum(isinstance(part, BaseTunerLayer) for part in module.modules())
    whole = len(_whole(module, adapter))
    unmerged = probe()
    _untie(module)
    with quiet():
        _merge(wrapped, adapter)
    module.eval()
    try:
        check = parity.compare_outputs("merged adapter", unmerged, merged := probe())
    except ParityError as error:
        raise ExportError(
            f"the outputs of the model with the adapter {adapter.folder} are not finite: {error}"
        ) from error
    if not check.worst <= parity.TOLERANCE:
        raise ExportError(
            f"{adapter.method} of {adapter.folder} cannot be merged: PEFT's merged model differs from its unmerged one "
            f"by {check.worst:.1e} of the outputs' range, allowed {parity.TOLERANCE:.0e} "
            f"({_changed_settings(adapter)})."
        )
    if parity.compare_outputs("adapter", plain, merged).worst == 0 and not base_changed:
        notes.append(f"The adapter {adapter.folder.name} changes no output: it was saved before training.")
    return Merged(layers, whole, notes)


def base_name(name: str) -> str:
    """The base's name of a tensor, from its name in the adapter file or in PEFT's wrapped model."""
    name = name.removeprefix(PREFIX)
    for wrap in _WRAPS:
        name = name.replace(f"{wrap}.{_NAME}.", ".").replace(f"{wrap}.", ".")
    return name


def _whole(module: torch.nn.Module, adapter: Adapter) -> list[str]:
    """Names in the adapter's file of the parameters of the base that it replaces."""
    names = {base_name(name) for name, _ in module.named_parameters(remove_duplicate=False)}
    return [name for name in adapter.tensors if base_name(name) in names]


def _inject(module: torch.nn.Module, adapter: Adapter) -> tuple[Any, list[str]]:
    """(PEFT's model around the module with the adapter's tensors, weights of the base that its init changed)."""
    from peft import PeftConfig, PeftModel
    from peft.auto import MODEL_TYPE_TO_PEFT_MODEL_MAPPING

    folder = str(adapter.folder)
    configs = {id(part.config): part.config for part in module.modules() if hasattr(part, "config")}
    before = {name: (parameter, _checksum(parameter)) for name, parameter in module.named_parameters()}
    try:
        with torch.random.fork_rng(devices=[]):
            config = PeftConfig.from_pretrained(folder)
            config.inference_mode = True
            kind = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(config.task_type, PeftModel)
            wrapped = kind(module, config, _NAME)
            changed = [name for name, (parameter, old) in before.items() if _checksum(parameter) != old]
            del before
            mapping = getattr(module, "_checkpoint_conversion_mapping", None)
            result = wrapped.load_adapter(folder, _NAME, torch_device="cpu", key_mapping=mapping)
    except Exception as error:
        raise ExportError(_misfit(module, adapter, error)) from error
    if changed:
        _require_repeatable(adapter, changed)
    state = wrapped.state_dict()
    taken = {value.data_ptr() for name, value in state.items() if name not in result.missing_keys}
    missing = [name for name in result.missing_keys if state[name].data_ptr() not in taken]  # tied tensors count once
    unexpected = [name for name in result.unexpected_keys if not _is_copy(name.replace(f".{_NAME}", ""), adapter)]
    if unexpected or missing:
        raise ExportError(_left_over(module, adapter, unexpected, missing))
    if adapter.settings.get("layer_replication"):
        _share_config(module, list(configs.values()))
    return wrapped, changed


def _is_copy(name: str, adapter: Adapter) -> bool:
    """Whether the file has the same tensor under another name too: PEFT saves resized or tied embeddings twice."""
    value = adapter.tensors.get(name)
    if value is None or not any(f"{wrap}." in name for wrap in _WRAPS):
        return False
    return any(n != name and v.shape == value.shape and torch.equal(v, value) for n, v in adapter.tensors.items())


def _share_config(module: torch.nn.Module, configs: Sequence[Any]) -> None:
    """Gives replicated layers, which are copies with copied configs, the model's config: it selects the attention."""
    for part in module.modules():
        same = [config for config in configs if type(config) is type(getattr(part, "config", None))]
        if len(same) == 1:
            setattr(part, "config", same[0])  # noqa: B010 (torch types attributes of a module as tensors)


def _checksum(parameter: torch.Tensor) -> int:
    values = parameter.detach().contiguous().reshape(-1)
    return zlib.crc32(memoryview(values.view(torch.uint8).numpy())) if values.numel() else 0  # type: ignore[arg-type]


def _require_repeatable(adapter: Adapter, changed: Sequence[str]) -> None:
    if adapter.settings.get("init_lora_weights") in _REPEATABLE or adapter.settings.get("kasa_config"):
        return
    raise ExportError(
        f"loading the adapter {adapter.folder} changes {len(changed)} weights of the base, such as {changed[0]}, in a "
        f"way that is not known to repeat ({_changed_settings(adapter)}). Merge it where it was trained: "
        "model.merge_and_unload().save_pretrained(FOLDER), and export that."
    )


def _changed_note(adapter: Adapter, changed: Sequence[str]) -> str:
    setting = "kasa_config" if adapter.settings.get("kasa_config") else "init_lora_weights"
    return (
        f"The adapter's {setting} = {adapter.settings[setting]!r} changes {len(changed)} weights of the base before "
        "the adapter is added, as PEFT does when it loads the adapter. That is right for the original base model and "
        "wrong for one that was saved after that change."
    )


def _resize(module: torch.nn.Module, adapter: Adapter) -> list[str]:
    """Resizes the embeddings to the adapter's number of rows; the adapter must have every new row. Returns notes."""
    embedding = _embedding(module)
    if embedding is None:
        return []
    names = {name for name, part in module.named_modules() if part is embedding}
    stored = {base_name(name): value for name, value in adapter.tensors.items()}
    found = next((stored[f"{name}.weight"] for name in names if f"{name}.weight" in stored), None)
    if found is None or found.ndim != 2 or found.shape[1] != embedding.weight.shape[1]:
        return []  # PEFT rejects it when it loads the adapter
    old, new = int(embedding.weight.shape[0]), int(found.shape[0])
    if old == new:
        return []
    shapes = {name: parameter.shape for name, parameter in module.named_parameters(remove_duplicate=False)}
    with quiet():
        module.resize_token_embeddings(new, mean_resizing=False)  # type: ignore[operator]
    parameters = dict(module.named_parameters(remove_duplicate=False))
    grown = {name: value for name, value in parameters.items() if value.shape != shapes.get(name)}
    supplied = {value.data_ptr() for name, value in grown.items() if name in stored}
    if lost := [name for name, value in grown.items() if value.data_ptr() not in supplied]:
        raise ExportError(
            f"the adapter {adapter.folder} was trained with {new} token embeddings, the base has {old}, and the new "
            f"rows of {', '.join(lost)} are not in the adapter. Save it with save_embedding_layers=True."
        )
    return [f"The embeddings have {new} rows as in the adapter {adapter.folder.name}; the base has {old}."]


def _embedding(module: torch.nn.Module) -> torch.nn.Embedding | None:
    with contextlib.suppress(AttributeError, NotImplementedError):
        found = module.get_input_embeddings()  # type: ignore[operator]
        return found if isinstance(found, torch.nn.Embedding) else None
    return None


def _untie(module: torch.nn.Module) -> None:
    """Copies every adapted weight that another module shares: merging would change both."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    owners: dict[int, list[tuple[torch.nn.Module, str, str]]] = {}
    for name, part in module.named_modules():
        for key, parameter in part.named_parameters(recurse=False):
            owners.setdefault(id(parameter), []).append((part, key, name))
    adapted = {id(p) for part in module.modules() if isinstance(part, BaseTunerLayer) for p in _base_parameters(part)}
    for identity, places in owners.items():
        if identity in adapted and len(places) > 1:
            for part, key, _ in places[1:]:
                old = getattr(part, key)
                setattr(part, key, torch.nn.Parameter(old.detach().clone(), requires_grad=False))


def _base_parameters(layer: Any) -> Iterator[torch.nn.Parameter]:
    base = layer.get_base_layer()
    return iter(base.parameters(recurse=False)) if isinstance(base, torch.nn.Module) else iter(())


def _merge(wrapped: Any, adapter: Adapter) -> None:
    config = wrapped.peft_config[_NAME]
    if getattr(config, "layer_replication", None):
        config.layer_replication = None  # PEFT rejects it because replicas share weights; `_untie` has copied them
    try:
        with torch.no_grad():
            wrapped.merge_and_unload(safe_merge=True)
    except Exception as error:
        raise ExportError(
            f"{adapter.method} of {adapter.folder} cannot be merged: {_first(error)} ({_changed_settings(adapter)})"
        ) from error


def _misfit(module: torch.nn.Module, adapter: Adapter, error: Exception) -> str:
    reason = f"it has no {error.args[0]!r}." if isinstance(error, KeyError) and error.args else _first(error)
    if shapes := _SHAPES.findall(str(error)):
        name, found, expected = shapes[0]
        more = f", and so {len(shapes) - 1} more" if len(shapes) > 1 else ""
        name = name.removeprefix(PREFIX)
        reason = f"size mismatch: {name} is {found}, the base and {ADAPTER_CONFIG} need {expected}{more}."
    return f"the adapter {adapter.folder} does not fit {type(module).__name__}: {reason} {_advice(adapter)}"


def _left_over(module: torch.nn.Module, adapter: Adapter, unexpected: list[str], missing: list[str]) -> str:
    problems = []
    if unexpected:
        problems.append(f"{_tensors(unexpected)} that {type(module).__name__} has no parameter for")
    if missing:
        problems.append(f"not {_tensors(missing)} that its {ADAPTER_CONFIG} needs")
    return f"the adapter {adapter.folder} has {', and '.join(problems)}. {_advice(adapter)} Or the file is incomplete."


def _tensors(names: Sequence[str]) -> str:
    return f"{len(names)} tensor{'s' if len(names) > 1 else ''} ({names[0]}{', ...' if len(names) > 1 else ''})"


def _advice(adapter: Adapter) -> str:
    base, task = adapter.settings.get("base_model_name_or_path"), adapter.settings.get("task_type")
    trained = f"It was trained on {base}" if base else "It was trained on another model"
    if task in ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS"):
        return (
            f"{trained} for {task}: pass the class with that head with --architecture, and give the base's config.json "
            "as many labels (id2label) as the adapter's head has."
        )
    return f"{trained}: use that base."


def _changed_settings(adapter: Adapter) -> str:
    return ", ".join(f"{name} = {value!r}" for name, value in adapter.changed.items())[:300]


def _first(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text[:400] + ("" if text.endswith(".") else ".")
