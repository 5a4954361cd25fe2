"""ONNX Runtime's providers for an NVIDIA GPU: CUDA, and TensorRT before it where that is asked for.

Nothing here was tried on a device; tests/gpu does that where there is one.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from types import ModuleType
from typing import Any

from edgeformer import disk_cache
from edgeformer.engines.ort_install import version_of
from edgeformer.errors import EngineUnavailable, InputError, pip_install

TENSORRT, CUDA, CPU = "TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"
PRECISIONS = ("float32", "float16")
HEAVY = {"MatMul", "MatMulNBits", "Gemm", "Attention", "Conv"}  # none of these may run on the CPU beside a GPU


def check_tensorrt(tensorrt: str | None, engine: str) -> None:
    """Refuses a value of the option `tensorrt` that cannot be used with this engine.

    Raises:
        InputError: it is neither None nor in PRECISIONS, or the engine is another one than `cuda`.
    """
    if tensorrt is None:
        return
    if tensorrt not in PRECISIONS:
        raise InputError(f"tensorrt is {tensorrt!r}, expected None or {' or '.join(map(repr, PRECISIONS))}.")
    if engine != "cuda":
        raise InputError(f"tensorrt={tensorrt!r} is an option of the cuda engine, but engine is {engine!r}.")


def gpu_providers(ort: ModuleType, tensorrt: str | None, cached: bool) -> list[Any]:
    """The providers of a session, in ONNX Runtime's order of preference, with their options.

    TensorRT builds an engine for the shapes that it sees, and a new one for a shape outside their range, in seconds to
    minutes (microsoft/onnxruntime#13559). The KV cache has another shape at each step, so a graph with one is refused.

    Raises:
        EngineUnavailable: this ONNX Runtime has no TensorRT, or the graph has a KV cache.
    """
    # The cache is a new, slightly larger tensor at each step; doubling the arena would waste memory.
    cuda = (CUDA, {"device_id": 0, "arena_extend_strategy": "kSameAsRequested"})
    if tensorrt is None:
        return [cuda, CPU]
    if cached:
        raise EngineUnavailable(
            "TensorRT was requested, but this graph has a KV cache: its shape changes at each token, and TensorRT "
            "would build an engine for each. Leave tensorrt out; it is for encoders and other graphs without a cache."
        )
    if TENSORRT not in ort.get_available_providers():
        raise EngineUnavailable(
            f"TensorRT was requested, but this onnxruntime {ort.__version__} was built without it: "
            f"{pip_install('onnxruntime-gpu')}, or leave tensorrt out."
        )
    options: dict[str, Any] = {"device_id": 0, "trt_fp16_enable": tensorrt == "float16"}
    folder = engine_folder(ort.__version__)
    if folder is not None:
        options |= {"trt_engine_cache_enable": True, "trt_engine_cache_path": str(folder)}
        options |= {"trt_timing_cache_enable": True, "trt_timing_cache_path": str(folder)}
    return [(TENSORRT, options), cuda, CPU]


def engine_folder(version: str) -> Path | None:
    """Where TensorRT keeps the engines that it built: a folder in the disk cache; None if that is disabled.

    TensorRT itself gives the files names by graph, processor and precision. The folder is another for each version of
    ONNX Runtime, whose names and files need not fit those of the next.
    """
    place = disk_cache.folder()
    if place is None:
        return None
    major, minor = version_of(version)
    folder = place / "tensorrt" / f"onnxruntime-{major}.{minor}"
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        return folder
    return None


def require_gpu(session: Any, tensorrt: str | None) -> None:
    """Refuses a session that does not run where it was asked to.

    Raises:
        EngineUnavailable: CUDA or TensorRT is not among its providers, or heavy nodes would run on the CPU.
    """
    providers = session.get_providers()
    wanted = [(CUDA, "CUDA", "CUDA or cuDNN", f"{pip_install('onnxruntime-gpu')}, or use engine='cpu'")]
    if tensorrt is not None:
        remedy = "install the TensorRT that its release notes name, or leave tensorrt out"
        wanted.insert(0, (TENSORRT, "TensorRT", "TensorRT", remedy))
    for provider, name, libraries, remedy in wanted:
        if provider not in providers:
            raise EngineUnavailable(
                f"{name} was requested, but the session runs on {providers[0]}: the {libraries} libraries that this "
                f"onnxruntime needs are missing or have another version: {remedy}."
            )
    elsewhere: dict[str, str] = {}
    for part in getattr(session, "get_provider_graph_assignment_info", list)():
        for node in part.get_nodes():
            if part.ep_name not in (CUDA, TENSORRT) and node.op_type in HEAVY:
                elsewhere[node.name] = node.op_type
    if elsewhere:
        some = ", ".join(f"{name} ({op})" for name, op in list(elsewhere.items())[:4])
        raise EngineUnavailable(
            f"CUDA was requested, but {len(elsewhere)} of the graph's heavy nodes would run on the CPU: {some}. "
            f"Export with --dtype float16, or use engine='cpu'."
        )
