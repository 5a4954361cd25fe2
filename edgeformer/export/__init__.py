"""The exporter: from a PyTorch Transformer to a bundle. Part of the toolchain: needs torch, unlike the runtime.

Its names are imported when they are first used, so that `--help` does not load torch.
"""

from typing import Any

__all__ = ["ExportOptions", "export", "language_model", "module_source", "read_recipe"]

_HOME = {
    "ExportOptions": "options",
    "export": "pipeline",
    "language_model": "sources.hub.hub",  # a source from a transformers model object
    "module_source": "sources.user.factory",  # a source from a user-defined module
    "read_recipe": "options",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
