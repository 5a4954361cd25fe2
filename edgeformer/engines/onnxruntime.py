"""The ONNX Runtime engines: `cpu` and `cuda`. The KV cache stays on the device, as OrtValues."""

from __future__ import annotations

import json
import math
import os
import re
import threading
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from edgeformer.bundle.bundle import Bundle
from edgeformer.bundle.signature import IDS, KEEP, PAST, Array, Signature
from edgeformer.engines.base import Arrays, Outputs, State
from edgeformer.engines.in_flight import in_flight
from edgeformer.engines.interruptible import interruptible
from edgeformer.engines.ort_install import both_wheels, check_cuda, check_version, import_onnxruntime
from edgeformer.engines.ort_padding import CACHE_MASK, cannot_pad, masked_graph
from edgeformer.engines.ort_providers import CPU, gpu_providers, require_gpu
from edgeformer.engines.ort_state import Call, Joint, OrtState, locked, short
from edgeformer.errors import (
    BundleError,
    EdgeformerError,
    EngineUnavailable,
    InputError,
    OutOfMemory,
    StateError,
    check_memory,
)
from edgeformer.machine import default_threads

Provider = Literal["cpu", "cuda"]
Commit = Callable[[], None]
Run = tuple[dict[str, Array], Commit]

TOLERANCE = 1e-3  # of the range of logits, where the bundle names none

SHORT = 64  # most elements of the inputs of a call that is not worth a thread, which takes 0.1 ms
# Bytes that must be free before a run: where none are left for its own small objects, ONNX Runtime ends the process.
ROOM = 16 << 20


@dataclass(frozen=True)
class OpRun:
    """One profiled execution of a node: its operator, seconds, and the shapes of its inputs other than weights."""

    operator: str
    seconds: float
    shapes: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Loaded:
    """A graph in ONNX Runtime; `masked` says that it has the input `CACHE_MASK`."""

    session: Any
    masked: bool = False


