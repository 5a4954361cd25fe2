"""Recipes that train in a second or two, for the tests of training."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

TEXT: dict[str, Any] = {
    "task": "text",
    "data": {"vocab_size": 320, "sequence_length": 32, "sample_tokens": 12},
    "model": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2},
    "train": {
        "steps": 300,
        "batch_size": 8,
        "learning_rate": 1e-2,
        "warmup_steps": 5,
        "eval_every": 100,
        "save_every": 100,
        "eval_batches": 3,
    },
}
FORECAST: dict[str, Any] = {
    "task": "forecast",
    "data": {"context_length": 24, "prediction_length": 12, "hours": 2400},
    "model": {"hidden_dim": 32, "n_layers": 1, "n_heads": 2},
    "train": TEXT["train"] | {"steps": 500, "batch_size": 16, "learning_rate": 7e-3, "eval_batches": 8},
}


def recipe_table(base: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A copy of `base` with changes such as train__steps=20."""
    table = copy.deepcopy(base)
    for name, value in changes.items():
        section, key = name.split("__")
        table[section][key] = value
    return table


def text_file(folder: Path, characters: int = 30_000) -> str:
    """A file with the first characters of the language reference; the path."""
    from pydoc_data.topics import topics

    path = folder / "text.txt"
    path.write_text("\n\n".join(topics[name] for name in sorted(topics))[:characters], encoding="utf-8")
    return str(path)
