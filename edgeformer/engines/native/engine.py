"""The native engine: lowers a bundle's graph and runs it in C++, without torch and without onnxruntime."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import edgeformer
from edgeformer.bundle.context import context_length
from edgeformer.bundle.manifest import MANIFEST
from edgeformer.bundle.signature import LOGITS, Array
from edgeformer.engines.base import Outputs
from edgeformer.engines.in_flight import in_flight
from edgeformer.engines.native.cache_type import cache_type
from edgeformer.engines.native.inputs import fits, fitting, whole
from edgeformer.engines.native.options import NativeOptions
from edgeformer.engines.native.program.executable import Executable, load_executable
from edgeformer.engines.native.program.packing import give_weights
from edgeformer.engines.native.program.program import KEEP_INPUT
from edgeformer.engines.native.state import NativeState, saved_parts
from edgeformer.errors import EngineUnavailable, InputError, StateError, typed_errors
from edgeformer.machine import default_threads

if TYPE_CHECKING:
    from edgeformer import _native
    from edgeformer.bundle.bundle import Bundle
    from edgeformer.engines.base import KvChunk
    from edgeformer.engines.native.profile import Profile
    from edgeformer.engines.native.program.program import Program

NUMPY: dict[str, np.dtype[Any]] = {"f32": np.dtype(np.float32), "i64": np.dtype(np.int64), "bool": np.dtype(np.bool_)}
PREFILL_ROWS = 512  # rows of one pass: bounds the working memory of long prompts and of large batches
DEFAULT_CONTEXT = 4096


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes that an engine needs: packed weights, the cache of one state at `context` tokens, working memory."""

    weights: int
    kv: int
    scratch: int
    context: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.kv + self.scratch

    def __add__(self, other: Memory) -> Memory:
        """What two engines need together, if both run."""
        return Memory(
            self.weights + other.weights,
            self.kv + other.kv,
            self.scratch + other.scratch,
            max(self.context, other.context),
        )


