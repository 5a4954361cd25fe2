"""How mixtures of experts reach the graph: every expert runs on every token, and its weight is zero where not chosen.

transformers looks the function up by name. A choice that depends on values cannot be a branch in a graph, and gathering
the chosen experts' matrices for each token would copy gigabytes in a prefill. Run this way an expert is an ordinary
linear layer, which quantizes and runs as any other does, on every engine; the price is the time of the experts that
were not chosen.
"""

from __future__ import annotations

from typing import Any

import torch

NAME = "edgeformer"


def register() -> None:
    """Makes `experts_implementation="edgeformer"` known to transformers; may be called again."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(NAME, _every_expert)


def _every_expert(
    self: Any,
    hidden_states: torch.Tensor,  # [tokens, hidden]
    top_k_index: torch.Tensor,  # [tokens, k]
    top_k_weights: torch.Tensor,  # [tokens, k]
) -> torch.Tensor:
    """[tokens, hidden]: sum over the chosen experts of weight * expert(token).

    An index that no expert has (a null expert) weighs nothing, as in transformers' own functions.
    """
    total = torch.zeros_like(hidden_states)
    for number in range(self.num_experts):
        weight = torch.where(top_k_index == number, top_k_weights, 0.0).sum(-1, keepdim=True)  # [tokens, 1]
        first, down = ("gate_up_proj" if self.has_gate else "up_proj"), "down_proj"
        inner = _linear(self, first, number, hidden_states)
        inner = self._apply_gate(inner) if self.has_gate else self.act_fn(inner)
        result = _linear(self, down, number, inner)
        if self.has_post_expert_norm:
            result = self.post_expert_norm(result)
        total = total + result * weight.to(result.dtype)
    return total


def _linear(self: Any, name: str, number: int, x: torch.Tensor) -> torch.Tensor:
    weight = getattr(self, name)[number]  # [N, K], or [K, N] where the class is transposed
    bias = getattr(self, f"{name}_bias")[number] if self.has_bias else None
    y = x @ weight if self.is_transposed else torch.nn.functional.linear(x, weight)
    return y if bias is None else y + bias
