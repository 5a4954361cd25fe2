"""Tiny random models of transformers' causal architectures, each from its own config class, by names of fields."""

from __future__ import annotations

import inspect
from typing import Any

LARGEST = 120_000_000  # parameters
POSITIONS = 256  # more than the longest prompt and its answer; calibration uses half

# What every config is shrunk to, by its own names of fields.
SIZES: dict[str, Any] = {
    "vocab_size": 120, "hidden_size": 64, "d_model": 64, "n_embd": 64, "dim": 64, "emb_dim": 64, "hidden_dim": 64,
    "n_embed": 64, "embedding_size": 64, "word_embed_proj_dim": 64, "input_embedding_size": 64,
    "num_hidden_layers": 2, "n_layer": 2, "n_layers": 2, "num_layers": 2, "decoder_layers": 2, "encoder_layers": 2,
    "num_decoder_layers": 2, "num_encoder_layers": 2,
    "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_heads": 4, "decoder_attention_heads": 4,
    "encoder_attention_heads": 4, "num_decoder_attention_heads": 4, "num_encoder_attention_heads": 4,
    "num_key_value_heads": 2, "num_kv_heads": 2, "head_dim": 16, "d_kv": 16, "attention_head_dim": 16, "d_head": 16,
    "global_head_dim": 16, "num_global_key_value_heads": 2, "kv_channels": 16,
    "swa_head_dim": 16, "swa_v_head_dim": 16, "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2,
    "intermediate_size": 96, "ffn_dim": 96, "d_ff": 96, "decoder_ffn_dim": 96, "encoder_ffn_dim": 96, "n_inner": 96,
    "ffn_hidden_size": 96, "d_inner": 96, "dim_ff": 96, "dff": 96, "intermediate_size_mlp": 96,
    "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32, "expert_ffn_hidden_size": 32,
    "moe_ffn_hidden_size": 32, "shared_intermediate_size": 32, "dense_intermediate_size": 96,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2,
    "moe_topk": 2, "moe_top_k": 2, "moe_k": 2, "top_k_experts": 2, "num_experts_per_token": 2, "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1, "num_dense_layers": 1, "zero_expert_num": 1,
    "kv_lora_rank": 32, "q_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "qk_head_dim": 32,
    "v_head_dim": 16, "o_lora_rank": 32, "index_head_dim": 16, "index_n_heads": 2, "index_topk": 64,
    "max_position_embeddings": POSITIONS, "n_positions": POSITIONS, "max_seq_len": POSITIONS, "n_ctx": POSITIONS,
    "max_sequence_length": POSITIONS, "seq_length": POSITIONS, "max_target_positions": POSITIONS,
    "sliding_window": 6, "attention_chunk_size": 6, "attention_window": 6, "sliding_window_size": 6, "window_size": 6,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "decoder_start_token_id": 1, "sep_token_id": 2,
    "hidden_dropout": 0.0, "attention_dropout": 0.0, "dropout": 0.0, "activation_dropout": 0.0,
    "hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": 120, "num_kv_shared_layers": 0,
    "image_size": 32, "patch_size": 8, "unpadded_vocab_size": 120,
    "laurel_rank": 8, "type_vocab_size": 1, "rotary_dim": 8, "max_window_layers": 1,
}  # fmt: skip

INDEXER = {
    "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 64,
    "indexer_compress_ratio": 4,
}  # fmt: skip
# Where the fields of one config depend on each other in a way that their names do not say.
OVERRIDES: dict[str, dict[str, Any]] = {
    "xglm": {"attention_heads": 4},
    "gemma3n_text": {"intermediate_size": 96},  # a list by default, one 16,384 a layer
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "mpt": {"expansion_ratio": 2},
    "reformer": {"axial_pos_shape": [16, 16], "axial_pos_embds_dim": [32, 32]},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8},
        "ffn_config": {"hidden_size": 64, "ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "norm_topk_prob": True, "num_experts_per_tok": 2},
    "hunyuan_v1_dense": {"head_dim": 16}, "hunyuan_v1_moe": {"head_dim": 16, "moe_topk": [2, 2], "num_experts": 4},
    "ministral": {"head_dim": 16}, "nemotron": {"head_dim": 16, "num_key_value_heads": 2},
    "roc_bert": {"pronunciation_vocab_size": 30, "shape_vocab_size": 30},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "mamba2": {"num_heads": 8, "head_dim": 16}, "zaya": {"num_experts_per_tok": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "blt": {
        "encoder_hash_byte_group_vocab": 200, "encoder_config": {"hidden_size_global": 64},
        "decoder_config": {"hidden_size_global": 64},
    },
    "zamba": {"layer_types": ["linear_attention", "hybrid"] * 2, "num_hidden_layers": 4},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"]},
    "moshi": {"audio_vocab_size": 64},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [3, 3, 2]},
            "full_attention": None,
        },
    },
    "qwen4_exp_text": INDEXER, "qwen4_exp": {"text_config": INDEXER},
    "dory": {
        "num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2, "n_input_layers": 1,
        "n_output_layers": 1,
    },
    "inkling2_loop_text": {
        "loop_layer_index_start": 1, "loop_layer_index_end": 2, "n_layers_per_attn_res_block": 1,
    },
}  # fmt: skip


