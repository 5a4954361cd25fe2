"""Tables of GGUF metadata keys: fields of the model's config, keys to ignore, keys that are supported with one value.

Names are those of the GGUF specification, without the architecture's prefix. A key of the model or its tokenizer that
is in no table stops the export; other unknown keys become a note.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Setting:
    """A key whose value is set to the first of `fields` that the model's config class has.

    With a `neutral` value the key has no effect, so a class without such a field is supported too.
    """

    fields: tuple[str, ...]
    kind: type = float  # int: a size of 1 or more (0 where that is neutral); float; bool
    neutral: tuple[Any, ...] = ()


# Sizes: a file without them is rejected, since a class's default is the size of another model.
REQUIRED: dict[str, Setting] = {
    "context_length": Setting(("max_position_embeddings", "n_positions", "n_ctx"), int),
    "embedding_length": Setting(("hidden_size", "n_embd", "d_model"), int),
    "block_count": Setting(("num_hidden_layers", "n_layer", "num_layers"), int),
    "attention.head_count": Setting(("num_attention_heads", "n_head", "num_heads"), int),
}
FEED_FORWARD = Setting(("intermediate_size", "n_inner", "d_ff", "ffn_hidden_size"), int)
KV_HEADS = Setting(("num_key_value_heads", "num_kv_heads"), int)
EPSILON_FIELDS = ("rms_norm_eps", "layer_norm_epsilon", "layer_norm_eps", "norm_epsilon", "norm_eps")
EPSILONS = ("attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon")

# Optional values: if the file has none, the config class's default must be neutral.
OPTIONAL: dict[str, Setting] = {
    "attn_logit_softcapping": Setting(("attn_logit_softcapping",), neutral=(0.0,)),
    "final_logit_softcapping": Setting(("final_logit_softcapping",), neutral=(0.0,)),
    "logit_scale": Setting(("logit_scale", "logits_scaling"), neutral=(0.0, 1.0)),
    "embedding_scale": Setting(("embedding_multiplier",), neutral=(0.0, 1.0)),
    "residual_scale": Setting(("residual_multiplier",), neutral=(0.0, 1.0)),
    "use_parallel_residual": Setting(("use_parallel_residual",), bool, (False,)),
    "expert_count": Setting(("num_experts", "num_local_experts", "n_routed_experts"), int, (0,)),
    "expert_used_count": Setting(("num_experts_per_tok", "top_k_experts"), int, (0,)),
    "expert_shared_count": Setting(("n_shared_experts",), int, (0,)),
    "expert_feed_forward_length": Setting(("moe_intermediate_size", "intermediate_size"), int, (0,)),
    "expert_shared_feed_forward_length": Setting(("shared_expert_intermediate_size",), int, (0,)),
    "expert_weights_norm": Setting(("norm_topk_prob",), bool, ()),
    "expert_weights_scale": Setting(("routed_scaling_factor",), neutral=(0.0, 1.0)),
    "expert_group_count": Setting(("n_group",), int, (0, 1)),
    "expert_group_used_count": Setting(("topk_group",), int, (0, 1)),
    "leading_dense_block_count": Setting(("first_k_dense_replace",), int, (0,)),
    "moe_every_n_layers": Setting(("decoder_sparse_step",), int, (0, 1)),
    "full_attention_interval": Setting(("full_attention_interval",), int, ()),
    "ssm.conv_kernel": Setting(("linear_conv_kernel_dim", "conv_kernel"), int, ()),
    "ssm.state_size": Setting(("linear_key_head_dim", "state_size"), int, ()),
    "ssm.group_count": Setting(("linear_num_key_heads",), int, (0,)),
    "ssm.time_step_rank": Setting(("linear_num_value_heads", "time_step_rank"), int, ()),
    "shortconv.l_cache": Setting(("conv_L_cache",), int, ()),
}

# Unsupported by every class that transformers reads from GGUF: rejected unless the value is neutral.
ONLY_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "router_logit_softcapping": (0.0,),
    "attention.clamp_kqv": (0.0,),
    "attention.max_alibi_bias": (0.0,),
    "attention.causal": (True,),
    "attention.q_lora_rank": (0,),
    "attention.kv_lora_rank": (0,),
    "attention.decay_lora_rank": (0,),
    "attention.iclr_lora_rank": (0,),
    "attention.value_residual_mix_lora_rank": (0,),
    "attention.gate_lora_rank": (0,),
    "attention.relative_buckets_count": (0,),
    "attention.output_scale": (0.0, 1.0),
    "attention.temperature_length": (0,),
    "attention.temperature_scale": (0.0,),
    "attention.key_length_mla": (0,),
    "attention.value_length_mla": (0,),
    "attention.shared_kv_layers": (0,),
    "attention.indexer.head_count": (0,),
    "attention.indexer.key_length": (0,),
    "attention.indexer.top_k": (0,),
    "attention.group_norm_epsilon": (0.0,),
    "attention.group_norm_groups": (0,),
    "expert_chunk_feed_forward_length": (0,),
    "expert_group_scale": (0.0, 1.0),
    "experts_per_group": (0, 1),
    "interleave_moe_layer_step": (0, 1),
    "moe_latent_size": (0,),
    "n_deepstack_layers": (0,),
    "pooling_type": (0,),
    "decoder_start_token_id": (),
    "decoder_block_count": (0,),
    "features_length": (0,),
    "embedding_length_out": (0,),
    "swin_norm": (False,),
    "rescale_every_n_layers": (0,),
    "time_mix_extra_dim": (0,),
    "time_decay_extra_dim": (0,),
    "token_shift_count": (0,),
    "activation_sparsity_scale": (0.0,),
    "altup.active_idx": (),
    "altup.num_inputs": (0,),
    "embedding_length_per_layer_input": (0,),
    "swiglu_clamp_exp": (0.0,),
    "swiglu_clamp_shexp": (0.0,),
    "ssm.dt_b_c_rms": (False,),
    "kda.head_dim": (0,),
    "wkv.head_size": (0,),
    "posnet.embedding_length": (0,),
    "posnet.block_count": (0,),
    "convnext.embedding_length": (0,),
    "convnext.block_count": (0,),
    "classifier.output_labels": (),
    "rope.scaling.alpha": (0.0, 1.0),
    "rope.scaling.yarn_log_multiplier": (0.0,),
    "rope.scaling.yarn_ext_factor": (1.0, -1.0),  # -1: the default of the scaling type
}

# Handled one by one in gguf_config.py and rope.py.
SPECIAL = frozenset({
    "vocab_size", "feed_forward_length", "attention.head_count_kv", *EPSILONS,
    "attention.key_length", "attention.value_length", "attention.key_length_swa", "attention.value_length_swa",
    "attention.scale", "attention.sliding_window", "attention.sliding_window_pattern",
    "expert_gating_func", "nextn_predict_layers", "ssm.inner_size",
    "rope.dimension_count", "rope.dimension_count_swa", "rope.dimension_sections", "rope.freq_base",
    "rope.freq_base_swa", "rope.scale_linear", "rope.scaling.type", "rope.scaling.factor", "rope.scaling.attn_factor",
    "rope.scaling.original_context_length", "rope.scaling.yarn_attn_factor", "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow",
})  # fmt: skip

# Keys that change no result -> the reason.
IGNORED_KEYS: dict[str, str] = {
    "rope.scaling.finetuned": "it only describes the training",
    "tensor_data_layout": "it names the converter's row order, which the tensors' names imply",
}
TOKENIZER_READ = frozenset({
    "model", "pre", "tokens", "token_type", "scores", "merges", "bos_token_id", "eos_token_id", "eot_token_id",
    "eom_token_id", "unknown_token_id", "seperator_token_id", "padding_token_id", "mask_token_id", "cls_token_id",
    "add_bos_token", "add_eos_token", "add_sep_token", "add_space_prefix",
})  # fmt: skip
IGNORED_TOKENIZER_KEYS: dict[str, str] = {
    "token_type_count": "token types of encoders; a decoder has none",
    "remove_extra_whitespaces": "only unigram tokenizers use it, which are unsupported",
    "precompiled_charsmap": "only unigram tokenizers use it, which are unsupported",
    **dict.fromkeys(
        (f"{name}_token_id" for name in (
            "fim_pre", "fim_suf", "fim_mid", "fim_pad", "fim_rep", "fim_sep", "prefix", "suffix", "middle",
        )),
        "it names a token for fill-in-the-middle, which a caller writes into the prompt as text",
    ),
}  # fmt: skip
TEMPLATES = ("tokenizer.chat_template", "tokenizer.chat_templates")
HUGGING_FACE = "tokenizer.huggingface.json"
OTHER_KINDS = ("adapter.", "imatrix.", "clip.", "diffusion.", "xielu.", "tokenizer.rwkv.")
SAMPLING_KEYS = {
    "temp": "temperature", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p", "penalty_repeat": "repetition_penalty",
}  # fmt: skip
