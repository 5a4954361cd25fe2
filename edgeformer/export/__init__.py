"""The workshop: from a PyTorch Transformer to a bundle. Needs torch; the device never imports this package."""

from edgeformer.export.options import ExportOptions, read_recipe
from edgeformer.export.pipeline import export

__all__ = ["ExportOptions", "export", "read_recipe"]