class OrtEngine:
    """Runs a graph on ONNX Runtime. Immutable: threads may share one engine, but not a state.

    `threads` defaults to `default_threads()`, because ONNX Runtime's own default uses all cores and pins its threads.
    `spin=False` lets idle threads sleep at once: slower, but idle cores save power. `profile` is a folder for
    profiler output; `end_profile` then returns the times. `tensorrt` ("float32" or "float16") puts TensorRT before
    CUDA; see `ort_providers`.

    Raises:
        EngineUnavailable: ONNX Runtime is missing, incomplete or too old for this bundle, or the graph would not run on
            `provider` or TensorRT. The engine never falls back to another provider.
    """

    def __init__(
        self,
        bundle: Bundle,
        provider: Provider = "cpu",
        threads: int | None = None,
        graph: str = "model",
        spin: bool = True,
        profile: Path | None = None,
        tensorrt: str | None = None,
    ) -> None:
        if provider not in ("cpu", "cuda"):
            raise InputError(f"provider is {provider!r}, expected 'cpu' or 'cuda'.")
        if threads is not None and (type(threads) is not int or not 1 <= threads <= 1024):
            raise InputError(f"threads is {threads!r}, expected a whole number from 1 to 1024.")
        self._ort = import_onnxruntime()
        both = both_wheels()
        if both:
            warnings.warn(f"{both}.", RuntimeWarning, stacklevel=2)
        self.version: str = self._ort.__version__
        check_version(self.version, bundle)
        self.provider: Provider = provider
        self.threads = threads or default_threads()
        self.signature = Signature.of(bundle, graph)
        self._device = "cpu"
        if provider == "cuda":
            check_cuda(self._ort)
            self._device = "cuda"
        self._pid = os.getpid()
        self._path, self._spin, self.tensorrt = bundle.graph_path(graph), spin, tensorrt
        self.loaded = Loaded(self._create(str(self._path), profile))
        self._check_signature(bundle, graph)
        self._caches = self.signature.caches
        tolerances = (bundle.manifest["reference"] or {}).get("tolerance", {})
        self.tolerance: float = tolerances.get("logits") or TOLERANCE
        self.gate = threading.Lock()  # held while locks of states are taken
        self._judging = threading.Lock()
        self._judged = False
        self._alone_because = cannot_pad(self.signature)
        if provider == "cuda":
            self._alone_because = "padded batches were never tried on CUDA"
        if profile is not None:
            self._alone_because = "a profile is of one session, and padded batches need another one"

    @property
    def name(self) -> str:
        """`"cpu"` or `"cuda"`."""
        return self.provider

    @property
    def rows_are_exact(self) -> bool:
        """No: ONNX Runtime's matrix products depend on the number of rows."""
        return False

    def new_state(self, static_inputs: Arrays | None = None) -> OrtState:
        """See `Engine.new_state`."""
        if not static_inputs:
            return OrtState(self)
        arrays = self.signature.check_some(static_inputs)
        batch = next(iter(arrays.values())).shape[0]
        return OrtState(self, {name: self.to_device(array) for name, array in arrays.items()}, batch)

    def forward(self, batch: Sequence[tuple[Arrays, State]]) -> list[Outputs]:
        """See `Engine.forward`."""
        if os.getpid() != self._pid:
            raise StateError(
                "This engine was loaded before fork(); its threads do not exist in this process. Load it here."
            )
        states: list[OrtState] = []
        for _, state in batch:
            if not isinstance(state, OrtState) or state.owner is not self:
                raise StateError("The state belongs to another engine; create one with this engine's new_state().")
            states.append(state)
        with in_flight, locked(states):
            calls = [
                (self.signature.check(inputs, state.length, state.batch, state.static_inputs), state)
                for (inputs, _), state in zip(batch, states, strict=True)
            ]
            return [Outputs(found) for found in self._run(calls)]

    def prepare_batches(self) -> str | None:
        """Why several states of one `forward` run one after another here; None if short calls run as a padded batch.

        The first answer takes as long as loading the bundle: the graph is loaded again, with a mask for padding, and
        its numbers are compared. `forward` asks when it first gets several short calls.
        """
        with self._judging:
            if not self._judged and self._alone_because is None:
                self._alone_because = self._use_mask()
            self._judged = True
            return self._alone_because

    def kv_bytes(self, tokens: int) -> int:
        """See `Engine.kv_bytes`. A step needs twice as much for a moment: it copies the past to a new tensor."""
        if tokens < 0:
            raise InputError(f"tokens is {tokens}, expected at least 0.")
        ports = self.signature.cache_ports.values()  # [batch, kv_heads, past, head_dim]
        sizes = (math.prod(size for size in port.shape if isinstance(size, int)) for port in ports)
        widths = (np.dtype(port.dtype).itemsize for port in ports)
        return tokens * sum(size * width for size, width in zip(sizes, widths, strict=True))

    def to_device(self, array: Array) -> Any:
        """The array copied to an OrtValue on this engine's device."""
        return self._ort.OrtValue.ortvalue_from_numpy(array, self._device, 0)

    def end_profile(self) -> list[OpRun]:
        """All node executions so far, in order. Needs `profile`; can be called once."""
        runs = []
        for event in json.loads(Path(self._session.end_profiling()).read_text()):
            facts = event.get("args", {})
            if event.get("cat") == "Node" and "op_name" in facts and event["name"].endswith("_kernel_time"):
                shapes = tuple(tuple(s) for entry in facts.get("input_type_shape", []) for s in entry.values())
                runs.append(OpRun(facts["op_name"], event["dur"] / 1e6, shapes))
        return runs

    def run_alone(self, loaded: Loaded, arrays: Arrays, state: OrtState) -> Run:
        """The outputs of one call, and a function that appends its tokens to the state."""
        rows = next(iter(arrays.values())).shape[0] if self._caches else 0
        past = state.cache or [self._empty(name, rows) for name in self._caches]
        static = {name: value for name, value in state.static_inputs.items() if name not in arrays}
        if loaded.masked:
            count = arrays[IDS].shape[1]
            arrays = {**arrays, CACHE_MASK: np.ones((rows, 1, count, state.length + count), np.bool_)}
        outputs, present = self._execute(loaded, arrays, static, past)
        count = arrays[IDS].shape[1] if IDS in arrays else 0
        return outputs, lambda: state.grow(present, rows, count) if self._caches else None

    def run_joint(self, loaded: Loaded, joint: Joint, calls: Sequence[Call]) -> tuple[list[dict[str, Array]], Commit]:
        """The outputs of all calls, one for each member of `joint`, and a function that appends their tokens."""
        outputs, present = self._execute(loaded, joint.feeds(calls), {}, joint.values)

        def commit() -> None:
            joint.grow(calls, present)
            for arrays, state in calls:
                state.grow_joint(arrays[IDS].shape[1])

        return [{"logits": logits} for logits in joint.logits(calls, outputs["logits"])], commit

    def _run(self, calls: Sequence[Call]) -> list[dict[str, Array]]:
        """The outputs of each call. The states change once all runs succeeded."""
        together = [call for call in calls if self._alone_because is None and short(*call)]
        if len(together) < 2 or self.prepare_batches() is not None:
            together = []
        loaded = self.loaded
        outputs: dict[int, dict[str, Array]] = {}  # by the identity of the state
        commits = []
        if together:
            states = [state for _, state in together]
            found, commit = self.run_joint(loaded, Joint.joining(states), together)
            outputs.update(zip(map(id, states), found, strict=True))
            commits.append(commit)
        for arrays, state in calls:
            if id(state) not in outputs:
                outputs[id(state)], commit = self.run_alone(loaded, arrays, state)
                commits.append(commit)
        for commit in commits:
            commit()
        return [outputs[id(state)] for _, state in calls]

    def _execute(
        self, loaded: Loaded, arrays: Arrays, static: dict[str, Any], past: list[Any]
    ) -> tuple[dict[str, Array], list[Any]]:
        """(the outputs, the OrtValues of the new cache)."""
        check_memory(ROOM, "running the model; the state is as before")
        binding = loaded.session.io_binding()
        value = self._ort.OrtValue.ortvalue_from_numpy
        for name, array in arrays.items():
            if name != KEEP or int(array) != 0:  # 0 is the graph's default
                binding.bind_ortvalue_input(name, value(array))
        for name, held in (*static.items(), *zip(self._caches, past, strict=True)):
            binding.bind_ortvalue_input(name, held)
        for name in self.signature.outputs:
            binding.bind_output(name, "cpu")
        for name in self._caches.values():
            binding.bind_output(name, self._device, 0)
        options = self._ort.RunOptions()

        def call() -> None:
            loaded.session.run_with_iobinding(binding, options)

        try:
            # On CUDA each thread has handles of its own, which take longer to make than a step.
            if self.provider == "cpu" and max((array.size for array in arrays.values()), default=0) > SHORT:
                interruptible(call, lambda: setattr(options, "terminate", True))
            else:
                call()
        except Exception as error:
            _reraise(error)
        values = binding.get_outputs()
        count = len(self.signature.outputs)
        return {name: v.numpy() for name, v in zip(self.signature.outputs, values[:count], strict=True)}, values[count:]

    def _use_mask(self) -> str | None:
        """Load the graph with a mask in place of the one without; why not, if that is impossible or gives others."""
        graph = masked_graph(self._path)
        if isinstance(graph, str):
            return graph
        try:
            masked = Loaded(self._create(graph, None), masked=True)
            problem = _padding_problem(self, masked)
        except EdgeformerError as error:
            return f"the graph with a mask does not run: {error}"
        if problem is None:
            self.loaded = masked  # it runs single sequences too, with the same numbers, so one is enough
        return problem

    def _empty(self, name: str, rows: int) -> Any:
        port = self.signature.cache_ports[name]
        shape = [rows] + [size if isinstance(size, int) else 0 for size in port.shape[1:]]
        return self._ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, port.dtype))

    @property
    def _session(self) -> Any:
        return self.loaded.session

    def _create(self, graph: str | bytes, profile: Path | None) -> Any:
        """A session for a file, or for a serialized graph whose weights stand beside that file."""
        options = self._ort.SessionOptions()
        if profile is not None:
            options.enable_profiling = True
            options.profile_file_prefix = str(profile / "onnxruntime")
        options.intra_op_num_threads = self.threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        options.add_session_config_entry("session.intra_op.allow_spinning", "1" if self._spin else "0")
        if isinstance(graph, bytes):
            folder = str(self._path.resolve().parent)
            options.add_session_config_entry("session.model_external_initializers_file_folder_path", folder)
        providers: list[Any] = [CPU]
        if self.provider == "cuda":
            options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
            providers = gpu_providers(self._ort, self.tensorrt, bool(self.signature.caches))

        def create() -> Any:
            with in_flight:
                # Its fallback prints, and tries the same provider again.
                return self._ort.InferenceSession(graph, options, providers=providers, enable_fallback=0)

        try:
            session = interruptible(create)
        except Exception as error:
            raise EngineUnavailable(f"ONNX Runtime {self.version} cannot load {self._path}: {_brief(error)}") from error
        session.disable_fallback()
        if self.provider == "cuda":
            require_gpu(session, self.tensorrt)
        return session

    def _check_signature(self, bundle: Bundle, graph: str) -> None:
        session, table = self._session, bundle.manifest["graphs"][graph]
        inputs = [*session.get_inputs(), *session.get_overridable_initializers()]
        for side, ports in (("inputs", inputs), ("outputs", session.get_outputs())):
            actual, listed = {port.name for port in ports}, set(table[side])
            if actual != listed:
                odd = ", ".join(sorted(actual ^ listed)[:6])
                raise BundleError(f"{bundle.path}: the manifest and {table['file']} disagree about the {side}: {odd}.")
        if any(present not in table["outputs"] for present in self.signature.caches.values()):
            raise BundleError(f"{bundle.path}: a {PAST}* input has no present.* output; export the model again.")


