"""The context length in a config.json: the one list of its names there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# transformers: of most; of GPT, CTRL and T5; of older GPT; of MPT and DBRX; of a speech model's decoder.
NAMES = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_target_positions")


def context_length(config: Mapping[str, Any]) -> int | None:
    """The context length that the config names; None where it names none."""
    return config_number(config, *NAMES)


def config_number(config: Mapping[str, Any], *names: str) -> int | None:
    """The first of `names` with a positive whole number, in `config` or its `text_config`; None without one."""
    for part in (config, config.get("text_config")):
        for name in names:
            value = part.get(name) if isinstance(part, Mapping) else None
            if type(value) is int and value > 0:
                return value
    return None
