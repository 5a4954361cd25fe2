"""The context length in a config.json, under any of the names that transformers uses for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# In this order: most models; GPT, CTRL and T5; older GPT; MPT and DBRX; decoders of speech models.
NAMES = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_target_positions")


def context_length(config: Mapping[str, Any]) -> int | None:
    """The context length in tokens; None if the config has none."""
    return config_number(config, *NAMES)


def config_number(config: Mapping[str, Any], *names: str) -> int | None:
    """The first positive integer under one of `names` in `config`, else in its `text_config`; None if there is none."""
    for part in (config, config.get("text_config")):
        for name in names:
            value = part.get(name) if isinstance(part, Mapping) else None
            if type(value) is int and value > 0:
                return value
    return None
