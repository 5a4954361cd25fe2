"""How fast a bundle runs here: prompt processing and token generation, in llama-bench's terms.

`pp512` is a prompt of 512 random tokens, `tg128` are 128 tokens one by one; `@ d1024` means on top of 1024 tokens that
are in the cache already. Loading, tokenizing and sampling are not in the times. One unmeasured run comes first.
"""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

import edgeformer
from edgeformer.bundle.signature import IDS
from edgeformer.decoding.limits import Limits
from edgeformer.engines.base import Engine, State
from edgeformer.engines.feed import CHUNK, feed
from edgeformer.errors import EngineUnavailable, InputError
from edgeformer.machine import cpu_name, peak_memory
from edgeformer.model import EngineName, Model, load


@dataclass(frozen=True)
class Row:
    """One test: its rates in tokens/s, one a repetition."""

    test: str
    engine: str
    threads: int | None
    rates: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.rates)

    @property
    def spread(self) -> float:
        """Half of the distance from the slowest to the fastest repetition, as a share of the median."""
        return (max(self.rates) - min(self.rates)) / 2 / self.median

    def as_dict(self) -> dict[str, Any]:
        return {
            "test": self.test,
            "engine": self.engine,
            "threads": self.threads,
            "median": self.median,
            "low": min(self.rates),
            "high": max(self.rates),
            "rates": list(self.rates),
        }


@dataclass(frozen=True)
class Benchmark:
    """All rows, and what they were measured on."""

    bundle: dict[str, Any]
    machine: dict[str, Any]
    load_seconds: float
    peak_bytes: int | None
    rows: tuple[Row, ...]

    def as_dict(self) -> dict[str, Any]:
        return {
            "bundle": self.bundle,
            "machine": self.machine,
            "load_seconds": self.load_seconds,
            "peak_bytes": self.peak_bytes,
            "rows": [row.as_dict() for row in self.rows],
        }

    def markdown(self) -> str:
        """The table, as llama-bench prints it, and a line about the machine."""
        head = ("model", "size MiB", "weights", "engine", "threads", "test", "tokens/s", "spread")
        name, size = self.bundle["name"], f"{self.bundle['bytes'] / 2**20:.1f}"
        body = [
            (name, size, self.bundle["scheme"], row.engine, str(row.threads or ""), row.test, *_cells(row))
            for row in self.rows
        ]
        widths = [max(len(line[i]) for line in (head, *body)) for i in range(len(head))]
        right = (1, 4, 6, 7)

        def line(cells: Sequence[str]) -> str:
            padded = [
                c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))
            ]
            return "| " + " | ".join(padded) + " |"

        rule = "|" + "|".join("-" * (w + 1) + (":" if i in right else "-") for i, w in enumerate(widths)) + "|"
        peak = f", peak memory {self.peak_bytes / 2**20:.0f} MiB" if self.peak_bytes else ""
        versions = f"edgeformer {self.machine['edgeformer']}"
        if self.machine.get("onnxruntime"):
            versions += f", onnxruntime {self.machine['onnxruntime']}"
        note = f"{self.machine['cpu']}; {versions}; loaded in {self.load_seconds:.2f} s{peak}"
        return "\n".join([line(head), rule, *map(line, body), "", note])


def bench(
    path: str | os.PathLike[str],
    *,
    engine: EngineName = "auto",
    threads: Sequence[int | None] = (None,),
    prompts: Sequence[int] = (512,),
    generated: Sequence[int] = (128,),
    depths: Sequence[int] = (0,),
    repetitions: int = 5,
    isa: str | None = None,
    kv: str = "auto",
    context: int | None = None,
    progress: Callable[[str, int, int], None] = lambda test, done, total: None,
) -> Benchmark:
    """Rates of every test in prompts and generated, at every depth, for every number of threads.

    `progress` is told (test, runs done, runs in all).

    Raises:
        InputError: a count is out of range, the model is no language model, or a test does not fit its context.
        BundleError, EngineUnavailable: as `load`.
    """
    for name, values, least in (("prompts", prompts, 1), ("generated", generated, 1), ("depths", depths, 0)):
        if any(type(value) is not int or value < least for value in values):
            raise InputError(f"{name} is {list(values)}, expected whole numbers of at least {least}.")
    if type(repetitions) is not int or repetitions < 1:
        raise InputError(f"repetitions is {repetitions!r}, expected a whole number of at least 1.")
    tests = _tests(prompts, generated, depths)
    if not threads:
        raise InputError("There is nothing to measure: give at least one number of threads.")
    rows: list[Row] = []
    total, done = len(tests) * len(threads) * (repetitions + 1), 0
    for count in threads:
        began = time.perf_counter()
        model = load(path, engine, count, isa=isa, kv=kv, context=context)
        seconds = time.perf_counter() - began
        if not model.is_language_model:
            raise InputError(f"{path} is a {model.bundle.task} model; bench measures language models.")
        _check_fit(model, tests)
        for kind, tokens, depth in tests:
            name = _name(kind, tokens, depth)
            base = _filled(model, depth)
            rates = []
            for repetition in range(repetitions + 1):  # the first only warms up
                progress(name, done, total)
                rate = _measure(model, base.fork(), kind, tokens)
                done += 1
                if repetition:
                    rates.append(rate)
            rows.append(Row(name, model.engine.name, getattr(model.engine, "threads", count), tuple(rates)))
    progress("", done, total)
    return Benchmark(_bundle_facts(model), _machine_facts(model), seconds, peak_memory(), tuple(rows))


