"""CUDA and TensorRT as far as a machine without them can tell: what is asked of ONNX Runtime, and what is refused.

`Pretending` stands for a GPU build of ONNX Runtime: it lists the providers, keeps what it is given, and computes on the
CPU. So it shows which tensors the engine binds to the device and that they are the right ones; not that CUDA works.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import edgeformer
from edgeformer.bundle.bundle import Bundle
from edgeformer.engines import onnxruntime as engine_module
from edgeformer.engines.onnxruntime import OrtEngine
from edgeformer.engines.ort_providers import CPU, CUDA, TENSORRT, require_gpu
from edgeformer.errors import EngineUnavailable, InputError
from edgeformer.tools import doctor

real = pytest.importorskip("onnxruntime")
IDS = np.random.default_rng(5).integers(3, 300, (2, 12))


class Binding:
    """A binding that remembers names, devices and values; "cuda" becomes "cpu" where the real one computes."""

    def __init__(self, session: Any, owner: Pretending) -> None:
        self.real, self.owner = session.io_binding(), owner
        self.inputs: dict[str, Any] = {}
        self.outputs: dict[str, str] = {}

    def bind_ortvalue_input(self, name: str, value: Any) -> None:
        self.inputs[name] = value
        self.real.bind_ortvalue_input(name, value)

    def bind_output(self, name: str, device: str, number: int = 0) -> None:
        self.outputs[name] = device
        self.real.bind_output(name, "cpu", 0)

    def get_outputs(self) -> list[Any]:
        self.produced: list[Any] = self.real.get_outputs()
        for value, device in zip(self.produced, self.outputs.values(), strict=True):
            self.owner.place(value, device)
        return self.produced


class Session:
    """A session on the CPU that says it runs on the providers `owner.runs`."""

    def __init__(self, graph: Any, options: Any, providers: Sequence[Any], owner: Pretending) -> None:
        self.real = real.InferenceSession(graph, options, providers=[CPU])
        self.owner = owner
        owner.providers.append(list(providers))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)

    def get_providers(self) -> list[str]:
        return [*self.owner.runs, CPU]

    def get_provider_graph_assignment_info(self) -> list[Any]:
        nodes = [SimpleNamespace(name="/mul", op_type="MatMul"), SimpleNamespace(name="/shape", op_type="Shape")]
        return [SimpleNamespace(ep_name=self.owner.heavy_on, get_nodes=lambda: nodes)]

    def io_binding(self) -> Binding:
        self.owner.bindings.append(Binding(self.real, self.owner))
        return self.owner.bindings[-1]

    def run_with_iobinding(self, binding: Binding, options: Any) -> None:
        self.real.run_with_iobinding(binding.real, options)


class Pretending:
    """ONNX Runtime of a machine with an NVIDIA GPU."""

    def __init__(self) -> None:
        self.available, self.runs, self.heavy_on = [TENSORRT, CUDA, CPU], [CUDA], CUDA
        self.providers: list[list[Any]] = []  # of each session
        self.fallbacks: list[int] = []  # of each session: whether others may run in their place in silence
        self.bindings: list[Binding] = []  # of each run
        self.devices: dict[int, str] = {}  # of the values, by identity
        self.kept: list[Any] = []
        self.OrtValue = SimpleNamespace(ortvalue_from_numpy=self._value)

    def __getattr__(self, name: str) -> Any:
        return getattr(real, name)

    def get_available_providers(self) -> list[str]:
        return self.available

    def preload_dlls(self) -> None:
        pass

    def InferenceSession(  # noqa: N802
        self, graph: Any, options: Any, providers: Sequence[Any], enable_fallback: int = 1
    ) -> Session:
        self.fallbacks.append(enable_fallback)
        return Session(graph, options, providers, self)

    def place(self, value: Any, device: str) -> Any:
        self.kept.append(value)  # an id is that of one object as long as the object lives
        self.devices[id(value)] = device
        return value

    def device(self, value: Any) -> str:
        return self.devices[id(value)]

    def _value(self, array: np.ndarray, device: str = "cpu", number: int = 0) -> Any:
        return self.place(real.OrtValue.ortvalue_from_numpy(array), device)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Pretending]:
    pretending = Pretending()
    monkeypatch.setattr(engine_module, "import_onnxruntime", lambda: pretending)
    monkeypatch.setattr("edgeformer.engines.ort_install.cuda_driver_problem", lambda: None)
    monkeypatch.setattr(doctor, "cuda_driver_problem", lambda: None)
    monkeypatch.setattr(doctor, "import_onnxruntime", lambda: pretending)
    return pretending


def logits(engine: OrtEngine, state: Any, ids: Any) -> np.ndarray:
    return engine.forward([({"input_ids": ids}, state)])[0]["logits"]


# ---------------------------------------------------------------------------------------------------------------- CUDA


def test_the_cache_stays_on_the_device_and_logits_come_to_the_host(gpu: Pretending, lm: Path) -> None:
    parts = [IDS[:1, :5], IDS[:1, 5:6], IDS[:1, 6:9]]
    cuda = OrtEngine(Bundle.open(lm), "cuda", threads=1)
    state = cuda.new_state()
    got = [logits(cuda, state, part) for part in parts]

    assert set(gpu.fallbacks) == {0}
    caches = cuda.signature.caches  # past -> present
    assert caches and len(gpu.bindings) == len(parts)
    for binding in gpu.bindings:
        assert binding.outputs == dict.fromkeys(cuda.signature.outputs, "cpu") | dict.fromkeys(caches.values(), "cuda")
        assert gpu.device(binding.inputs["input_ids"]) == "cpu"
    for before, after in itertools.pairwise(gpu.bindings):
        made = dict(zip(before.outputs, before.produced, strict=True))
        for past, present in caches.items():  # the very tensors of the step before: no copy through the host
            assert after.inputs[past] is made[present]
            assert gpu.device(after.inputs[past]) == "cuda"

    cpu = OrtEngine(Bundle.open(lm), "cpu", threads=1)
    state = cpu.new_state()
    for part, found in zip(parts, got, strict=True):
        assert np.array_equal(found, logits(cpu, state, part))


def test_inputs_that_stay_for_all_steps_are_copied_to_the_device_once(gpu: Pretending, bundles: Path) -> None:
    engine = OrtEngine(Bundle.open(bundles / "forecast"), "cuda", threads=1)
    values = np.random.default_rng(0).standard_normal((2, 7, 5)).astype(np.float32)
    state = engine.new_state({"values": values})
    for _ in range(2):
        engine.forward([({}, state)])
    first, second = (binding.inputs["values"] for binding in gpu.bindings)
    assert first is second and gpu.device(first) == "cuda"


def test_several_sequences_run_one_after_another_on_cuda(gpu: Pretending, lm: Path) -> None:
    engine = OrtEngine(Bundle.open(lm), "cuda", threads=1)
    assert engine.prepare_batches() == "padded batches were never tried on CUDA"
    states = [engine.new_state() for _ in range(2)]
    engine.forward([({"input_ids": IDS[:1, :3]}, state) for state in states])
    assert len(gpu.bindings) == 2


def test_a_model_generates_on_cuda_what_it_does_on_the_cpu(gpu: Pretending, lm: Path) -> None:
    model = edgeformer.load(lm, threads=1)
    assert model.engine.name == "cuda"  # it comes first
    expected = edgeformer.load(lm, "native", threads=1).generate([5, 6, 7], max_new_tokens=6, temperature=0)
    assert model.generate([5, 6, 7], max_new_tokens=6, temperature=0).ids == expected.ids
    (asked,) = gpu.providers
    assert asked == [(CUDA, {"device_id": 0, "arena_extend_strategy": "kSameAsRequested"}), CPU]


def test_a_session_that_fell_back_to_the_cpu_is_refused(lm):
    """What a GPU wheel without CUDA libraries gives: a session, on the CPU."""
    with pytest.raises(EngineUnavailable, match="the session runs on CPUExecutionProvider"):
        require_gpu(OrtEngine(Bundle.open(lm), threads=1)._session, None)


def test_a_cuda_session_with_heavy_nodes_on_the_cpu_is_refused(lm):
    options = real.SessionOptions()
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    session = real.InferenceSession(str(lm / "model.onnx"), options, providers=["CPUExecutionProvider"])

    class FirstIsCuda:
        """A session whose nodes really are on the CPU, as the real assignment says."""

        get_provider_graph_assignment_info = session.get_provider_graph_assignment_info

        def get_providers(self):
            return ["CUDAExecutionProvider", "CPUExecutionProvider"]

    with pytest.raises(EngineUnavailable, match="heavy nodes would run on the CPU"):
        require_gpu(FirstIsCuda(), None)


# ------------------------------------------------------------------------------------------------------------ TensorRT


@pytest.mark.parametrize(("precision", "half"), [("float32", False), ("float16", True)])
def test_tensorrt_comes_before_cuda_and_keeps_its_engines_in_the_disk_cache(
    gpu: Pretending, bundles: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str, half: bool
) -> None:
    monkeypatch.setenv("EDGEFORMER_CACHE", str(tmp_path))
    gpu.runs = [TENSORRT, CUDA]
    model = edgeformer.load(bundles / "forecast", "cuda", threads=1, tensorrt=precision)
    assert f"TensorRT in {precision}" in str(model.explain())
    (asked,) = gpu.providers
    assert [entry if isinstance(entry, str) else entry[0] for entry in asked] == [TENSORRT, CUDA, CPU]
    options = asked[0][1]
    assert options["trt_fp16_enable"] is half
    assert options["trt_engine_cache_enable"] and options["trt_timing_cache_enable"]
    folder = Path(options["trt_engine_cache_path"])
    assert folder.is_dir() and folder.is_relative_to(tmp_path / "tensorrt")
    assert ".".join(real.__version__.split(".")[:2]) in folder.name


def test_without_a_disk_cache_tensorrt_keeps_nothing(gpu: Pretending, bundles: Path) -> None:
    gpu.runs = [TENSORRT, CUDA]
    edgeformer.load(bundles / "forecast", "cuda", threads=1, tensorrt="float32")
    assert gpu.providers[0][0] == (TENSORRT, {"device_id": 0, "trt_fp16_enable": False})


def test_tensorrt_that_is_not_there_is_said(gpu: Pretending, bundles: Path) -> None:
    with pytest.raises(EngineUnavailable, match=r"TensorRT was requested, but the session runs on CUDAEx.*libraries"):
        edgeformer.load(bundles / "forecast", "cuda", tensorrt="float32")
    gpu.available = [CUDA, CPU]
    with pytest.raises(EngineUnavailable, match="was built without it"):
        edgeformer.load(bundles / "forecast", "cuda", tensorrt="float32")


def test_tensorrt_is_refused_for_a_graph_with_a_cache(gpu: Pretending, lm: Path) -> None:
    with pytest.raises(EngineUnavailable, match="KV cache: its shape changes at each token"):
        edgeformer.load(lm, "cuda", tensorrt="float16")
    assert gpu.providers == []


def test_heavy_nodes_may_run_on_tensorrt_too(gpu: Pretending, bundles: Path) -> None:
    gpu.runs, gpu.heavy_on = [TENSORRT, CUDA], TENSORRT
    edgeformer.load(bundles / "forecast", "cuda", tensorrt="float32")
    gpu.heavy_on = CPU
    with pytest.raises(EngineUnavailable, match=r"1 of the graph's heavy nodes would run on the CPU: /mul \(MatMul\)"):
        edgeformer.load(bundles / "forecast", "cuda", tensorrt="float32")


@pytest.mark.parametrize(
    ("engine", "tensorrt", "expected"),
    [
        ("cuda", "int8", "tensorrt is 'int8', expected None or 'float32' or 'float16'"),
        ("cuda", True, "tensorrt is True"),
        ("auto", "float16", "tensorrt='float16' is an option of the cuda engine, but engine is 'auto'"),
        ("native", "float32", "option of the cuda engine"),
    ],
)
def test_a_wrong_use_of_the_option_is_refused(bundles: Path, engine: Any, tensorrt: Any, expected: str) -> None:
    with pytest.raises(InputError, match=re.escape(expected)):
        edgeformer.load(bundles / "forecast", engine, tensorrt=tensorrt)


def test_doctor_says_whether_tensorrt_runs(gpu: Pretending) -> None:
    def told() -> dict[str, tuple[str, str]]:
        return {finding.topic: (finding.verdict, finding.text) for finding in doctor._cuda()}

    assert told()["engine cuda"][0] == "yes"
    assert told()["tensorrt"] == ("no", f"onnxruntime offers {TENSORRT} but runs on {CUDA}: its libraries are missing")
    gpu.runs = [TENSORRT, CUDA]
    gpu.available = [TENSORRT, CPU]
    assert told()["engine cuda"][0] == "no" and "tensorrt" not in told()
    gpu.available = [CUDA, CPU]
    gpu.runs = [CUDA]
    assert told()["tensorrt"] == ("no", "this onnxruntime was built without it")
