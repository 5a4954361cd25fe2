"""The ONNX Runtime engines: `cpu` and `cuda`. The KV cache stays on the device, as OrtValues."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import threading
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from edgeformer.bundle.bundle import Bundle
from edgeformer.bundle.signature import IDS, KEEP, PAST, Array, Signature
from edgeformer.engines.base import CHUNK_TOKENS, Arrays, KvChunk, State
from edgeformer.engines.ort_install import both_wheels, check_cuda, check_version, import_onnxruntime
from edgeformer.errors import BundleError, EdgeformerError, EngineUnavailable, InputError, StateError
from edgeformer.machine import default_threads

Provider = Literal["cpu", "cuda"]

HEAVY = {"MatMul", "MatMulNBits", "Gemm", "Attention", "Conv"}  # all of these must run on CUDA with provider="cuda"


@dataclass(frozen=True)
class OpRun:
    """One profiled execution of a node: its operator, seconds, and the shapes of its inputs other than weights."""

    operator: str
    seconds: float
    shapes: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, eq=False)
class OrtChunk:
    """See `KvChunk`: copies of a part of each cache tensor, [1, kv_heads, CHUNK_TOKENS, head_dim], in host memory."""

    owner: OrtEngine
    arrays: tuple[Array, ...]

    @property
    def nbytes(self) -> int:
        """See `KvChunk.nbytes`."""
        return sum(array.nbytes for array in self.arrays)


class OrtState:
    """The KV cache of one sequence, or of one batch of equal length: OrtValues [batch, kv_heads, length, head_dim]."""

    def __init__(self, owner: OrtEngine, static_inputs: dict[str, Any] | None = None, batch: int | None = None) -> None:
        self.owner = owner
        self.lock = threading.Lock()
        self.cache: list[Any] = []  # in the order of signature.caches; empty before the first token
        self.static_inputs = static_inputs or {}  # OrtValues on the device
        self._fixed_batch = batch
        self.batch = batch
        self._length = 0

    @property
    def length(self) -> int:
        """See `State.length`."""
        return self._length

    @property
    def nbytes(self) -> int:
        """See `State.nbytes`. Tensors that forks share until their next step count in each of them."""
        return self.owner.kv_bytes(self._length) * (self.batch or 1)

    def truncate(self, length: int) -> None:
        """See `State.truncate`."""
        if not 0 <= length <= self._length:
            raise InputError(f"A state of {self._length} tokens cannot be cut to {length}.")
        with _locked([self]):
            if length == 0:
                self.cache, self.batch = [], self._fixed_batch
            elif length < self._length:
                self.cache = [self.owner.to_device(np.ascontiguousarray(v.numpy()[:, :, :length])) for v in self.cache]
            self._length = length

    def fork(self) -> OrtState:
        """See `State.fork`."""
        with _locked([self]):
            copy = OrtState(self.owner, self.static_inputs, self._fixed_batch)
            # A step creates new OrtValues and does not write to old ones, so both states may share them.
            copy.cache, copy.batch, copy._length = list(self.cache), self.batch, self._length
            return copy

    @property
    def shortest(self) -> int:
        """See `State.shortest`."""
        return 0

    def chunks(self, first: int = 0) -> list[KvChunk]:
        """See `State.chunks`. They are copies."""
        if self.batch not in (None, 1):
            raise InputError(f"Chunks are of one sequence, the state holds {self.batch}.")
        starts = range(first * CHUNK_TOKENS, self._length - CHUNK_TOKENS + 1, CHUNK_TOKENS)
        if not starts:
            return []
        with _locked([self]):
            whole = [value.numpy() for value in self.cache]
        return [OrtChunk(self.owner, tuple(a[:, :, at : at + CHUNK_TOKENS].copy() for a in whole)) for at in starts]

    def restore(self, chunks: Sequence[KvChunk], length: int) -> int:
        """See `State.restore`."""
        arrays = []
        for chunk in chunks:
            if not isinstance(chunk, OrtChunk) or chunk.owner is not self.owner:
                raise StateError("A chunk belongs to another engine; restore chunks of this engine's states.")
            arrays.append(chunk.arrays)
        if not 0 <= length <= len(chunks) * CHUNK_TOKENS:
            raise InputError(f"{len(chunks)} chunks cannot restore {length} tokens.")
        with _locked([self]):
            if self._length:
                raise StateError(f"The state has {self._length} tokens; restore needs an empty one.")
            if length:
                parts = (np.concatenate(layer, axis=2)[:, :, :length] for layer in zip(*arrays, strict=True))
                self.cache = [self.owner.to_device(np.ascontiguousarray(part)) for part in parts]
                self.batch, self._length = 1, length
        return length

    def select(self, rows: Sequence[int]) -> None:
        """See `State.select`."""
        if self.batch is None or len(rows) != self.batch or not all(0 <= row < self.batch for row in rows):
            raise InputError(f"A state of {self.batch} sequences cannot select {list(rows)}.")
        if list(rows) == list(range(self.batch)):
            return
        with _locked([self]):
            self.cache = [self.owner.to_device(np.ascontiguousarray(value.numpy()[list(rows)])) for value in self.cache]

    def grow(self, cache: list[Any], batch: int, tokens: int) -> None:
        """Replace the cache by the one that a run returned. The caller must own the lock."""
        self.cache, self.batch, self._length = cache, batch, self._length + tokens


class OrtEngine:
    """Runs a graph on ONNX Runtime. Immutable: threads may share one engine, but not a state.

    `threads` defaults to `default_threads()`, because ONNX Runtime's own default uses all cores and pins its threads.
    `spin=False` lets idle threads sleep at once: slower, but idle cores save power. `profile` is a folder for
    profiler output; `end_profile` then returns the times.

    Raises:
        EngineUnavailable: ONNX Runtime is missing, incomplete or too old for this bundle, or the graph would not run on
            `provider`. The engine never falls back to another provider.
    """

    def __init__(
        self,
        bundle: Bundle,
        provider: Provider = "cpu",
        threads: int | None = None,
        graph: str = "model",
        spin: bool = True,
        profile: Path | None = None,
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
        self._session = self._create(bundle, graph, spin, profile)
        self._check_signature(bundle, graph)
        self._caches = self.signature.caches

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

    def forward(self, batch: Sequence[tuple[Arrays, State]]) -> list[dict[str, np.ndarray]]:
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
        with _locked(states):
            checked = [
                self.signature.check(inputs, state.length, state.batch, state.static_inputs)
                for (inputs, _), state in zip(batch, states, strict=True)
            ]
            return [self._run(arrays, state) for arrays, state in zip(checked, states, strict=True)]

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

    def _run(self, arrays: dict[str, Array], state: OrtState) -> dict[str, Array]:
        binding = self._session.io_binding()
        value = self._ort.OrtValue.ortvalue_from_numpy
        for name, array in arrays.items():
            if name != KEEP or int(array) != 0:  # 0 is the graph's default
                binding.bind_ortvalue_input(name, value(array))
        for name, value in state.static_inputs.items():
            if name not in arrays:
                binding.bind_ortvalue_input(name, value)
        rows = next(iter(arrays.values())).shape[0] if self._caches else 0
        cache = state.cache or [self._empty(name, rows) for name in self._caches]
        for name, past in zip(self._caches, cache, strict=True):
            binding.bind_ortvalue_input(name, past)
        for name in self.signature.outputs:
            binding.bind_output(name, "cpu")
        for name in self._caches.values():
            binding.bind_output(name, self._device, 0)
        try:
            self._session.run_with_iobinding(binding)
        except Exception as error:
            _reraise(error)
        values = binding.get_outputs()
        count = len(self.signature.outputs)
        if self._caches:
            state.grow(values[count:], rows, arrays[IDS].shape[1] if IDS in arrays else 0)
        return {name: v.numpy() for name, v in zip(self.signature.outputs, values[:count], strict=True)}

    def _empty(self, name: str, rows: int) -> Any:
        port = self.signature.cache_ports[name]
        shape = [rows] + [size if isinstance(size, int) else 0 for size in port.shape[1:]]
        return self._ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, port.dtype))

    def _create(self, bundle: Bundle, graph: str, spin: bool, profile: Path | None) -> Any:
        options = self._ort.SessionOptions()
        if profile is not None:
            options.enable_profiling = True
            options.profile_file_prefix = str(profile / "onnxruntime")
        options.intra_op_num_threads = self.threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        options.add_session_config_entry("session.intra_op.allow_spinning", "1" if spin else "0")
        providers: list[Any] = ["CPUExecutionProvider"]
        if self.provider == "cuda":
            options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
            # The cache is a new, slightly larger tensor at each step; doubling the arena would waste memory.
            cuda = {"device_id": 0, "arena_extend_strategy": "kSameAsRequested"}
            providers = [("CUDAExecutionProvider", cuda), "CPUExecutionProvider"]
        path = bundle.graph_path(graph)
        try:
            session = self._ort.InferenceSession(str(path), options, providers=providers)
        except Exception as error:
            raise EngineUnavailable(f"ONNX Runtime {self.version} cannot load {path}: {_brief(error)}") from error
        session.disable_fallback()
        if self.provider == "cuda":
            self._require_cuda(session)
        return session

    def _require_cuda(self, session: Any) -> None:
        first = session.get_providers()[0]
        if first != "CUDAExecutionProvider":
            raise EngineUnavailable(
                f"CUDA was requested, but the session runs on {first}: the CUDA or cuDNN libraries that this "
                f"onnxruntime needs are missing or have another version. Install edgeformer[cuda], or use engine='cpu'."
            )
        elsewhere: dict[str, str] = {}
        for part in getattr(session, "get_provider_graph_assignment_info", list)():
            for node in part.get_nodes():
                if part.ep_name != "CUDAExecutionProvider" and node.op_type in HEAVY:
                    elsewhere[node.name] = node.op_type
        if elsewhere:
            some = ", ".join(f"{name} ({op})" for name, op in list(elsewhere.items())[:4])
            raise EngineUnavailable(
                f"CUDA was requested, but {len(elsewhere)} of the graph's heavy nodes would run on the CPU: {some}. "
                f"Export with --dtype float16, or use engine='cpu'."
            )

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


@contextlib.contextmanager
def _locked(states: Sequence[OrtState]) -> Iterator[None]:
    """Lock all states for one call, or raise StateError: a second call on a state would mix the tokens of both."""
    taken: list[OrtState] = []
    try:
        for state in states:
            if not state.lock.acquire(blocking=False):
                raise StateError("The state is in use by another call; use one state per thread, for example a fork().")
            taken.append(state)
        yield
    finally:
        for state in taken:
            state.lock.release()


def _brief(error: Exception) -> str:
    text = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", str(error).strip())
    return text if len(text) <= 600 else text[:600] + " ..."


def _reraise(error: Exception) -> None:
    text = str(error)
    if "allocate memory" in text or "out of memory" in text.lower() or isinstance(error, MemoryError):
        raise EdgeformerError(
            f"Out of memory while running the model; the state is as before. {_brief(error)}"
        ) from error
    if "INVALID_ARGUMENT" in text:
        raise InputError(f"ONNX Runtime rejects the inputs: {_brief(error)}") from error
    raise EdgeformerError(f"ONNX Runtime failed; the state is as before. {_brief(error)}") from error