def _padding_problem(engine: OrtEngine, masked: Loaded) -> str | None:
    """How a padded batch in the graph `masked` differs from sequences that run alone; None if it does not.

    Whatever stands in the padding, the numbers are the same to the bit; and they are those of a sequence alone, up to
    the tolerance that the bundle has for an engine.
    """
    rng = np.random.default_rng(0)
    most = engine.signature.vocab_size or 1

    def call(state: OrtState, tokens: int) -> Call:
        return engine.signature.check({IDS: rng.integers(0, most, (1, tokens))}, state.length), state

    states = [engine.new_state() for _ in range(3)]
    for state, length in zip(states, (1, 9, 4), strict=True):
        engine.run_alone(engine.loaded, *call(state, length))[1]()
    calls = [call(state, tokens) for state, tokens in zip(states, (2, 1, 1), strict=True)]
    expected = [engine.run_alone(engine.loaded, *one)[0]["logits"] for one in calls]
    found = []
    for fill in (0.0, 4.0):
        joint = Joint.of(states, fill)
        for row, state in enumerate(states):
            state.row = row
        found.append([one["logits"] for one in engine.run_joint(masked, joint, calls)[0]])
    for first, second, wanted in zip(*found, expected, strict=True):
        if not np.array_equal(first, second):
            return "the padding changes the logits"
        far = float(np.abs(first.astype(np.float64) - wanted).max() / (np.ptp(wanted.astype(np.float64)) or 1.0))
        if not far <= engine.tolerance:
            return f"padded logits differ by {far:.3g} of their range from those alone, allowed {engine.tolerance:.3g}"
    return None


def _brief(error: Exception) -> str:
    text = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", str(error).strip())
    return text if len(text) <= 600 else text[:600] + " ..."


def _reraise(error: Exception) -> None:
    text = str(error)
    signs = ("allocate memory", "bad_alloc", "out of memory")
    if isinstance(error, MemoryError) or any(sign in text.lower() for sign in signs):
        raise OutOfMemory(f"Out of memory while running the model; the state is as before. {_brief(error)}") from error
    if "INVALID_ARGUMENT" in text:
        raise InputError(f"ONNX Runtime rejects the inputs: {_brief(error)}") from error
    raise EdgeformerError(f"ONNX Runtime failed; the state is as before. {_brief(error)}") from error
