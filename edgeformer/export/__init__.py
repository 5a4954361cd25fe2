"""The workshop: from a PyTorch Transformer to a bundle. Needs torch; the device never imports this package.

`ExportOptions`, `read_recipe` and `export` are loaded when first used, so that `--help` answers without torch.
"""

from typing import Any

__all__ = ["ExportOptions", "export", "read_recipe"]

_HOME = {"ExportOptions": "options", "read_recipe": "options", "export": "pipeline"}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
