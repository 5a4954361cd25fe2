"""A small decoder-only language model: RMSNorm, rotary positions, grouped-query attention, SwiGLU, tied head.

`forward` runs a whole sequence without a KV cache; the exporter inserts the cache into the graph. Parameter names and
`config.json` are those of "llama" in transformers, which can load a checkpoint too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 (its usual abbreviation)
from torch import Tensor, nn

from edgeformer.models.config import known_fields, require_positive


@dataclass(frozen=True)
class DecoderConfig:
    """The shape of a decoder; the field names are Hugging Face's.

    Raises:
        ValueError: a size is not positive, or the numbers of heads do not divide each other and hidden_size.
    """

    vocab_size: int = 2048
    hidden_size: int = 128
    intermediate_size: int = 384
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    max_position_embeddings: int = 512
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5
    tie_word_embeddings: bool = True

    def __post_init__(self) -> None:
        require_positive(self)
        if self.hidden_size % (2 * self.num_attention_heads):
            raise ValueError(
                f"hidden_size {self.hidden_size} over num_attention_heads {self.num_attention_heads} must give an even "
                f"head size (rotary positions rotate pairs); take a multiple of {2 * self.num_attention_heads}"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )

    @property
    def head_dim(self) -> int:
        """Size of one head."""
        return self.hidden_size // self.num_attention_heads

    def to_dict(self) -> dict[str, Any]:
        """The content of `config.json`, for edgeformer, transformers and Optimum."""
        return {
            "task": "text-generation",
            "edgeformer_factory": "edgeformer.models.decoder:from_config",
            "model_type": "llama",  # transformers' name of this layout
            "architectures": ["LlamaForCausalLM"],
            **asdict(self),
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "dtype": "float32",
        }


def from_config(config: Mapping[str, Any]) -> CausalLM:
    """A new, untrained model for a `config.json`; unknown keys are ignored."""
    return CausalLM(DecoderConfig(**known_fields(DecoderConfig, config)))


def rotate_half(x: Tensor) -> Tensor:
    """(a, b) -> (-b, a) on the two halves of the last axis: rotates each pair (i, i + head_dim / 2) by 90 degrees."""
    a, b = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    return torch.cat((-b, a), dim=-1)


class Attention(nn.Module):
    """Causal self-attention; each key-value head serves `num_attention_heads / num_key_value_heads` query heads."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        kv_size = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        # The tracer refuses enable_gqa=True if both numbers of heads are equal.
        self.grouped = config.num_key_value_heads != config.num_attention_heads

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """(batch, sequence, hidden) -> the same shape."""
        heads = (*x.shape[:-1], -1, self.head_dim)
        q = self.q_proj(x).view(heads).transpose(1, 2)  # (batch, heads, sequence, head_dim)
        k = self.k_proj(x).view(heads).transpose(1, 2)  # (batch, kv_heads, sequence, head_dim)
        v = self.v_proj(x).view(heads).transpose(1, 2)
        q = q * cos + rotate_half(q) * sin  # one RotaryEmbedding in the exported graph
        k = k * cos + rotate_half(k) * sin
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.grouped)
        projected: Tensor = self.o_proj(y.transpose(1, 2).reshape(x.shape))  # (batch, sequence, hidden)
        return projected


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)), https://arxiv.org/abs/2002.05202."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, sequence, hidden) -> the same shape."""
        y: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return y


class Layer(nn.Module):
    """Pre-norm attention and MLP, each added to its input."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """(batch, sequence, hidden) -> the same shape."""
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        x = x + self.mlp(self.post_attention_layernorm(x))
        return x


class Decoder(nn.Module):
    """Token ids and positions -> hidden states (batch, sequence, hidden_size)."""

    inverse_frequencies: Tensor

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        even = torch.arange(0, config.head_dim, 2, dtype=torch.float32)  # (head_dim / 2,)
        inverse_frequencies = 1.0 / config.rope_theta ** (even / config.head_dim)
        self.register_buffer("inverse_frequencies", inverse_frequencies, persistent=False)

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        """Hidden states (batch, sequence, hidden) for ids and positions (batch, sequence)."""
        # Angles stay float32 under autocast: in bfloat16, positions 256 and 257 are equal.
        angles = position_ids[..., None].float() * self.inverse_frequencies  # (batch, sequence, head_dim / 2)
        angles = torch.cat((angles, angles), dim=-1)
        # The axis of heads is added last: onnxscript's RotaryEmbedding fusion matches exactly this order of operations.
        cos, sin = angles.cos().unsqueeze(1), angles.sin().unsqueeze(1)  # (batch, 1, sequence, head_dim)
        x: Tensor = self.embed_tokens(input_ids)  # (batch, sequence, hidden)
        for layer in self.layers:
            x = layer(x, cos, sin)
        x = self.norm(x)
        return x


class CausalLM(nn.Module):
    """Next-token logits of a decoder. Initial weights as in GPT-2: N(0, 0.02), smaller in o_proj and down_proj."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                writes_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                std = 0.02 * (2 * config.num_hidden_layers) ** -0.5 if writes_residual else 0.02
                nn.init.normal_(parameter, std=std)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        """Logits float [batch, sequence, vocab_size] for int64 ids and positions, both [batch, sequence]."""
        logits: Tensor = self.lm_head(self.model(input_ids, position_ids))
        return logits
