"""An encoder in onnxruntime: an ordinary session of a .onnx file."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

package: Any = None


def load_library() -> None:
    global package
    import onnxruntime

    package = onnxruntime


def versions() -> dict[str, str]:
    return {"onnxruntime": version("onnxruntime")}


class Loaded:
    def __init__(self, file: str, threads: int, options: dict[str, Any], context: int) -> None:
        settings = package.SessionOptions()
        settings.intra_op_num_threads = threads
        self._session = package.InferenceSession(file, settings, providers=["CPUExecutionProvider"])
        self._names = [value.name for value in self._session.get_inputs()]

    def encode(self, feeds: Mapping[str, Any]) -> Any:
        return self._session.run(["last_hidden_state"], {name: feeds[name] for name in self._names})[0]
