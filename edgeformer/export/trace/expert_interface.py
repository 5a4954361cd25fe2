"""Mixture-of-experts function for transformers: every expert runs on every token, unselected experts with weight 0.

A graph cannot branch on values, and gathering the selected experts' matrices for each token would copy gigabytes in a
prefill. Computed this way each expert is an ordinary linear layer, which every engine quantizes and runs like any
other. The cost is the time of the unselected experts.
"""

from __future__ import annotations

from typing import Any

import torch

EXPERTS = "edgeformer"  # the name that `model.set_experts_implementation` takes


def register() -> None:
    """Registers `experts_implementation="edgeformer"` with transformers; repeated calls have no effect."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(EXPERTS, _every_expert)


def _every_expert(
    self: Any,
    hidden_states: torch.Tensor,  # [tokens, hidden]
    top_k_index: torch.Tensor,  # [tokens, k]
    top_k_weights: torch.Tensor,  # [tokens, k]
) -> torch.Tensor:
    """The sum over the selected experts of weight * expert(token), [tokens, hidden].

    An index without an expert (a null expert) adds nothing, as in transformers' own functions.
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
