"""Helpers for tests of adapters: the exporter's source, and edits of an adapter's file."""

from __future__ import annotations

import numpy as np

from edgeformer.export import ExportOptions
from edgeformer.export.sources.load import load_source

# For the same sums in another order: see bench/sources/adapters.py.
BOUND = 1e-5


def source_of(trained):
    """The source of the base with the adapter merged."""
    return load_source(ExportOptions(str(trained.base), trained.folder / "none", adapter=trained.folder))


def off(found, expected):
    """The largest difference, as a fraction of the expected values' range."""
    return float(np.abs(found - expected).max() / (expected.max() - expected.min()))


def rewrite(folder, change):
    """Applies `change` to the tensors in the folder's file."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")
