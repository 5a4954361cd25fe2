"""The KV caches of a lowered graph."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Cache:
    """One layer's KV cache: names of the graph's inputs and outputs, and sizes of a token's keys and values.

    `plain`: a History, which the graph reads as a tensor. It is kept as float32, one tensor (`past_value`) instead of
    two.
    """

    past_key: str
    past_value: str
    present_key: str
    present_value: str
    kv_heads: int
    head_dim: int
    value_dim: int
    plain: bool = False
