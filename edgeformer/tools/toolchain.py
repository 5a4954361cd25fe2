"""The third-party packages that `edgeformer export` and `edgeformer train` import."""

from __future__ import annotations

from importlib.util import find_spec

MODULES = {
    "export": ("torch", "transformers", "onnxscript", "onnx_ir", "onnxruntime", "safetensors", "gguf"),
    "train": ("torch", "accelerate", "safetensors", "matplotlib"),
}


def missing_packages(command: str) -> list[str]:
    """Those of the command ("export" or "train") that are not installed, as pip names them."""
    return [name.replace("_", "-") for name in MODULES[command] if find_spec(name) is None]
