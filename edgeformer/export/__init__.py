"""The workshop: from a PyTorch Transformer to a bundle. Needs torch; the device never imports this package.

Its names are loaded when first used, so that `--help` answers without torch.
"""

from typing import Any

__all__ = ["ExportOptions", "export", "language_model", "module_source", "read_recipe"]

_HOME = {
    "ExportOptions": "options",
    "export": "pipeline",
    "language_model": "sources.hub.hub",  # a transformers model object -> what `export` takes as `traced`
    "module_source": "sources.user.factory",  # the same of a module of one's own
    "read_recipe": "options",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
