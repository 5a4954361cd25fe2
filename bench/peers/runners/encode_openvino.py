"""An encoder in OpenVINO: one compiled model with free batch and length.

Options: properties (of the CPU plugin, beside the number of threads).
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

ov: Any = None


def load_library() -> None:
    global ov
    import openvino

    ov = openvino


def versions() -> dict[str, str]:
    return {"openvino": version("openvino")}


class Loaded:
    def __init__(self, file: str, threads: int, options: dict[str, Any], context: int) -> None:
        properties = {
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": 1,
            "PERFORMANCE_HINT": "LATENCY",
            **options.get("properties", {}),
        }
        self._model = ov.Core().compile_model(f"{file}/openvino_model.xml", "CPU", properties)
        self._request = self._model.create_infer_request()
        self._names = [port.any_name for port in self._model.inputs]

    def encode(self, feeds: Mapping[str, Any]) -> Any:
        found = self._request.infer({name: feeds[name] for name in self._names}, share_inputs=True)
        return found[self._model.output("last_hidden_state")]
