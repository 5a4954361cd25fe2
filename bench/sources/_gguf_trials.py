"""The trials of the GGUF sweep: the value of each key, the architecture, and the expected result."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np

# Sizes: (architecture, a value that does not fit the tensors).
SIZES: dict[str, tuple[str, Any]] = {
    "vocab_size": ("llama", 300),
    "context_length": ("llama", 128),
    "embedding_length": ("llama", 64),
    "block_count": ("llama", 3),
    "feed_forward_length": ("llama", 128),
    "attention.head_count": ("llama", 8),
    "attention.head_count_kv": ("llama", 4),
    "attention.key_length": ("qwen3", 8),
    "attention.value_length": ("qwen3", 8),
    "attention.layer_norm_epsilon": ("stablelm", 0.1),
    "attention.layer_norm_rms_epsilon": ("llama", 0.1),
    "expert_count": ("qwen3moe", 8),
    "expert_used_count": ("qwen3moe", 3),
    "expert_feed_forward_length": ("qwen3moe", 48),
    "expert_shared_feed_forward_length": ("qwen2moe", 80),
}
YARN = {
    "ARCH.rope.scaling.type": "yarn", "ARCH.rope.scaling.factor": 4.0,
    "ARCH.rope.scaling.original_context_length": 64, "ARCH.rope.freq_base": 100.0,
}  # fmt: skip
# Numbers: (architecture, value, other keys that it needs); keys that are not here are set to 3 on a Llama.
NUMBERS: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "general.architecture": ("llama", "new", {}),
    "general.type": ("llama", "adapter", {}),
    "general.alignment": ("llama", 64, {}),
    "general.license": ("llama", "mit", {}),
    "attn_logit_softcapping": ("gemma2", 0.5, {}),
    "final_logit_softcapping": ("gemma2", 0.5, {}),
    "router_logit_softcapping": ("llama", 30.0, {}),
    "attention.scale": ("gemma2", 9**-0.5, {}),
    "attention.output_scale": ("llama", 0.5, {}),
    "attention.sliding_window": ("gemma2", 3, {}),
    "attention.sliding_window_pattern": ("gemma3", [False, True], {}),
    "attention.causal": ("llama", False, {}),
    "attention.clamp_kqv": ("llama", 8.0, {}),
    "attention.max_alibi_bias": ("llama", 8.0, {}),
    "logit_scale": ("llama", 0.0625, {}),
    "embedding_scale": ("llama", 12.0, {}),
    "residual_scale": ("llama", 0.22, {}),
    "expert_weights_norm": ("qwen2moe", True, {}),
    "expert_weights_scale": ("qwen3moe", 2.5, {}),
    "expert_gating_func": ("qwen3moe", 2, {}),
    "swin_norm": ("llama", True, {}),
    "use_parallel_residual": ("llama", True, {}),
    "tensor_data_layout": ("llama", "Meta AI original pth", {}),
    "activation_sparsity_scale": ("llama", [0.5, 0.5], {}),
    "rope.dimension_count": ("stablelm", 8, {}),
    "rope.dimension_count_swa": ("llama", 4, {}),
    "rope.dimension_sections": ("llama", [2, 1, 1, 0], {}),
    "rope.freq_base": ("llama", 500000.0, {}),
    "rope.freq_base_swa": ("gemma3", 500.0, {}),
    "rope.scale_linear": ("llama", 4.0, {}),
    "rope.scaling.type": ("llama", "linear", {"ARCH.rope.scaling.factor": 4.0, "ARCH.rope.scaling.type": "none"}),
    "rope.scaling.factor": ("llama", 4.0, {}),
    "rope.scaling.alpha": ("llama", 1000.0, {}),
    "rope.scaling.attn_factor": ("llama", 1.5, {}),
    "rope.scaling.original_context_length": ("llama", 32, YARN),
    "rope.scaling.finetuned": ("llama", True, {}),
    "rope.scaling.yarn_log_multiplier": ("llama", 0.1, YARN),
    "rope.scaling.yarn_ext_factor": ("llama", 0.5, YARN),
    "rope.scaling.yarn_attn_factor": ("llama", 1.5, YARN),
    "rope.scaling.yarn_beta_fast": ("llama", 2.0, YARN),
    "rope.scaling.yarn_beta_slow": ("llama", 0.25, YARN),
    "ssm.dt_b_c_rms": ("llama", True, {}),
    "adapter.type": ("llama", "lora", {}),
}

SCORES = {
    "tokenizer.ggml.model": "llama", "tokenizer.ggml.pre": None, "tokenizer.ggml.merges": None,
    "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", "\u2581", "h", "i", "\u2581h", "hi", "<0x41>"],
    "tokenizer.ggml.token_type": [2, 3, 3, 1, 1, 1, 1, 1, 6],
    "tokenizer.ggml.scores": [0.0, 0.0, 0.0, -5.0, -6.0, -7.0, -2.0, -1.0, 0.0],
    "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.unknown_token_id": 0,
}  # fmt: skip
OTHER_SCORES = [0.0, 0.0, 0.0, -5.0, -6.0, -7.0, -1.0, -2.0, 0.0]  # "▁h" before "hi"
GGML = "tokenizer.ggml."
BOS, END, EOT, EOM = range(256, 260)


def ids(texts: Any, text: str) -> list[int]:
    from tokenizers import Tokenizer

    return list(Tokenizer.from_str(texts.files["tokenizer.json"].decode()).encode(text).ids)


def config(texts: Any) -> dict[str, Any]:
    return dict(json.loads(texts.files["tokenizer_config.json"]))


def _special(name: str, field: str) -> list[tuple[dict[str, Any], Any]]:
    key = f"{GGML}{name}_token_id"
    return [({key: EOM}, lambda t: config(t)[field] == "<|eom|>"), ({key: 10**6}, "refused")]


# Sampling settings without a field in generation_config.json.
REPORTED = frozenset(
    f"general.sampling.{name}"
    for name in (
        "sequence", "xtc_probability", "xtc_threshold", "penalty_last_n", "mirostat", "mirostat_tau", "mirostat_eta",
    )
)  # fmt: skip

# Tokenizer keys: (metadata, a check of the result or "refused").
TEXTS: dict[str, list[tuple[dict[str, Any], Callable[[Any], bool] | str]]] = {
    GGML + "model": [
        ({}, lambda t: ids(t, "th") == [260]),
        (SCORES, lambda t: ids(t, "hi") == [1, 3, 7]),
        ({GGML + "model": "t5", GGML + "merges": None}, "refused"),
        ({GGML + "model": "bert", GGML + "merges": None}, "refused"),
    ],
    GGML + "pre": [
        ({}, lambda t: len(ids(t, "123")) == 1),
        ({GGML + "pre": "smollm"}, lambda t: len(ids(t, "123")) == 3),
        ({GGML + "pre": "not-known"}, "refused"),
    ],
    GGML + "tokens": [({GGML + "tokens": ["a", "a"], GGML + "token_type": [1, 1]}, "refused")],
    GGML + "token_type": [
        ({}, lambda t: ids(t, "<|eot|>") == [EOT]),
        ({GGML + "token_type": [1] * 267}, lambda t: len(ids(t, "<|eot|>")) > 1),
        ({GGML + "token_type": [1] * 200}, "refused"),
    ],
    GGML + "scores": [
        (SCORES, lambda t: ids(t, "hi") == [1, 3, 7]),
        (SCORES | {GGML + "scores": OTHER_SCORES}, lambda t: ids(t, "hi") == [1, 6, 5]),
        (SCORES | {GGML + "scores": None}, "refused"),
    ],
    GGML + "merges": [({GGML + "merges": ["t h"]}, lambda t: ids(t, "the") == [260, *ids(t, "e")])],
    GGML + "bos_token_id": [
        ({GGML + "add_bos_token": True, GGML + "bos_token_id": EOM}, lambda t: ids(t, "a")[0] == EOM),
        ({GGML + "bos_token_id": 10**6}, "refused"),
    ],
    GGML + "eos_token_id": [({GGML + "eos_token_id": EOM}, lambda t: t.generation["eos_token_id"] == EOM)],
    GGML + "eot_token_id": [({GGML + "eot_token_id": EOT}, lambda t: t.generation["eos_token_id"] == [END, EOT])],
    GGML + "eom_token_id": [({GGML + "eom_token_id": EOM}, lambda t: t.generation["eos_token_id"] == [END, EOM])],
    GGML + "unknown_token_id": _special("unknown", "unk_token"),
    GGML + "seperator_token_id": _special("seperator", "sep_token"),
    GGML + "padding_token_id": _special("padding", "pad_token"),
    GGML + "mask_token_id": _special("mask", "mask_token"),
    GGML + "add_bos_token": [
        ({GGML + "add_bos_token": True}, lambda t: ids(t, "a")[0] == BOS),
        ({GGML + "add_bos_token": False, GGML + "pre": "llama-bpe"}, lambda t: ids(t, "a")[0] != BOS),
        ({GGML + "pre": "llama-bpe"}, lambda t: ids(t, "a")[0] == BOS),
        ({GGML + "add_bos_token": "yes"}, "refused"),
    ],
    GGML + "add_eos_token": [({GGML + "add_eos_token": True}, lambda t: ids(t, "a")[-1] == END)],
    GGML + "add_sep_token": [({GGML + "add_sep_token": True}, "refused")],
    GGML + "add_space_prefix": [
        (SCORES | {GGML + "add_space_prefix": False}, lambda t: ids(t, "hi") == [1, 7]),
        ({GGML + "add_space_prefix": True}, lambda t: ids(t, "th") == [261]),
    ],
    "tokenizer.huggingface.json": [({"tokenizer.huggingface.json": "{}"}, "refused")],
    "tokenizer.rwkv.world": [({"tokenizer.rwkv.world": "x"}, "refused")],
    "tokenizer.chat_template": [
        ({"tokenizer.chat_template": "{{ 1 }}"}, lambda t: t.files["chat_template.jinja"] == b"{{ 1 }}")
    ],
    "tokenizer.chat_template.{name}": [
        (
            {"tokenizer.chat_template": "a", "tokenizer.chat_template.tool_use": "b"},
            lambda t: {"name": "tool_use", "template": "b"} in config(t)["chat_template"],
        )
    ],
    "tokenizer.chat_templates": [
        ({"tokenizer.chat_templates": ["rag"], "tokenizer.chat_template.rag": "c"}, lambda _: True),
        ({"tokenizer.chat_templates": ["rag"]}, "refused"),
    ],
    **{
        f"general.sampling.{name}": [
            ({f"general.sampling.{name}": value}, lambda t, f=field, v=value: np.isclose(t.generation[f], v))
        ]
        for name, field, value in (
            ("temp", "temperature", 0.5), ("top_k", "top_k", 7), ("top_p", "top_p", 0.75), ("min_p", "min_p", 0.125),
            ("penalty_repeat", "repetition_penalty", 1.5),
        )
    },
    **{
        key: [({key: 1.0}, lambda t, k=key: any(f"{k} = 1.0" in note for note in t.notes))] for key in REPORTED
    },
}  # fmt: skip
