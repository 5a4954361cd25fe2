"""What tests of adapters share: the source that the exporter makes, and changes to an adapter's file."""

from __future__ import annotations

import numpy as np

from edgeformer.export import ExportOptions
from edgeformer.export.sources.load import load_source

# The same sums in another order: see bench/sources/adapters.py.
BOUND = 1e-5


def source_of(trained):
    """The base with the adapter merged, as the exporter traces it."""
    return load_source(ExportOptions(str(trained.base), trained.folder / "none", adapter=trained.folder))


def off(found, expected):
    """The largest difference, as a fraction of the expected values' range."""
    return float(np.abs(found - expected).max() / (expected.max() - expected.min()))


def rewrite(folder, change):
    """`change` of the tensors in the folder's file."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")
