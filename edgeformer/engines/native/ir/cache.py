"""The KV caches of a lowered graph."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Cache:
    """One layer's key and value cache: names of the graph's inputs and outputs, and the sizes of a token's part.

    `plain`: the graph reads the joined tensor itself, so it is kept as floats, one tensor (`past_value`) a cache.
    """

    past_key: str
    past_value: str
    present_key: str
    present_value: str
    kv_heads: int
    head_dim: int
    value_dim: int
    plain: bool = False
