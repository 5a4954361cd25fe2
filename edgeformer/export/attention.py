"""How attention reaches the graph as one node: the adapter to transformers, and the node's own vocabulary.

A transformers model hands queries, keys and values to a function that it looks up by name, and asks another for its
mask. Both are registered here, so that no model needs code of its own. The node they leave, `edgeformer::Attention`,
lives only between the trace and the attention pass, which turns it into the standard operator.
"""

from __future__ import annotations

from typing import Any

import torch

from edgeformer.errors import ExportError

NAME = "edgeformer"
DOMAIN = "edgeformer"


def register() -> None:
    """Makes `attn_implementation="edgeformer"` known to transformers; may be called again."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, _no_mask)


def _no_mask(*args: Any, **kwargs: Any) -> None:
    """Causality and windows are attributes of the node, not arrays."""
    return None


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,  # [B, H, S, D]
    key: torch.Tensor,  # [B, Hkv, S, D]
    value: torch.Tensor,  # [B, Hkv, S, Dv]
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """[B, S, H, Dv], as transformers' attention functions return it."""
    if attention_mask is not None:
        raise ExportError(
            f"{type(module).__name__} passes its own attention mask of shape {tuple(attention_mask.shape)}; only "
            "causal masks and sliding windows are known here."
        )
    unknown = [name for name in ("s_aux", "position_bias") if kwargs.get(name) is not None]
    if unknown:
        raise ExportError(
            f"{type(module).__name__} passes {', '.join(unknown)} to attention, which the standard Attention operator "
            "cannot say."
        )
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    mixed: torch.Tensor = torch.onnx.ops.symbolic(
        f"{DOMAIN}::Attention",
        [query, key, value],
        attrs={
            "is_causal": int(causal),
            "scale": float(query.shape[-1] ** -0.5 if scaling is None else scaling),
            "softcap": float(softcap or 0.0),
            "window": int(sliding_window or 0),
        },
        dtype=query.dtype,
        shape=[*query.shape[:3], value.shape[3]],
        version=1,
    )
    return mixed.transpose(1, 2).contiguous(), None
