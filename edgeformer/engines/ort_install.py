"""What is installed of ONNX Runtime and CUDA, and why it cannot run a bundle here."""

from __future__ import annotations

import contextlib
import io
import re
from importlib import metadata
from types import ModuleType

from edgeformer.bundle.bundle import Bundle
from edgeformer.errors import EngineUnavailable, pip_install

WHEELS = ("onnxruntime", "onnxruntime-gpu")
MINIMUM = (1, 23)  # the first version with Attention, RotaryEmbedding and RMSNormalization of opset 23
MINIMUM_QUANTIZED = (1, 25)  # the first version that fuses 8-bit weights; older ones are 15 to 50 times slower


def installed_wheels() -> dict[str, str]:
    """The installed ONNX Runtime wheels: {name: version}. They install to one folder, so two of them conflict."""
    found = {}
    for name in WHEELS:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def both_wheels() -> str | None:
    """The problem with an installation of both wheels, as text; None if at most one is installed."""
    found = installed_wheels()
    if len(found) < 2:
        return None
    names = " and ".join(f"{name} {version}" for name, version in found.items())
    return (
        f"{names} are both installed; they install to the same folder, so one has overwritten the other. "
        "Uninstall both (pip uninstall -y onnxruntime onnxruntime-gpu), then install one: "
        f"{pip_install('onnxruntime')}, or {pip_install('onnxruntime-gpu')}"
    )


def import_onnxruntime() -> ModuleType:
    """The module `onnxruntime`.

    Raises:
        EngineUnavailable: it is not installed, cannot be imported, or is incomplete.
    """
    try:
        import onnxruntime
    except ImportError as error:
        if installed_wheels():
            raise EngineUnavailable(f"onnxruntime is installed but cannot be imported: {error}.") from error
        raise EngineUnavailable(
            f"onnxruntime is not installed: {pip_install('onnxruntime')}, or {pip_install('onnxruntime-gpu')}."
        ) from error
    if not hasattr(onnxruntime, "InferenceSession"):
        reason = both_wheels() or "files are missing, as after uninstalling one of two wheels; install it again"
        raise EngineUnavailable(f"onnxruntime is broken: {reason}.")
    module: ModuleType = onnxruntime
    return module


def version_of(text: str) -> tuple[int, int]:
    """(major, minor) of a version such as "1.32.0" or "1.25.0.dev2"; (0, 0) if there is no number."""
    match = re.match(r"(\d+)\.(\d+)", text)
    return (int(match[1]), int(match[2])) if match else (0, 0)


def check_version(version: str, bundle: Bundle) -> None:
    """Raise EngineUnavailable if this version of ONNX Runtime cannot run the bundle, or only slowly."""
    scheme = bundle.manifest["quantization"]["scheme"]
    need = MINIMUM if scheme == "none" else MINIMUM_QUANTIZED
    if version_of(version) < need:
        why = (
            "older versions have no kernels for opset 23"
            if scheme == "none"
            else f"older versions run {scheme} weights 15 to 50 times slower without a warning"
        )
        raise EngineUnavailable(
            f"onnxruntime {version} is too old for this bundle: it needs {need[0]}.{need[1]} or newer ({why}). "
            f"Update it: pip install -U onnxruntime."
        )


def check_cuda(ort: ModuleType) -> None:
    """Raise if a CUDA session is impossible; ONNX Runtime itself would silently fall back to the CPU."""
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        reason = both_wheels() or (
            f"this onnxruntime is the CPU build; uninstall it, then {pip_install('onnxruntime-gpu')}"
        )
        raise EngineUnavailable(f"CUDA is not available: {reason}.")
    problem = cuda_driver_problem()
    if problem:
        raise EngineUnavailable(f"CUDA is not available: {problem}.")
    if hasattr(ort, "preload_dlls"):
        with contextlib.redirect_stdout(io.StringIO()):  # prints missing libraries; `require_gpu` reports them
            ort.preload_dlls()


def cuda_driver_problem() -> str | None:
    """Why the NVIDIA driver gives no device, as text; None if it gives one."""
    import ctypes

    for name in ("libcuda.so.1", "nvcuda.dll"):
        try:
            driver = ctypes.CDLL(name)
        except OSError:
            continue
        if driver.cuInit(0) != 0:
            return "the NVIDIA driver does not start (no device, or a driver that does not match the kernel)"
        count = ctypes.c_int(0)
        driver.cuDeviceGetCount(ctypes.byref(count))
        return None if count.value else "the NVIDIA driver sees no device"
    return "there is no NVIDIA driver (libcuda) on this machine"
