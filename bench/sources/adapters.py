"""PEFT adapters: every field of LoraConfig, every initialization, every other method."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np
import peft
import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from bench.sources._adapters import F32, IDS, Trained, Try, edit, quiet, reload, train
from bench.sources.row import Outcome, Row
from edgeformer.errors import ExportError

TITLE = "Adapters"
ABOUT = (
    "The fields of `peft.LoraConfig`, the values of its `init_lora_weights`, and the methods of `peft.PeftType`. "
    "Each is set for a tiny adapter, which is trained (one random step) and saved; the reference is the logits of "
    "that model in memory, neither merged nor reloaded. A field is irrelevant if PEFT gives the same logits "
    "without it. A setting that cannot be trained on this machine is written into the saved "
    "`adapter_config.json`."
)
TESTS = (
    "tests/export/sources/test_lora.py, tests/export/sources/test_adapters.py, "
    "tests/export/sources/test_adapter_folders.py"
)
_REFERENCE = "PEFT, unmerged"
# A merged matrix rounds W + s B A once, the unmerged model rounds two products and their sum in each layer: about ten
# roundings of 2^-24 of a value, which norms propagate. 1e-5 of the range is far above that, and far below the effect of
# a setting (1e-2 and more).
_BOUND = 1e-5

_BLOCKS = {"target_modules_bd_a": ["q_proj"], "target_modules_bd_b": ["v_proj"], "nblocks": 2}
_BOTH_ENDS = {"target_modules": ["embed_tokens", "lm_head"]}
FIELDS: dict[str, Try] = {
    "task_type": Try({"task_type": "FEATURE_EXTRACTION"}),
    "peft_type": Try(forged={"peft_type": "NO_SUCH_METHOD"}),
    "auto_mapping": Try(forged={"auto_mapping": {"base_model_class": "X", "parent_library": "y"}}),
    "peft_version": Try(forged={"peft_version": "0.1.0"}),
    "base_model_name_or_path": Try(forged={"base_model_name_or_path": "someone/else"}),
    "revision": Try(forged={"revision": "abc"}),
    "inference_mode": Try(forged={"inference_mode": False}),
    "r": Try({"r": 2}),
    "target_modules": Try({"target_modules": "all-linear"}),
    "exclude_modules": Try({"exclude_modules": ["v_proj"]}),
    "lora_alpha": Try({"lora_alpha": 16}),
    "lora_dropout": Try({"lora_dropout": 0.3}),
    "fan_in_fan_out": Try({"target_modules": ["c_attn"], "fan_in_fan_out": True}, base="conv1d"),
    "bias": Try({"bias": "all"}),
    "use_rslora": Try({"use_rslora": True}),
    "modules_to_save": Try({"modules_to_save": ["lm_head", "embed_tokens"]}),
    "init_lora_weights": Try({"init_lora_weights": "olora"}),
    "layers_to_transform": Try({"layers_to_transform": [1]}),
    "layers_pattern": Try({"layers_to_transform": [1], "layers_pattern": "layers"}),
    "rank_pattern": Try({"rank_pattern": {"q_proj": 2}}),
    "alpha_pattern": Try({"alpha_pattern": {"layers.1.self_attn.q_proj": 3}}),
    "megatron_config": Try(forged={"megatron_config": {"tensor_model_parallel_size": 1}}),
    "megatron_core": Try(forged={"megatron_core": "megatron.other"}),
    "trainable_token_indices": Try({"trainable_token_indices": [5, 9]}),
    "loftq_config": Try(forged={"loftq_config": {"loftq_bits": 4}}),
    "eva_config": Try(forged={"eva_config": {"rho": 1.0}}),
    "corda_config": Try(forged={"corda_config": {"corda_method": "kpm"}}),
    "lora_ga_config": Try(forged={"lora_ga_config": {"direction": "ArBr"}}),
    "use_dora": Try({"use_dora": True}),
    "velora_config": Try({"velora_config": {"num_groups": 4}}),
    "alora_invocation_tokens": Try({"alora_invocation_tokens": [33, 2]}),
    "use_qalora": Try({"use_qalora": True, "qalora_group_size": 8}),
    "qalora_group_size": Try({"qalora_group_size": 8}),
    "monteclora_config": Try({"monteclora_config": {"num_samples": 2}}),
    "layer_replication": Try({"layer_replication": [[0, 2], [0, 2]]}),
    "runtime_config": Try(forged={"runtime_config": {"ephemeral_gpu_offload": True}}),
    "lora_bias": Try({"lora_bias": True}),
    "target_parameters": Try({"target_parameters": ["mlp.experts.down_proj"]}, base="experts"),
    "use_bdlora": Try({"use_bdlora": _BLOCKS}),
    "arrow_config": Try(forged={"arrow_config": {"top_k": 2}}),
    "kasa_config": Try({"kasa_config": {}}),
    "ensure_weight_tying": Try(_BOTH_ENDS | {"ensure_weight_tying": True}, base="tied"),
}  # fmt: skip
INITS: dict[str, Try] = {
    **{name: Try({"init_lora_weights": name}) for name in ("gaussian", "orthogonal", "olora", "pissa", "mica")},
    "pissa_niter_[number of iters]": Try({"init_lora_weights": "pissa_niter_2"}),
    **{name: Try(forged={"init_lora_weights": name}) for name in ("eva", "corda", "loftq", "lora_ga")},
}
_VIRTUAL = {"num_virtual_tokens": 3}
METHODS: dict[str, dict[str, Any]] = {  # settings that a method needs to be tried; the others need none
    "PROMPT_TUNING": _VIRTUAL, "P_TUNING": _VIRTUAL, "PREFIX_TUNING": _VIRTUAL, "CARTRIDGE": _VIRTUAL,
    "MULTITASK_PROMPT_TUNING": _VIRTUAL | {"num_tasks": 2},
    "CPT": {"cpt_token_ids": [1, 2], "cpt_mask": [1, 1], "cpt_tokens_type_mask": [1, 2]},
    "ADALORA": {"total_step": 10},
    "ADAPTION_PROMPT": {"target_modules": None, "adapter_len": 2, "adapter_layers": 2},
    "IA3": {"target_modules": ["q_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    "LN_TUNING": {"target_modules": ["input_layernorm"]},
    "TRAINABLE_TOKENS": {"target_modules": ["embed_tokens"], "token_indices": [5, 9]},
    "BOFT": {"boft_block_size": 4}, "OFT": {"r": 0, "oft_block_size": 4}, "C3A": {"block_size": 8},
    "VBLORA": {"vector_length": 4, "num_vectors": 8, "topk": 2}, "FOURIERFT": {"n_frequency": 20},
    "ROAD": {"group_size": 8}, "WAVEFT": {"n_frequency": 20}, "ADAMSS": {"num_subspaces": 2, "subspace_rank": 1},
}  # fmt: skip


def settings() -> list[str]:
    """`field` and `init_lora_weights="value"` of LoraConfig, and `peft_type="METHOD"`."""
    values = [v for hint in get_args(get_type_hints(peft.LoraConfig)["init_lora_weights"]) for v in get_args(hint)]
    if "lora_ga" not in values:
        values.append("lora_ga")  # supported by PEFT, but not in the field's type
    return [
        *(field.name for field in dataclasses.fields(peft.LoraConfig)),
        *(f'init_lora_weights="{value}"' for value in values),
        *(f'peft_type="{kind.value}"' for kind in peft.PeftType),
    ]


def tries() -> dict[str, Try]:
    """{setting: trial} for `settings()`."""
    methods = {kind: Try(METHODS.get(kind, {}), kind=kind) for kind in PEFT_TYPE_TO_CONFIG_MAPPING if kind != "XLORA"}
    return {
        **FIELDS,
        **{f'init_lora_weights="{value}"': tried for value, tried in INITS.items()},
        **{f'peft_type="{kind.value}"': methods.get(kind.value, Try()) for kind in peft.PeftType},
        'peft_type="XLORA"': Try(forged={"peft_type": "XLORA", "hidden_size": 32, "adapters": {"a": "a"}}),
    }


def rows(work: Path) -> Iterator[Row]:
    """One row per setting."""
    tried = tries()
    for index, name in enumerate(settings()):
        if name in tried:
            yield _row(name, tried[name], work, f"adapter-{index}")


def _row(name: str, tried: Try, work: Path, place: str) -> Row:
    shown = dict(tried.forged or tried.options)
    value = ", ".join(f"{key} = {value!r}" for key, value in shown.items()) or "its defaults"
    try:
        trained = train(tried, work, place)
    except Exception as error:
        return Row(name, "irrelevant", f"{value}: PEFT cannot make one here: {_first(error)}", _REFERENCE)
    try:
        found = exported(trained)
    except ExportError as error:
        return Row(name, "refused", f"{value}: {_first(error).replace(str(trained.folder), 'it')}", _REFERENCE)
    span = float(trained.logits.max() - trained.logits.min())
    off = float(np.abs(found - trained.logits).max()) / span
    outcome: Outcome = "honoured" if off <= _BOUND else "ignored"
    seen = f"off by {off:.1e} of the range"
    if outcome == "ignored":
        seen += f"; PEFT's own reload: {_reloaded(trained, span)}"
    elif name in FIELDS and (effect := _effect(trained, name, work / f"{place}-without", span)) == 0:
        outcome, seen = "irrelevant", f"{seen}; PEFT gives the same logits without the setting"
    elif name in FIELDS:
        seen += f"; without the setting {effect}"
    return Row(name, outcome, f"{value}: {seen}", _REFERENCE)


def exported(trained: Trained) -> F32:
    """The logits of the source's module."""
    from edgeformer.export import ExportOptions
    from edgeformer.export.sources.load import load_source

    with quiet():
        source = load_source(ExportOptions(str(trained.base), trained.folder / "none", adapter=trained.folder))
        with torch.no_grad():
            found: F32 = source.module(torch.tensor([IDS])).logits[0].numpy()
    return found


def _reloaded(trained: Trained, span: float) -> str:
    try:
        return f"off by {float(np.abs(reload(trained, seed=5) - trained.logits).max()) / span:.1e}"
    except Exception as error:
        return _first(error)


def _effect(trained: Trained, name: str, place: Path, span: float) -> str | int:
    """The change of PEFT's logits if the field has its default; 0 if they stay the same."""
    field = next(field for field in dataclasses.fields(peft.LoraConfig) if field.name == name)
    default = field.default if field.default is not dataclasses.MISSING else None
    if name == "peft_type":
        return "nothing is an adapter"
    shutil.copytree(trained.folder, place)
    edit(place, {name: default})
    try:
        off = float(np.abs(reload(dataclasses.replace(trained, folder=place), 5) - trained.logits).max()) / span
    except Exception as error:
        return f"PEFT raises {type(error).__name__}"
    return f"{off:.1e}" if off > _BOUND else 0


def _first(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:240]}"