def profile(
    model: Model, prompts: Sequence[int] = (512,), generated: Sequence[int] = (128,), depths: Sequence[int] = (0,)
) -> str:
    """A table of the time by operation for each test, and above it what memory gives on this machine.

    The limit is a plain read of 256 MiB by as many threads; weights that fit in the last cache may pass it.

    Raises:
        EngineUnavailable: the engine has no profile.
        InputError: a test does not fit the model's context.
    """
    engine: Any = model.engine
    if not hasattr(engine, "profile"):
        raise EngineUnavailable(f"The {model.engine.name} engine has no profile; use --engine native.")
    from edgeformer._native import testing

    tests = _tests(prompts, generated, depths)
    _check_fit(model, tests)
    size = 1 << 28
    limit = max(size / testing.memory_read(engine.threads, size) / 1e9 for _ in range(3))
    threads = f"{engine.threads} thread{'s' if engine.threads > 1 else ''}"
    parts = [f"{threads}, {engine.isa} kernels; a plain read of memory: {limit:.1f} GB/s"]
    for kind, tokens, depth in tests:
        base = _filled(model, depth)
        _measure(model, base.fork(), kind, tokens)  # warms up
        with engine.profile() as report:
            rate = _measure(model, base.fork(), kind, tokens)
        rows = tokens // report.runs  # of one pass
        batch, sequence = engine.program.row_symbols
        sizes = dict.fromkeys(engine.program.symbols, 1) | {batch: 1, sequence: rows, engine.program.past_symbol: depth}
        title = f"{_name(kind, tokens, depth)}: {rate:.1f} tokens/s, {report.runs} passes of {rows} tokens"
        parts += ["", title, report.table(sizes, limit)]
    return "\n".join(parts)


def _tests(prompts: Sequence[int], generated: Sequence[int], depths: Sequence[int]) -> list[tuple[str, int, int]]:
    """(kind, tokens, depth) of every test."""
    kinds = (("pp", prompts), ("tg", generated))
    tests = [(kind, count, depth) for depth in depths for kind, counts in kinds for count in counts]
    if not tests:
        raise InputError("There is nothing to measure: give at least one prompt or generation length.")
    return tests


def _name(kind: str, tokens: int, depth: int) -> str:
    return f"{kind}{tokens}" + (f" @ d{depth}" if depth else "")


def _cells(row: Row) -> tuple[str, str]:
    return f"{row.median:.1f}", f"± {100 * row.spread:.1f} %"


def _check_fit(model: Model, tests: Sequence[tuple[str, int, int]]) -> None:
    limits = Limits.of(model.bundle, model.engine)
    context = limits.context
    longest = max(tokens + depth for _, tokens, depth in tests)
    if context is not None and longest > context:
        raise InputError(
            f"The largest test needs {longest} positions, the limit is {context} ({limits.context_reason}); "
            f"ask for less with -p, -n or -d."
        )


def _filled(model: Model, depth: int) -> State:
    state = model.engine.new_state()
    if depth:
        _feed(model.engine, state, _random_ids(model, depth), Limits.of(model.bundle, model.engine))
    return state


def _measure(model: Model, state: State, kind: str, tokens: int) -> float:
    """Tokens a second of one repetition."""
    ids, limits, engine = _random_ids(model, tokens), Limits.of(model.bundle, model.engine), model.engine
    began = time.perf_counter()
    if kind == "pp":
        _feed(engine, state, ids, limits)
    else:
        for start in range(tokens):
            _feed(engine, state, ids[start : start + 1], limits)
    return tokens / (time.perf_counter() - began)


def _feed(engine: Engine, state: State, ids: np.ndarray[Any, Any], limits: Limits) -> None:
    keep, chunk = (1 if limits.keeps_logits else None), (CHUNK if limits.cached else None)
    for _ in feed(engine, state, {IDS: ids[None]}, chunk=chunk, keep=keep):
        pass


def _random_ids(model: Model, count: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(count).integers(0, model.bundle.vocab_size or 2, count)


def _bundle_facts(model: Model) -> dict[str, Any]:
    bundle = model.bundle
    quantization = bundle.manifest["quantization"]
    return {
        "name": bundle.path.name,
        "bytes": bundle.size,
        "scheme": quantization["scheme"],
        "bits_per_weight": quantization.get("bits_per_weight"),
        "fingerprint": bundle.fingerprint,
    }


def _machine_facts(model: Model) -> dict[str, Any]:
    return {
        "cpu": cpu_name(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "edgeformer": edgeformer.__version__,
        "onnxruntime": getattr(model.engine, "version", None),
    }
