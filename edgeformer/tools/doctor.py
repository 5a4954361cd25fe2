"""Checks of this machine and installation: which engines run, and why the others do not."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np

import edgeformer
from edgeformer import disk_cache
from edgeformer.bundle.bundle import Bundle
from edgeformer.engines.onnxruntime import OrtEngine
from edgeformer.engines.ort_install import (
    MINIMUM_QUANTIZED,
    both_wheels,
    cuda_driver_problem,
    import_onnxruntime,
    installed_wheels,
    version_of,
)
from edgeformer.engines.ort_providers import TENSORRT
from edgeformer.errors import EdgeformerError, EngineUnavailable, pip_install
from edgeformer.files import temporary_folder
from edgeformer.machine import (
    available_memory,
    cpu_name,
    cpu_quota,
    default_threads,
    system_name,
    total_memory,
    usable_cpus,
)
from edgeformer.tools import board as boards
from edgeformer.tools.toolchain import missing_packages

Verdict = Literal["yes", "no", "warning", "fact"]


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    topic: str
    verdict: Verdict
    text: str


def examine() -> Iterator[Finding]:
    """Yields findings about this machine and this installation."""
    yield Finding("edgeformer", "fact", f"{edgeformer.__version__} in {Path(edgeformer.__file__).parent}")
    yield Finding("python", "fact", f"{platform.python_version()} ({sys.executable})")
    yield Finding("system", "fact", " ".join(system_name()))
    quota = cpu_quota()
    limit = f", the control group allows {quota:g}" if quota is not None else ""
    cpus = len(usable_cpus())
    yield Finding("cpu", "fact", f"{cpu_name()}, {cpus} logical CPUs{limit}; {default_threads()} threads by default")
    yield Finding("memory", "fact", f"{_gib(available_memory())} available of {_gib(total_memory())}")
    yield from _board()
    yield from _power()
    yield _cache()
    yield from _onnxruntime()
    yield from _cuda()
    yield from _native()
    yield from _toolchain()


def examine_bundle(path: str | os.PathLike[str]) -> Iterator[Finding]:
    """Yields which engines load the bundle at `path`, and whether ONNX Runtime's CPU fuses its quantized weights.

    Raises:
        BundleError: the bundle is damaged.
    """
    from edgeformer.model import load

    bundle = Bundle.open(path)
    quantization = bundle.manifest["quantization"]
    yield Finding("bundle", "fact", f"{bundle.path.name}: {bundle.task}, {quantization['scheme']}, {_mib(bundle.size)}")
    for name in ("cuda", "native", "cpu"):
        try:
            load(path, name)
        except EngineUnavailable as error:
            yield Finding(f"engine {name}", "no", str(error))
        else:
            yield Finding(f"engine {name}", "yes", "loads this bundle")
            if name == "cpu":
                yield from _fusion(bundle)


def fused_weights(bundle: Bundle) -> tuple[int, int]:
    """(fused, unfused): the quantized linears that ONNX Runtime's CPU runs with MatMulNBits, and the others.

    From the profile of one step; there is no cheaper way to find out. An unfused weight is dequantized at every step,
    which is 15 to 50 times slower.
    """
    with temporary_folder() as folder:
        engine = OrtEngine(bundle, "cpu", 1, profile=folder)
        inputs = {
            name: np.zeros([1 if isinstance(size, str) else size for size in port.shape], port.dtype)
            for name, port in engine.signature.inputs.items()
        }
        engine.forward([(inputs, engine.new_state())])
        runs = engine.end_profile()
    fused = sum(run.operator == "MatMulNBits" for run in runs)
    # Rows of an embedding have a batch axis and have to be dequantized; a weight has two axes.
    whole = sum(run.operator == "DequantizeLinear" and len(run.shapes[0]) == 2 for run in runs)
    return fused, whole


def _fusion(bundle: Bundle) -> Iterator[Finding]:
    if bundle.manifest["quantization"]["scheme"] == "none":
        return
    fused, unfused = fused_weights(bundle)
    if unfused:
        text = f"{unfused} quantized linears are not fused ({fused} are): each is dequantized at every token"
        yield Finding("engine cpu", "warning", text)
    else:
        yield Finding("engine cpu", "yes", f"all {fused} quantized linears are fused")


def _cache() -> Finding:
    place, (entries, size) = disk_cache.folder(), disk_cache.size()
    if place is None:
        return Finding("cache", "fact", "none: EDGEFORMER_CACHE is empty")
    return Finding("cache", "fact", f"{place}: {entries} entries, {_mib(size)}; it may be deleted at any time")


def _board(root: Path = boards.ROOT) -> Iterator[Finding]:
    """The board, and on a Jetson its software, power mode and the way to the engine `cuda`."""
    found = boards.board(root)
    if found is None:
        return
    yield Finding("board", "fact", found.name)
    if found.kind == "raspberrypi":
        told = boards.raspberry_throttling()
        if told is None:
            yield Finding("power", "fact", "vcgencmd is not there, so under-voltage and throttling are unknown")
        elif told:
            yield Finding("power", "warning", f"{', '.join(told)}: see to the power supply and the cooling")
    if found.kind != "jetson":
        return
    yield Finding("jetson", "fact", boards.jetson_system(root))
    mode = boards.power_mode(root)
    told_mode = f"power mode {mode}" if mode else "power mode unknown (sudo nvpmodel -q)"
    yield Finding("power", "fact", f"{told_mode}; sudo nvpmodel -m NUMBER changes it, /etc/nvpmodel.conf lists them")
    if "onnxruntime-gpu" not in installed_wheels():
        yield Finding("install", "fact", f"for the engine cuda: {boards.jetson_install(root)}")
    elif missing := boards.missing_cuda_libraries():
        text = f"{', '.join(missing)} not found by the system's linker (wheels of nvidia-* may hold them)"
        yield Finding("cuda libraries", "warning", text)


def _power(root: Path = boards.ROOT) -> Iterator[Finding]:
    """Battery, temperature, and why the processor is slower than it could be."""
    battery = boards.battery(root)
    if battery is not None and battery.discharging:
        left = "" if battery.percent is None else f", {battery.percent} % left"
        yield Finding("power", "warning", f"on battery{left}: many laptops run slower then; measure on mains")
    heat = boards.temperature(root)
    slow = boards.slowed_down(root)
    if slow:
        yield Finding("heat", "warning", "; ".join(slow) + ("" if heat is None else f"; {heat:.0f} degrees Celsius"))
    elif heat is not None:
        yield Finding("heat", "fact", f"{heat:.0f} degrees Celsius, not slowed down")


def _onnxruntime() -> Iterator[Finding]:
    wheels = installed_wheels()
    both = both_wheels()
    if both:
        yield Finding("onnxruntime", "warning", both)
    try:
        module = import_onnxruntime()
    except EngineUnavailable as error:
        yield Finding("onnxruntime", "no", str(error))
        yield Finding("engine cpu", "no", "needs onnxruntime")
        return
    wheel = next(iter(wheels), "a build without a wheel")
    yield Finding("onnxruntime", "fact", f"{module.__version__} ({wheel}), offers {', '.join(_providers(module))}")
    if version_of(module.__version__) < MINIMUM_QUANTIZED:
        text = (
            f"{module.__version__} is too old for quantized bundles; 1.25 or newer is needed (pip install -U {wheel})"
        )
        yield Finding("engine cpu", "warning", text)
        return
    problem = _try_provider(module, "CPUExecutionProvider")
    yield Finding("engine cpu", "no" if problem else "yes", problem or "a small graph runs")


def _cuda() -> Iterator[Finding]:
    problem = cuda_driver_problem()
    if problem is None:
        try:
            module = import_onnxruntime()
            if "CUDAExecutionProvider" in module.get_available_providers():
                problem = _try_provider(module, "CUDAExecutionProvider")
            else:
                problem = (
                    "there is a device, but this onnxruntime is the CPU build; replace it: pip uninstall onnxruntime, "
                    f"then {pip_install('onnxruntime-gpu')}"
                )
        except EngineUnavailable as error:
            problem = str(error)
    yield Finding("engine cuda", "no" if problem else "yes", problem or "a small graph runs on the device")
    if problem is None:
        missing = "this onnxruntime was built without it"
        if TENSORRT in module.get_available_providers():
            missing = _try_provider(module, TENSORRT) or ""
        yield Finding("tensorrt", "no" if missing else "yes", missing or "a small graph runs on the device")


def _native() -> Iterator[Finding]:
    try:
        from edgeformer import _native as extension
    except ImportError as error:
        text = f"the extension is not built ({error}); install edgeformer where a C++ compiler is"
        yield Finding("engine native", "no", text)
        return
    usable, built = extension.isas(), extension.built_isas()
    features = sorted(name for name, there in extension.cpu_features().items() if there)
    yield Finding("cpu features", "fact", ", ".join(features) or "none that the kernels use")
    missing = [isa for isa in built if isa not in usable]
    rest = f"; built for {', '.join(missing)} too, which this CPU does not have" if missing else ""
    forced = os.environ.get("EDGEFORMER_ISA")
    if forced and forced not in usable:
        text = f"EDGEFORMER_ISA={forced} cannot be used here; usable are {', '.join(usable)}"
        yield Finding("engine native", "no", text)
        return
    chosen = f"; EDGEFORMER_ISA={forced} is set" if forced else ""
    if find_spec("edgeformer.engines.native.engine") is None:
        yield Finding(
            "engine native", "no", "the extension is installed, the Python part of the engine is not; install again"
        )
        return
    yield Finding("engine native", "yes", f"kernels: {', '.join(usable)}{rest}{chosen}")


def _toolchain() -> Iterator[Finding]:
    for topic, command in (("export", "export"), ("training", "train")):
        missing = missing_packages(command)
        if missing:
            text = f"{', '.join(missing)} not installed: {pip_install(*missing)} (not needed on a device)"
            yield Finding(topic, "no", text)
        else:
            yield Finding(topic, "yes", "all packages are installed")


def _try_provider(module: Any, provider: str) -> str | None:
    """Why a small graph does not run on the provider; None when it does."""
    from onnx import TensorProto, helper

    info = helper.make_tensor_value_info
    node = helper.make_node("MatMul", ["x", "x"], ["y"])
    shape = [4, 4]
    graph = helper.make_graph([node], "g", [info("x", TensorProto.FLOAT, shape)], [info("y", TensorProto.FLOAT, shape)])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    options = module.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    try:
        session = module.InferenceSession(model.SerializeToString(), options, providers=[provider])
        if session.get_providers()[0] != provider:
            return f"onnxruntime offers {provider} but runs on {session.get_providers()[0]}: its libraries are missing"
        x = np.eye(4, dtype=np.float32)
        if not np.array_equal(session.run(None, {"x": x})[0], x):
            return f"{provider} gives wrong numbers"
    except (EdgeformerError, RuntimeError, ValueError) as error:
        return f"{provider} fails: {error}"
    except Exception as error:  # onnxruntime's own exceptions derive from Exception
        return f"{provider} fails: {error}"
    return None


def _providers(module: Any) -> list[str]:
    return [name.removesuffix("ExecutionProvider") for name in module.get_available_providers()]


def _gib(size: int | None) -> str:
    return "unknown" if size is None else f"{size / 2**30:.1f} GiB"


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"
