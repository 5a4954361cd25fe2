"""Chooses the engine of a bundle: engines are tried in a fixed order, and each gets a reason."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from edgeformer.bundle.bundle import Bundle
from edgeformer.engines.base import Engine
from edgeformer.engines.native.engine import NativeEngine
from edgeformer.engines.native.options import NativeOptions
from edgeformer.engines.self_check import recorded_problem, self_check
from edgeformer.errors import EdgeformerWarning, EngineUnavailable, InputError
from edgeformer.machine import default_threads

EngineName = Literal["auto", "cuda", "native", "cpu"]
ORDER = ("cuda", "native", "cpu")
WhilePacking = Callable[[], object]


# Measured (docs/performance.md, MiniLM in float32): onnxruntime needs 0.91 to 0.97 of the native engine's time.
FLOAT_AT_ONCE = "float weights without a cache run faster on cpu"


@dataclass(frozen=True)
class Choice:
    """The engine that runs, and for each engine in the order tried the reason why or why not. `print` shows it.

    `notes` name settings of the bundle that no engine follows.
    """

    engine: str
    reasons: dict[str, str]
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        width = max(map(len, self.reasons))
        marks = {True: "*", False: " "}
        lines = [f"{marks[name == self.engine]} {name:{width}}  {reason}" for name, reason in self.reasons.items()]
        return "\n".join([*lines, *(f"! {note}" for note in self.notes)])


def check_arguments(engine: str, threads: int | None, isa: str | None) -> None:
    """Refuses arguments that `load` cannot use.

    Raises:
        InputError: one is out of its range, or they contradict each other.
    """
    if engine not in ("auto", *ORDER):
        raise InputError(f"engine is {engine!r}, expected auto, {', '.join(ORDER)}.")
    if threads is not None and (isinstance(threads, bool) or not isinstance(threads, int) or not 1 <= threads <= 1024):
        raise InputError(f"threads is {threads!r}, expected a whole number from 1 to 1024.")
    if isa is not None and engine in ("cuda", "cpu"):
        raise InputError(
            f"isa={isa!r} is an option of the native engine, but engine is {engine!r}; leave one of them out."
        )


def choose(
    bundle: Bundle,
    engine: str,
    threads: int | None,
    native: NativeOptions,
    while_packing: WhilePacking = lambda: None,
    *,
    judged: bool = True,
    tensorrt: str | None = None,
) -> tuple[dict[str, Engine], Choice]:
    """(one engine for each graph of the bundle, all of one kind; the reasons for that kind).

    `threads` defaults to `default_threads()`. `while_packing` runs once, while the native engine packs weights with the
    GIL released. `tensorrt` is `OrtEngine`'s. With `judged` an engine that fails the parity check, here or at export,
    counts as unavailable; see `self_check`.

    Raises:
        EngineUnavailable: the requested engine, or with "auto" every engine, cannot run here.
    """
    threads = threads or default_threads()
    requested = "native" if engine == "auto" and native.isa is not None else engine
    if requested != "auto":
        made = _usable(requested, bundle, threads, native, while_packing, judged, tensorrt)
        why = f"by isa={native.isa!r}" if engine == "auto" else f"by engine={engine!r}"
        return made, Choice(requested, {requested: _chosen(made, threads, why)})
    reasons: dict[str, str] = {}
    order = _order(bundle)
    for position, name in enumerate(order):
        try:
            made = _usable(name, bundle, threads, native, while_packing, judged)
        except WrongNumbers as error:
            reasons[name] = str(error)
            warnings.warn(f"{bundle.path.name}: {error}", EdgeformerWarning, stacklevel=3)
            continue
        except EngineUnavailable as error:
            reasons[name] = str(error)
            continue
        reasons[name] = _chosen(made, threads, "as the first that can run this bundle here")
        for rest in order[position + 1 :]:
            why = FLOAT_AT_ONCE if (name, rest) == ("cpu", "native") else f"{name} comes first"
            reasons[rest] = f"not tried: {why}"
        return made, Choice(name, reasons)
    lines = "".join(f"\n  - {name}: {reason}" for name, reason in reasons.items())
    raise EngineUnavailable(f"No engine can run {bundle.path} here:{lines}")


class WrongNumbers(EngineUnavailable):
    """The engine runs this bundle, but its outputs differ from the reference."""


def _usable(
    name: str,
    bundle: Bundle,
    threads: int,
    native: NativeOptions,
    while_packing: WhilePacking,
    judged: bool,
    tensorrt: str | None = None,
) -> dict[str, Engine]:
    if judged and (recorded := recorded_problem(bundle, name)):
        raise EngineUnavailable(recorded)
    made = create(name, bundle, threads, native, while_packing, tensorrt)
    if judged and (problem := self_check(bundle, name, made)):
        raise WrongNumbers(problem)
    return made


def _order(bundle: Bundle) -> tuple[str, ...]:
    """The engines in the order to try: `cpu` before `native` where it is faster."""
    manifest = bundle.manifest
    cached = any("past_key_values" in name for graph in manifest["graphs"].values() for name in graph["inputs"])
    return ("cuda", "cpu", "native") if manifest["quantization"]["scheme"] == "none" and not cached else ORDER


def create(
    name: str,
    bundle: Bundle,
    threads: int | None,
    native: NativeOptions,
    while_packing: WhilePacking = lambda: None,
    tensorrt: str | None = None,
) -> dict[str, Engine]:
    """An engine called `name` for each graph of the bundle. See `choose` for the other arguments.

    Raises:
        EngineUnavailable: it cannot run one of them here; with several graphs the message names which.
    """
    graphs = list(bundle.manifest["graphs"])
    if name == "native":
        return {**_native(bundle, graphs, threads, native, while_packing)}
    from edgeformer.engines.onnxruntime import OrtEngine, Provider
    from edgeformer.engines.ort_install import cuda_driver_problem

    if name == "cuda":
        problem = cuda_driver_problem()  # cheap, and most machines end here without importing onnxruntime
        if problem:
            raise EngineUnavailable(f"CUDA is not available: {problem}.")
    provider: Provider = "cuda" if name == "cuda" else "cpu"
    return {graph: OrtEngine(bundle, provider, threads, graph, tensorrt=tensorrt) for graph in graphs}


def _native(
    bundle: Bundle, graphs: list[str], threads: int | None, options: NativeOptions, while_packing: WhilePacking
) -> dict[str, NativeEngine]:
    made: dict[str, NativeEngine] = {}
    left = options.memory_limit
    for graph in graphs:
        try:
            made[graph] = NativeEngine.create(
                bundle, graph, threads, replace(options, memory_limit=left), while_packing
            )
        except EngineUnavailable as error:
            if len(graphs) == 1:
                raise
            raise EngineUnavailable(f"its {graph} graph: {error}") from error
        if left is not None:
            left -= made[graph].memory().total
    return made


def _chosen(engines: Mapping[str, Engine], threads: int, why: str) -> str:
    isa = getattr(next(iter(engines.values())), "isa", None)
    caches = {cache for engine in engines.values() if (cache := getattr(engine, "cache", ""))}
    tensorrt = getattr(next(iter(engines.values())), "tensorrt", None)
    parts = [f"{threads} thread{'s' if threads > 1 else ''}", *([f"{isa} kernels"] if isa else []), *sorted(caches)]
    parts += [f"TensorRT in {tensorrt}"] if tensorrt else []
    what = ", ".join(parts)
    rounded = sum(getattr(engine, "rounded", 0) for engine in engines.values())
    note = f"; {rounded} weights have scales of more bits than float16, rounded by at most 0.025 %" if rounded else ""
    return f"chosen {why} ({what}){note}"
