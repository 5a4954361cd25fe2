"""A sequence encoder for continuous input: sensor readings, prices, features of audio frames.

Attention is not causal, so the graph needs no KV cache and runs in one call.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 (its usual abbreviation)
from torch import Tensor, nn

from edgeformer.errors import InputError
from edgeformer.models.config import known_fields, require_positive


@dataclass(frozen=True)
class EncoderConfig:
    """The arguments of `Transformer`, as in a config.json.

    Raises:
        ValueError: a size is not positive, or the heads do not divide `hidden_dim`.
    """

    input_dim: int = 1
    output_dim: int = 1
    hidden_dim: int = 64
    n_layers: int = 2
    n_heads: int = 4
    max_length: int = 100
    dropout: float = 0.0

    def __post_init__(self) -> None:
        require_positive(self)
        if self.hidden_dim % self.n_heads:
            raise ValueError(f"hidden_dim {self.hidden_dim} is not a multiple of n_heads {self.n_heads}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}, expected 0 <= dropout < 1")

    def to_dict(self) -> dict[str, Any]:
        """The content of `config.json`."""
        return {
            "task": "forecasting",
            "edgeformer_factory": "edgeformer.models.encoder:from_config",
            **asdict(self),
            "dtype": "float32",
        }


def from_config(config: Mapping[str, Any]) -> Transformer:
    """A new, untrained model for a `config.json`; unknown keys are ignored."""
    return Transformer(**asdict(EncoderConfig(**known_fields(EncoderConfig, config))))


class EncoderLayer(nn.Module):
    """Pre-norm attention and GELU feed-forward of four times the width, each added to its input.

    nn.TransformerEncoderLayer is not used: in eval mode it takes a fused path that traces with a fixed sequence
    length.
    """

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.head_dim = config.hidden_dim // config.n_heads
        self.attention_norm = nn.LayerNorm(config.hidden_dim)
        self.q_proj = nn.Linear(config.hidden_dim, config.hidden_dim)
        self.k_proj = nn.Linear(config.hidden_dim, config.hidden_dim)
        self.v_proj = nn.Linear(config.hidden_dim, config.hidden_dim)
        self.o_proj = nn.Linear(config.hidden_dim, config.hidden_dim)
        self.feed_forward_norm = nn.LayerNorm(config.hidden_dim)
        self.up_proj = nn.Linear(config.hidden_dim, 4 * config.hidden_dim)
        self.down_proj = nn.Linear(4 * config.hidden_dim, config.hidden_dim)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, sequence, hidden_dim) -> the same shape."""
        x = x + self.dropout(self.attend(self.attention_norm(x)))
        hidden = F.gelu(self.up_proj(self.feed_forward_norm(x)))  # (batch, sequence, 4 * hidden_dim)
        x = x + self.dropout(self.down_proj(hidden))
        return x

    def attend(self, x: Tensor) -> Tensor:
        """Self-attention; (batch, sequence, hidden_dim) -> the same shape."""
        heads = (*x.shape[:-1], -1, self.head_dim)
        q = self.q_proj(x).view(heads).transpose(1, 2)  # (batch, heads, sequence, head_dim)
        k = self.k_proj(x).view(heads).transpose(1, 2)
        v = self.v_proj(x).view(heads).transpose(1, 2)
        y = F.scaled_dot_product_attention(q, k, v)  # scores are scaled by head_dim ** -0.5
        projected: Tensor = self.o_proj(y.transpose(1, 2).reshape(x.shape))  # (batch, sequence, hidden_dim)
        return projected


class Transformer(nn.Module):
    """A sequence encoder: float [batch, sequence, input_dim] -> float [batch, sequence, output_dim].

    `max_length` is the longest sequence: the size of the table of learned positions.

    Raises:
        ValueError: a size is not positive, or `n_heads` does not divide `hidden_dim`.
    """

    def __init__(
        self,
        input_dim: int,
        output_dim: int,
        hidden_dim: int,
        n_layers: int,
        n_heads: int,
        *,
        max_length: int = 100,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.config = EncoderConfig(input_dim, output_dim, hidden_dim, n_layers, n_heads, max_length, dropout)
        self.input_spec = {"input_values": f"float32[batch,sequence,{input_dim}]"}  # read by the exporter
        self.embedding = nn.Linear(input_dim, hidden_dim)
        self.positions = nn.Embedding(max_length, hidden_dim)
        self.layers = nn.ModuleList(EncoderLayer(self.config) for _ in range(n_layers))
        self.norm = nn.LayerNorm(hidden_dim)
        self.output = nn.Linear(hidden_dim, output_dim)
        self.dropout = nn.Dropout(dropout)
        nn.init.normal_(self.positions.weight, std=0.02)

    def forward(self, input_values: Tensor) -> Tensor:
        """One output vector for each position.

        Raises:
            InputError: `input_values` is not [batch, sequence, input_dim], or longer than the table of positions.
        """
        # While tracing, a comparison would fix a bound on the axis. In the graph, Gather checks the range.
        if not torch.compiler.is_exporting():
            self.check(input_values)
        # An embedding lookup, not a slice: a slice would fix or bound the axis in the traced graph.
        numbers = torch.arange(input_values.shape[1], device=input_values.device)  # (sequence,)
        x = self.dropout(self.embedding(input_values) + self.positions(numbers))  # (batch, sequence, hidden_dim)
        for layer in self.layers:
            x = layer(x)
        outputs: Tensor = self.output(self.norm(x))
        return outputs

    def check(self, input_values: Tensor) -> None:
        """Raises InputError: the shape is wrong; see `forward`."""
        shape = tuple(input_values.shape)
        if len(shape) != 3 or shape[2] != self.config.input_dim:
            raise InputError(f"input_values has shape {shape}, expected [batch, sequence, {self.config.input_dim}]")
        if shape[1] > self.config.max_length:
            raise InputError(
                f"sequence too long for the table of learned positions: max {self.config.max_length}, got {shape[1]}; "
                f"cut the sequence, or build the model with max_length={shape[1]} and train it again"
            )