def names() -> list[str]:
    """All model types that transformers has a causal language model for."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def tiny(name: str) -> Any:
    """A model of this type with seeded random weights, large enough for every part to show in the logits."""
    import torch
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    torch.manual_seed(0)
    named = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[name]
    class_name = named if isinstance(named, str) else named[0]
    config = _config(transformers.CONFIG_MAPPING[name], OVERRIDES.get(name, {}))
    cls = getattr(transformers, class_name)
    if config.__class__ is not cls.config_class:  # the language model is a part of it
        parts = (getattr(config, part, None) for part in getattr(config, "sub_configs", ()))
        config = next((part for part in parts if isinstance(part, cls.config_class)), config)
    with torch.device("meta"):
        count = sum(p.numel() for p in cls._from_config(config).parameters())
    if count > LARGEST:
        raise ValueError(f"the config is still {count:,} parameters large after shrinking")
    torch.manual_seed(0)
    model = cls._from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.copy_(torch.nan_to_num(parameter, 0.0, 0.0, 0.0).clamp(-3, 3))
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def _peek(config: Any, field: str) -> Any:
    """The field's value; some configs raise where it differs from layer to layer, and then it is set for all."""
    try:
        return getattr(config, field, None)
    except Exception:
        return 0


def _config(config_class: Any, overrides: dict[str, Any]) -> Any:
    default = config_class()
    parts = getattr(default, "sub_configs", None) or {}
    chosen: dict[str, Any] = {}
    known = set(default.to_dict()) | set(inspect.signature(config_class.__init__).parameters)
    known |= set(getattr(default, "attribute_map", {}))
    for field, value in SIZES.items():
        before = _peek(default, field)
        if field in known and before is not None and not isinstance(before, (list, dict, bool)):
            chosen[field] = value
    if (_peek(default, "num_key_value_heads") or 0) == _peek(default, "num_attention_heads"):
        chosen["num_key_value_heads"] = 4
    if _peek(default, "num_key_value_heads") == 1:
        chosen["num_key_value_heads"] = 1
    if "is_decoder" in known or not getattr(default, "is_encoder_decoder", False):
        chosen["is_decoder"] = True
    kinds = getattr(default, "layer_types", None)
    fields = ("layer_types", "layers_block_type")
    derived = any(isinstance(inspect.getattr_static(config_class, name, None), property) for name in fields)
    if isinstance(kinds, list) and kinds and not derived:
        unique = list(dict.fromkeys(kinds))
        chosen["layer_types"] = unique if len(unique) > 1 else unique * 2
        chosen["num_hidden_layers"] = len(chosen["layer_types"])
        mlp = getattr(default, "mlp_layer_types", None)
        if isinstance(mlp, list) and mlp:
            both = list(dict.fromkeys(mlp))
            chosen["mlp_layer_types"] = [both[min(i, len(both) - 1)] for i in range(chosen["num_hidden_layers"])]
    for part, part_class in parts.items():
        value = getattr(default, part, None)
        if hasattr(value, "model_type"):  # what the default holds, where the class only says "any config"
            part_class = part_class if hasattr(part_class, "model_type") else type(value)
            chosen[part] = _config(part_class, overrides.get(part, {})).to_dict()
    overrides = {field: value for field, value in overrides.items() if field not in parts}
    chosen |= overrides
    # Fields that the signature or the defaults know; what is left is set as given, as `from_dict` would.
    return config_class(**chosen)
