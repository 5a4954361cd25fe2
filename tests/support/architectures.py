"""Tiny random causal language models of transformers, by name. Nothing about them stands in the product's code."""

from __future__ import annotations

import torch
import transformers

_COMMON = {
    "vocab_size": 120,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
CONFIGS = {
    "qwen3": {**_COMMON, "head_dim": 16},
    "gemma2": {**_COMMON, "head_dim": 16, "sliding_window": 4},
    "gpt2": {
        "vocab_size": 120, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128, "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "phi3": _COMMON,
    "gpt_neox": {key: value for key, value in _COMMON.items() if key != "num_key_value_heads"},
    "opt": {**_COMMON, "ffn_dim": 96, "word_embed_proj_dim": 64},
    "olmo2": _COMMON,
    "mistral": {**_COMMON, "head_dim": 16, "sliding_window": 5},
}  # fmt: skip


def make(name: str) -> torch.nn.Module:
    """A model of that architecture with seeded random weights, large enough for every part to show in the logits."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(name, **CONFIGS[name])
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model
