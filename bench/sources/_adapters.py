"""Tiny base models and trained adapters for the sweep over PEFT's settings."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
import transformers
from numpy.typing import NDArray
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

F32 = NDArray[np.float32]
IDS = [1, 5, 9, 33, 2, 40, 17]
_LLAMA = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 64, "max_position_embeddings": 64, "attention_bias": True, "pad_token_id": 0,
}  # fmt: skip
BASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", _LLAMA),
    "tied": ("llama", _LLAMA | {"tie_word_embeddings": True}),
    "experts": ("qwen3_moe", _LLAMA | {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2,
                                       "moe_intermediate_size": 16, "decoder_sparse_step": 1}),
    "conv1d": ("gpt2", {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}),
}  # fmt: skip


@dataclass(frozen=True)
class Try:
    """The value of one setting, and other settings that it needs."""

    options: Mapping[str, Any] = field(default_factory=dict)  # of the config class
    base: str = "llama"
    kind: str = "LORA"
    forged: Mapping[str, Any] = field(default_factory=dict)  # written into adapter_config.json of a trained adapter


@dataclass(frozen=True)
class Trained:
    """An adapter folder and its base's folder, and the logits of the model in memory when it was saved.

    Where the method runs on token ids alone, that is; else the logits are NaN, and no merge can be right.
    """

    base: Path
    folder: Path
    logits: F32


def base_folder(name: str, work: Path) -> Path:
    """A saved base model of `BASES`, made once in `work`."""
    folder = work / f"base-{name}"
    if not folder.exists():
        kind, settings = BASES[name]
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(kind, **settings))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.05)
        with quiet():
            model.save_pretrained(folder)
    return folder


def load(folder: Path) -> Any:
    """The base model in float32, in eval mode."""
    with quiet():
        return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def logits(model: Any) -> F32:
    """The logits of `IDS`, [len(IDS), vocabulary]."""
    with torch.no_grad():
        found: F32 = model(torch.tensor([IDS])).logits[0].float().numpy()
    return found


def train(tried: Try, work: Path, name: str) -> Trained:
    """A random step instead of training: every trainable weight changes, so each affects the logits."""
    base = base_folder(tried.base, work)
    config_class = PEFT_TYPE_TO_CONFIG_MAPPING[tried.kind]
    known = {field.name for field in dataclasses.fields(config_class)}
    options: dict[str, Any] = {"task_type": "CAUSAL_LM", **defaults(known), **tried.options}
    torch.manual_seed(1)
    with quiet():
        model = peft.get_peft_model(load(base), config_class(**options)).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad and parameter.is_floating_point():
                    parameter.add_(torch.randn_like(parameter) * 0.05)
        try:
            found = logits(model)
        except Exception:  # for example without task ids
            found = np.full((len(IDS), 1), np.nan, np.float32)
        folder = work / name
        model.save_pretrained(folder)
    if tried.forged:
        edit(folder, tried.forged)
    return Trained(base, folder, found)


def defaults(known: set[str]) -> dict[str, Any]:
    """The settings that the tiny adapters share, if their config class has them."""
    common = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
    return {name: value for name, value in common.items() if name in known}


def edit(folder: Path, settings: Mapping[str, Any]) -> None:
    """Writes `settings` into the folder's adapter_config.json."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | dict(settings)))


def reload(trained: Trained, seed: int) -> F32:
    """PEFT's logits of the saved adapter, not merged."""
    torch.manual_seed(seed)
    with quiet():
        return logits(peft.PeftModel.from_pretrained(load(trained.base), str(trained.folder)).eval())


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silences warnings and progress bars."""
    from transformers.utils import logging as bars

    bars.disable_progress_bar()
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