class NativeEngine:
    """Runs one graph of a bundle. Immutable; many threads may share it, each with states of its own.

    Made by `from_bundle` or `create`. Calls of several threads run one after another; in a call all `threads` work.
    """

    name = "native"
    rows_are_exact = True

    def __init__(self, native: _native.Engine, executable: Executable, path: Path, fingerprint: str) -> None:
        self._native = native
        self._path = path
        self._fingerprint = fingerprint
        self._dtypes = executable.dtypes
        self._defaults = executable.defaults
        self._inputs = [(name, NUMPY[dtype], shape) for name, dtype, shape in executable.inputs]
        self._outputs = executable.outputs
        self._converted = [name for name in self._outputs if self._dtypes.get(name) in ("float16", "float64")]
        self._known = {name for name, _, _ in self._inputs} | {KEEP_INPUT}
        self._symbols = list(executable.program["symbols"])
        self._rows, self._past, self._batch_local = executable.rows, executable.past, executable.batch_local
        self.kv = "float32"  # the type of keys and values in the cache
        self.int8_layers: tuple[int, ...] = ()  # the layers whose cache is int8; the others' is float32
        self.cache = ""  # the type of the cache, why, and what it costs, for people; "" without one
        self.rounded = 0  # weights with scales that are not exact in float16: rounded to nearest

    @classmethod
    def from_bundle(
        cls,
        bundle: Bundle | str | os.PathLike[str],
        *,
        graph: str = "model",
        threads: int | None = None,
        isa: str | None = None,
        kv: str = "auto",
        context: int | None = None,
        memory_limit: int | None = None,
    ) -> NativeEngine:
        """The engine for the graph `graph` of `bundle`; see `create`, and `NativeOptions` for the options."""
        return cls.create(bundle, graph, threads, NativeOptions(isa, kv, context, memory_limit))

    @classmethod
    def create(
        cls,
        bundle: Bundle | str | os.PathLike[str],
        graph: str,
        threads: int | None,
        options: NativeOptions,
        while_packing: Callable[[], object] = lambda: None,
    ) -> NativeEngine:
        """The engine for one graph of a bundle (a Bundle, or the path of a bundle or of an .onnx file).

        `threads` defaults to `default_threads()`. `while_packing` is called once, while other threads pack the weights
        and the GIL is free.

        Raises:
            EngineUnavailable: the extension is missing, the graph has nodes that cannot be lowered (all are named),
                the table does not run here, or the memory would pass `memory_limit` (nothing is allocated then).
            BundleError: the graph or its weights cannot be read.
        """
        try:
            import edgeformer._native as extension
        except ImportError as e:
            raise EngineUnavailable(
                f"the native extension is not installed ({e}); "
                "install edgeformer with a C++17 compiler, or use engine='cpu'"
            ) from e
        path, opened = graph_file(bundle, graph)
        executable = load_executable(path, use_disk_cache=options.use_disk_cache)
        cache = cache_type(options, executable, path, opened)
        context = options.context if options.context is not None else _default_context(opened, graph)
        threads = default_threads() if threads is None else threads
        with typed_errors("the native engine was made", EngineUnavailable):
            native = extension.Engine(
                cache.of(executable.program), threads, options.isa or "", cache.kind, int(context), PREFILL_ROWS
            )
        engine = cls(native, executable, path, _fingerprint(path, opened))
        engine.kv, engine.int8_layers, engine.cache = cache.kind, cache.int8_layers, cache.text
        if options.memory_limit is not None:
            engine._check_memory(options.memory_limit)
        extension.trim_memory()  # what reading the graph took
        with in_flight:
            engine.rounded = give_weights(native, executable, while_packing, may_copy=options.memory_limit is None)
        extension.trim_memory()  # what `while_packing` took, before the weights are in use
        return engine

    def _check_memory(self, limit: int) -> None:
        need = self.memory()
        if need.total > limit:
            raise EngineUnavailable(
                f"the model needs {need.total:,} bytes ({need.weights:,} of weights, {need.kv:,} of cache for "
                f"{need.context:,} tokens, {need.scratch:,} to work in), the limit is {limit:,}; "
                "load with a smaller context, or export with fewer bits"
            )

    @property
    def isa(self) -> str:
        """Name of the kernel table in use."""
        return str(self._native.isa)

    @property
    def threads(self) -> int:
        """Threads that work together in a call."""
        return int(self._native.threads)

    @property
    def context(self) -> int:
        """Most tokens that a state may hold."""
        return int(self._native.context)

    @cached_property
    def program(self) -> Program:
        """The lowered program, made from the graph again; `edgeformer.engines.native.describe` prints it."""
        from edgeformer.engines.native.program.lowering import lower_bundle

        return lower_bundle(self._path)[0]

    def memory(self, context: int | None = None) -> Memory:
        """Bytes needed for one state of `context` tokens (default: the engine's limit), without Python itself.

        Other dynamic axes of the inputs (the source of a decoder) count as `context` long.
        """
        tokens = whole("context", self.context if context is None else context)
        rows = min(PREFILL_ROWS, tokens)
        batch, sequence = self._rows
        sizes = {batch: 1, sequence: rows, "kept": 1}
        sizes[self._past] = tokens - rows
        others = {str(size) for _, _, shape in self._inputs for size in shape} - sizes.keys()
        symbols = [sizes.get(s, tokens if s in others else 1) for s in self._symbols]
        try:
            scratch = self._native.scratch_bytes(symbols, rows, max(0, tokens - rows))
        except Exception as e:  # sizes of inputs that this program cannot have
            raise InputError(f"the working memory cannot be predicted for {tokens} tokens: {e}") from e
        return Memory(self._native.weight_bytes, self.kv_bytes(tokens), scratch, tokens)

    def kv_bytes(self, tokens: int) -> int:
        """See `edgeformer.engines.base.Engine.kv_bytes`. The cache grows in chunks of 128 tokens."""
        return int(self._native.kv_bytes(whole("tokens", tokens)))

    @contextmanager
    def profile(self) -> Iterator[Profile]:
        """Count the time of every operation of the calls made inside; the Profile is filled at the end.

        Times are of the wall clock, not summed over threads; their sum is the time in the engine.
        """
        from edgeformer.engines.native.profile import Profile

        report = Profile(self.program)
        self._native.profile(True)
        try:
            yield report
        finally:
            report.nanoseconds, report.runs = self._native.profile(False)

    def new_state(self, static_inputs: Mapping[str, Array] | None = None) -> NativeState:
        """An empty state. Its memory grows in chunks. See `edgeformer.engines.base.Engine.new_state`."""
        given = static_inputs or {}
        self._require_known(given)
        arrays = {n: fitting(n, given[n], dtype, shape) for n, dtype, shape in self._inputs if n in given}
        return NativeState(self._native.new_state(), self._fingerprint, arrays)

    def state_from_bytes(self, data: bytes) -> NativeState:
        """The state that `to_bytes` wrote.

        Raises:
            StateError: it was written with another model or kv type, or is damaged.
        """
        state = self._native.new_state()
        state.load(saved_parts(data, self._fingerprint))
        return NativeState(state, self._fingerprint)

    @property
    def fingerprint(self) -> str:
        """64 hex digits of all that keys and values depend on: model, type of the cache, version; the ISA is not."""
        cache = f"{self.kv} {self.int8_layers}"
        return hashlib.sha256(f"{self._fingerprint} {cache} {edgeformer.__version__}".encode()).hexdigest()

    def chunk_from_bytes(self, data: bytes | memoryview) -> KvChunk:
        """The chunk that `_native.KvChunk.save` wrote, on any ISA; StateError if it does not fit this engine."""
        return self._native.load_chunk(data)

    def forward(self, batch: Sequence[tuple[Mapping[str, Array], Any]]) -> list[Outputs]:
        """See `edgeformer.engines.base.Engine.forward`."""
        states, inputs = [], []
        for arrays, state in batch:
            if not isinstance(state, NativeState):
                raise StateError(f"a state of {type(state).__name__} was given, expected one made by this engine")
            states.append(state._state)
            inputs.append(self._inputs_of(arrays, state))
        with in_flight, typed_errors("the native engine ran"):
            if len(inputs) == 1 and self._batch_local and (slices := self._batch_slices(inputs[0])):
                parts = [self._native.forward(states, [part])[0] for part in slices]
                results = [[np.concatenate(arrays) for arrays in zip(*parts, strict=True)]]
            else:
                results = self._native.forward(states, inputs)
        out = []
        for row in results:
            named = Outputs(zip(self._outputs, row, strict=False))
            if len(row) > len(self._outputs) and LOGITS not in self._converted:
                named.likeliest = row[-1]
            for name in self._converted:
                if named[name].dtype == np.float32:
                    named[name] = named[name].astype(self._dtypes[name])
            out.append(named)
        return out

    def _inputs_of(self, arrays: Mapping[str, Array], state: NativeState) -> list[Array]:
        """All inputs in the program's order and types: given in the call, static, or defaults."""
        self._require_known(arrays)
        row: list[Array] = []
        for name, dtype, shape in self._inputs:
            given = arrays.get(name)
            if given is None:
                given = state._static_inputs.get(name)
            if given is None:
                given = self._default(name, arrays, state)
            elif name == KEEP_INPUT and not fits(given, dtype, 0):
                if np.size(given) != 1:
                    raise InputError(f"{name} has {np.size(given)} values, expected one whole number")
                given = np.asarray(int(np.asarray(given).reshape(())), np.int64)
            row.append(given if fits(given, dtype, len(shape)) else fitting(name, given, dtype, shape))
        return row

    def _batch_slices(self, row: Sequence[Array]) -> list[list[Array]]:
        """A large batch as batches of about PREFILL_ROWS rows, whose values stay in the CPU's caches from one operation
        to the next; [] if the batch is small, or if its items may depend on each other.
        """
        batch, sequence = self._rows
        axes = [
            (str(size), n)
            for a, (_, _, s) in zip(row, self._inputs, strict=True)
            for size, n in zip(s, a.shape, strict=True)
        ]
        counts, lengths = ({n for size, n in axes if size == name} for name in (batch, sequence))
        if len(counts) != 1 or len(lengths) != 1:
            return []  # sizes that contradict each other: the engine reports them
        count, step = counts.pop(), max(1, PREFILL_ROWS // max(1, lengths.pop()))
        if count <= step:
            return []
        by_batch = [bool(s) and str(s[0]) == batch for _, _, s in self._inputs]
        return [
            [np.ascontiguousarray(a[at : at + step]) if cut else a for a, cut in zip(row, by_batch, strict=True)]
            for at in range(0, count, step)
        ]

    def _require_known(self, arrays: Mapping[str, Array]) -> None:
        if not arrays.keys() <= self._known:
            unknown = arrays.keys() - self._known
            raise InputError(
                f"unknown input(s) {', '.join(map(repr, sorted(unknown)))}; this graph takes {self._names()}"
            )

    def _names(self) -> str:
        return ", ".join(name for name, _, _ in self._inputs)

    def _default(self, name: str, arrays: Mapping[str, Array], state: NativeState) -> Array:
        if name == KEEP_INPUT:
            return np.asarray(0, np.int64)  # all
        if name in self._defaults:
            return np.asarray(self._defaults[name], np.int64)
        if name == "position_ids" and arrays.get("input_ids") is not None:
            ids = np.asarray(arrays["input_ids"])
            if ids.ndim == 2:
                positions = np.arange(state.length, state.length + ids.shape[1], dtype=np.int64)
                return positions[None] if len(ids) == 1 else np.broadcast_to(positions, ids.shape)
        raise InputError(f"input {name!r} is missing; this graph takes {self._names()}")


def graph_file(bundle: Bundle | str | os.PathLike[str], graph: str) -> tuple[Path, Bundle | None]:
    """The file of one graph, and its bundle; None for the path of an .onnx file, or of a folder without a manifest."""
    if isinstance(bundle, str | os.PathLike):
        path = Path(bundle)
        if path.is_file():
            return path, None
        if not (path / MANIFEST).is_file() and (path / f"{graph}.onnx").is_file():
            return path / f"{graph}.onnx", None
        from edgeformer.bundle.bundle import Bundle

        bundle = Bundle.open(path)
    return Path(bundle.graph_path(graph)), bundle


def _default_context(bundle: Bundle | None, graph: str) -> int:
    """The most tokens of a state: the bundle's context length, at most DEFAULT_CONTEXT."""
    limit = bundle and (bundle.positions(graph) or context_length(bundle.config))
    return min(limit or DEFAULT_CONTEXT, DEFAULT_CONTEXT)


def _fingerprint(path: Path, bundle: Bundle | None) -> str:
    """Identifies one model, which a saved state belongs to: 64 hex digits.

    Of a bundle from the manifest's hashes of the graph and its weights. Else, and for a bundle that is not sealed
    yet, from the graph's content, and the size and a sample of its weights.
    """
    files = {} if bundle is None else bundle.manifest["files"]
    hashes = [files[name].get("sha256") for name in (path.name, f"{path.name}.data") if name in files]
    if hashes and None not in hashes:
        return hashlib.sha256("".join(hashes).encode()).hexdigest()
    digest = hashlib.sha256(path.read_bytes())
    data = path.with_name(path.name + ".data")
    if data.is_file():
        size = data.stat().st_size
        digest.update(str(size).encode())
        with data.open("rb") as f:
            for place in range(0, size, max(1, size // 64)):
                f.seek(place)
                digest.update(f.read(256))
    return digest.hexdigest()


__all__ = ["Memory", "NativeEngine", "NativeState"]
