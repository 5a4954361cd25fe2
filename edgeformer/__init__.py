"""edgeformer: run Transformers on devices, from one folder that any ONNX runtime can open.

`import edgeformer` imports nothing heavy: what needs numpy, onnx or an engine is imported when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from edgeformer.errors import (
    BundleError,
    EdgeformerError,
    EngineUnavailable,
    ExportError,
    InputError,
    ParityError,
    StateError,
    TemplateError,
    TrainingError,
)

if TYPE_CHECKING:
    from edgeformer.bundle.bundle import Bundle
    from edgeformer.decoding.result import Piece, Result
    from edgeformer.model import Model, load

__version__ = "0.1.0"

__all__ = [
    "Bundle",
    "BundleError",
    "EdgeformerError",
    "EngineUnavailable",
    "ExportError",
    "InputError",
    "Model",
    "ParityError",
    "Piece",
    "Result",
    "StateError",
    "TemplateError",
    "TrainingError",
    "__version__",
    "load",
]

_LAZY = {
    "Bundle": "edgeformer.bundle.bundle",
    "Model": "edgeformer.model",
    "load": "edgeformer.model",
    "Piece": "edgeformer.decoding.result",
    "Result": "edgeformer.decoding.result",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'edgeformer' has no attribute {name!r}")
    value = getattr(import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
