"""A tiny decoder of which some layers have keys with one pair of channels far larger than the others."""

from __future__ import annotations

import torch

from edgeformer.models import CausalLM, DecoderConfig

SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 192,
}
FACTOR = 2.0**8  # a power of two: quantized weights and float products keep their bits


def decoder(outliers: tuple[int, ...] = ()) -> tuple[CausalLM, DecoderConfig]:
    """The model with random weights that show in the logits; the same function for any `outliers`.

    In these layers one channel of each key head, and the one that rotary positions pair with it, is `FACTOR` times as
    large, and those of the queries are as much smaller: their products are the same.
    """
    torch.manual_seed(0)
    model = CausalLM(config := DecoderConfig(**SIZES)).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2:
                wide = 0.5 if "embed" in name else 1.2 / weight.shape[1] ** 0.5
                weight.copy_(torch.randn_like(weight) * wide)
        for layer in outliers:
            attention, dim = model.model.layers[layer].self_attn, config.head_dim
            for projection, factor in ((attention.k_proj, FACTOR), (attention.q_proj, 1 / FACTOR)):
                rows = projection.weight.view(-1, dim, config.hidden_size)  # [heads, head_dim, hidden]
                rows[:, [3, 3 + dim // 2]] *= factor
    return model, config
