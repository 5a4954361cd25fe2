"""Choosing an engine for a bundle: in a fixed order, with a reason for each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from edgeformer.bundle import Bundle
from edgeformer.engine import Engine
from edgeformer.errors import EngineUnavailable
from edgeformer.native.engine import NativeEngine

EngineName = Literal["auto", "cuda", "native", "cpu"]
ORDER = ("cuda", "native", "cpu")
Meanwhile = Callable[[], object]


# Measured (docs/performance.md, MiniLM in float32): onnxruntime needs 0.91 to 0.97 of the native engine's time.
FLOAT_AT_ONCE = "float weights without a cache run faster on cpu"


@dataclass(frozen=True)
class NativeOptions:
    """What only the native engine has."""

    isa: str | None = None
    kv: str = "int8"
    context: int | None = None
    memory_limit: int | None = None


@dataclass(frozen=True)
class Choice:
    """Which engine runs, and for each one in the order tried, why or why not. `print` it.

    `notes` name what the bundle asks for and does not get from any engine.
    """

    engine: str
    reasons: dict[str, str]
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        width = max(map(len, self.reasons))
        marks = {True: "*", False: " "}
        lines = [f"{marks[name == self.engine]} {name:{width}}  {reason}" for name, reason in self.reasons.items()]
        return "\n".join([*lines, *(f"! {note}" for note in self.notes)])


def choose(
    bundle: Bundle, engine: str, threads: int, native: NativeOptions, meanwhile: Meanwhile = lambda: None
) -> tuple[dict[str, Engine], Choice]:
    """(an engine for each graph of the bundle, all of one kind; why that kind). An engine whose making leaves Python
    free calls `meanwhile`.

    Raises:
        EngineUnavailable: the engine asked for, or with "auto" every engine, cannot run here.
    """
    asked = "native" if engine == "auto" and native.isa is not None else engine
    if asked != "auto":
        made = create(asked, bundle, threads, native, meanwhile)
        why = f"an isa ({native.isa}) was asked for" if engine == "auto" else "it was asked for by name"
        return made, Choice(asked, {asked: _chosen(made, threads, why)})
    reasons: dict[str, str] = {}
    order = _order(bundle)
    for position, name in enumerate(order):
        try:
            made = create(name, bundle, threads, native, meanwhile)
        except EngineUnavailable as error:
            reasons[name] = str(error)
            continue
        reasons[name] = _chosen(made, threads, "the first that can run this bundle here")
        for rest in order[position + 1 :]:
            why = FLOAT_AT_ONCE if (name, rest) == ("cpu", "native") else f"{name} comes first"
            reasons[rest] = f"not tried: {why}"
        return made, Choice(name, reasons)
    lines = "".join(f"\n  - {name}: {reason}" for name, reason in reasons.items())
    raise EngineUnavailable(f"No engine can run {bundle.path} here:{lines}")


def _order(bundle: Bundle) -> tuple[str, ...]:
    """The engines in the order to try: `cpu` before `native` where it is the faster one."""
    manifest = bundle.manifest
    cached = any("past_key_values" in name for graph in manifest["graphs"].values() for name in graph["inputs"])
    return ("cuda", "cpu", "native") if manifest["quantization"]["scheme"] == "none" and not cached else ORDER


def create(
    name: str, bundle: Bundle, threads: int, native: NativeOptions, meanwhile: Meanwhile = lambda: None
) -> dict[str, Engine]:
    """An engine called `name` for each graph of the bundle. See `choose` for `meanwhile`.

    Raises:
        EngineUnavailable: it cannot run one of them here; with several graphs the message names which.
    """
    graphs = list(bundle.manifest["graphs"])
    if name == "native":
        return {**_native(bundle, graphs, threads, native, meanwhile)}
    from edgeformer.ort import OrtEngine, cuda_driver_problem

    if name == "cuda":
        problem = cuda_driver_problem()  # cheap, and most machines end here without importing onnxruntime
        if problem:
            raise EngineUnavailable(f"CUDA is not there: {problem}.")
    return {graph: OrtEngine(bundle, "cuda" if name == "cuda" else "cpu", threads, graph=graph) for graph in graphs}


def _native(
    bundle: Bundle, graphs: list[str], threads: int, options: NativeOptions, meanwhile: Meanwhile
) -> dict[str, NativeEngine]:
    made: dict[str, NativeEngine] = {}
    left = options.memory_limit
    for graph in graphs:
        try:
            made[graph] = NativeEngine.from_bundle(
                bundle,
                graph=graph,
                threads=threads,
                isa=options.isa,
                kv=options.kv,
                context=options.context,
                memory_limit=left,
                meanwhile=meanwhile,
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
    what = f"{threads} thread{'s' if threads > 1 else ''}" + (f", {isa} kernels" if isa else "")
    rounded = sum(getattr(engine, "rounded", 0) for engine in engines.values())
    note = f"; {rounded} weights have scales of more bits than float16, rounded by at most 0.025 %" if rounded else ""
    return f"chosen, {why} ({what}){note}"
