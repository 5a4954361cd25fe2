"""Attention and mask functions for transformers: each attention is traced as one node, `edgeformer::Attention`.

transformers looks up the attention function and the mask function of a model by name. Both are registered here, so no
model needs code of its own. The pass `standard_attention` replaces the custom node with the standard operator.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from edgeformer.errors import ExportError

# The implementations, by the names that `model.set_attn_implementation` takes.
CAUSAL_ATTENTION = "edgeformer"  # causality and windows are attributes of the node; for decoders without a cache class
MASKED_ATTENTION = "edgeformer_masked"  # every mask is an array; for encoders
CACHED_ATTENTION = "edgeformer_past"  # for decoders traced with a KV cache: masks are computed from positions

DOMAIN = "edgeformer"  # of the custom operators
CAUSAL_MASK = "CausalMask"  # custom operator: (query positions [S], key positions [T]) -> bool [1, 1, S, T]


def register() -> None:
    """Registers the attention and mask functions with transformers; repeated calls have no effect."""
    from transformers import AttentionInterface, AttentionMaskInterface

    for name in (CAUSAL_ATTENTION, MASKED_ATTENTION, CACHED_ATTENTION):
        AttentionInterface.register(name, _attention)
    AttentionMaskInterface.register(CAUSAL_ATTENTION, _padding_mask)
    AttentionMaskInterface.register(MASKED_ATTENTION, _mask)
    AttentionMaskInterface.register(CACHED_ATTENTION, _mask_after_past)


def _padding_mask(attention_mask: torch.Tensor | None = None, **kwargs: Any) -> torch.Tensor | None:
    """The padding mask of bidirectional attention; None for a causal mask, which becomes attributes of the node."""
    # Only transformers' functions for bidirectional masks pass this option.
    return _mask(attention_mask=attention_mask, **kwargs) if "allow_is_bidirectional_skip" in kwargs else None


def _mask_after_past(
    q_length: int,
    kv_length: int,
    mask_function: Callable[..., Any],
    q_offset: int = 0,
    kv_offset: int = 0,
    attention_mask: torch.Tensor | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    """The mask of a step with a KV cache, bool [1, 1, q_length, kv_length], for any function of positions.

    A plain causal mask is traced as a custom node; where an Attention reads it, it becomes `is_causal=1`.
    """
    from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

    if mask_function is bidirectional_mask_function:
        padding = _mask(kwargs.pop("batch_size"), q_length, kv_length, mask_function, attention_mask, **kwargs)
        return torch.ones((1, 1, q_length, kv_length), dtype=torch.bool) if padding is None else padding
    queries, keys = torch.arange(q_length) + q_offset, torch.arange(kv_length) + kv_offset
    if mask_function is causal_mask_function:
        seen: torch.Tensor = torch.onnx.ops.symbolic(
            f"{DOMAIN}::{CAUSAL_MASK}", [queries, keys], dtype=torch.bool, shape=[1, 1, q_length, kv_length], version=1
        )
    else:
        origin = torch.zeros((1, 1, 1, 1), dtype=torch.int64)
        seen = mask_function(origin, origin, queries[None, None, :, None], keys[None, None, None, :])
    return seen if attention_mask is None else seen & attention_mask[:, None, None, :].bool()


def _mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    mask_function: Callable[..., Any],
    attention_mask: torch.Tensor | None = None,  # [B, kv_length], False at padding
    **kwargs: Any,
) -> torch.Tensor | None:
    """The mask bool [B, 1, q_length, kv_length], True where a query attends to a key; None for full attention.

    Expanded over the queries: onnxruntime (1.25 to 1.32) rejects a mask that needs broadcasting over them.
    """
    from transformers.masking_utils import bidirectional_mask_function

    shape = (batch_size, 1, q_length, kv_length)
    device = kwargs.get("device", "cpu")
    seen = None if attention_mask is None else attention_mask[:, None, None, :].bool()
    if mask_function is not bidirectional_mask_function:
        queries = torch.arange(q_length, device=device)[None, None, :, None]
        keys = torch.arange(kv_length, device=device)[None, None, None, :]
        origin = torch.zeros((1, 1, 1, 1), dtype=torch.int64, device=device)
        pattern = mask_function(origin, origin, queries, keys)
        seen = pattern if seen is None else seen & pattern
    return None if seen is None else seen.expand(shape)


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
    position_bias: torch.Tensor | None = None,
    s_aux: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention output [B, S, H, Dv] and no weights, as transformers' attention functions return them.

    `position_bias` ([1, H, S, T], added to the scores) and `attention_mask` become one mask input of the node. Without
    an `attention_mask`, a causal module gets `is_causal=1`. `s_aux` ([H]) is the attention sink: one score a head that
    takes part in the softmax and has no value.

    Raises:
        ExportError: a causal module passes a mask array, or has sinks and no mask array.
    """
    implementation = getattr(getattr(module, "config", None), "_attn_implementation", CAUSAL_ATTENTION)
    causal = bool(getattr(module, "is_causal", implementation != MASKED_ATTENTION) if is_causal is None else is_causal)
    if causal and attention_mask is not None and implementation == CAUSAL_ATTENTION:
        raise ExportError(
            f"{type(module).__name__} passes an attention mask of shape {tuple(attention_mask.shape)}; expected a "
            "causal mask or a sliding window, the only masks that this trace supports."
        )
    causal &= attention_mask is None
    mask = _with_bias(attention_mask, position_bias)
    if s_aux is not None:
        key, value, mask, causal = *_with_sink(query, key, value, mask, causal, s_aux), False
    mixed: torch.Tensor = torch.onnx.ops.symbolic(
        f"{DOMAIN}::Attention",
        [query, key, value] if mask is None else [query, key, value, mask],
        attrs={
            "is_causal": int(causal),
            "scale": float(query.shape[-1] ** -0.5 if scaling is None else scaling),
            "softcap": float(softcap or 0.0),
            "window": int(sliding_window or 0) if causal else 0,  # otherwise the mask has it
        },
        dtype=query.dtype,
        shape=[*query.shape[:3], value.shape[3]],
        version=1,
    )
    return mixed.transpose(1, 2).contiguous(), None


def _with_bias(mask: torch.Tensor | None, bias: torch.Tensor | None) -> torch.Tensor | None:
    if bias is None or mask is None:
        return mask if bias is None else bias
    hidden = torch.full((), torch.finfo(bias.dtype).min, dtype=bias.dtype)
    added = torch.where(mask, torch.zeros((), dtype=bias.dtype), hidden) if mask.dtype == torch.bool else mask
    return bias + added


def _with_sink(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    causal: bool,
    sink: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(key, value, mask) with one more key and value, both zero, at the end; the mask adds the sink's score there."""
    if causal:
        raise ExportError("the model has attention sinks but passes no causal mask; sinks need the mask as an array.")
    seen = torch.zeros(1, 1, query.shape[2], key.shape[2], dtype=query.dtype) if mask is None else mask
    added = _with_bias(seen, torch.zeros((), dtype=query.dtype)) if seen.dtype == torch.bool else seen
    assert added is not None
    rows = (added.shape[0], query.shape[1], query.shape[2])
    last = sink.to(query.dtype).reshape(1, -1, 1, 1).expand(*rows, 1)
    zeros = [torch.zeros_like(part[:, :, :1]) for part in (key, value)]
    wide = torch.cat([added.expand(*rows, added.shape[-1]), last], -1)
    return torch.cat([key, zeros[0]], 2), torch.cat([value, zeros[1]], 2), wide
