"""`edgeformer embed`: vectors of texts or pictures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from edgeformer.cli.console import load_model, read_items, stderr
from edgeformer.cli.options import EmbedFlags
from edgeformer.cli.purpose import require
from edgeformer.engines.options import EngineOptions
from edgeformer.errors import InputError


def print_vectors(
    bundle: Path, engine: EngineOptions, arguments: Sequence[str], output: Path | None, options: EmbedFlags
) -> None:
    """Print one vector an item as JSON lines, or write an array [items, size] to a .npy file.

    Raises:
        InputError: the bundle gives no vectors, or there is nothing to embed.
    """
    opened = require(bundle, "embed")
    if output is not None and output.suffix != ".npy":
        raise InputError(f"--output is {output}, expected a name ending in .npy.")
    items = read_items(arguments)
    vectors = load_model(opened, engine.arguments()).embed(items, **options.arguments())
    if output is None:
        for item, vector in zip(items, vectors, strict=True):
            print(json.dumps({"item": item, "vector": [float(f"{x:.7g}") for x in vector]}, ensure_ascii=False))
        return
    np.save(output, vectors)
    stderr.print(f"[dim]float32{list(vectors.shape)} written to {output}[/dim]")
