"""How fast a bundle runs here: prompt processing and token generation, in llama-bench's terms.

`pp512` is a prompt of 512 random tokens. `tg128` are 128 tokens one by one. `@ d1024` means that the KV cache already
holds 1024 tokens. The times exclude loading, tokenizing and sampling. A warm-up run comes first.
"""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

import edgeformer
from edgeformer.bundle.signature import IDS, Array
from edgeformer.decoding.limits import Limits
from edgeformer.engines.base import Engine, State
from edgeformer.engines.feed import CHUNK, feed
from edgeformer.engines.options import EngineOptions
from edgeformer.errors import EngineUnavailable, InputError
from edgeformer.machine import cpu_name, peak_memory, system_name
from edgeformer.model import Model, load
from edgeformer.tools.energy import Meter

Kind = Literal["pp", "tg"]  # prompt processing, token generation


@dataclass(frozen=True)
class Row:
    """The rates of one test in tokens/s, one for each repetition, and the joules a token of all of them."""

    test: str
    engine: str
    threads: int | None
    rates: tuple[float, ...]
    joules: float | None = None

    @property
    def median(self) -> float:
        """The middle of the rates."""
        return statistics.median(self.rates)

    @property
    def spread(self) -> float:
        """Half of the distance from the slowest to the fastest repetition, as a fraction of the median."""
        return (max(self.rates) - min(self.rates)) / 2 / self.median

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "test": self.test,
            "engine": self.engine,
            "threads": self.threads,
            "median": self.median,
            "low": min(self.rates),
            "high": max(self.rates),
            "rates": list(self.rates),
            **({} if self.joules is None else {"joules_per_token": self.joules}),
        }


@dataclass(frozen=True)
class Benchmark:
    """All rows, and what they were measured on."""

    bundle: dict[str, Any]
    machine: dict[str, Any]
    load_seconds: float
    peak_bytes: int | None
    rows: tuple[Row, ...]
    meter: str | None = None  # what told the energy

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "bundle": self.bundle,
            "machine": self.machine,
            "load_seconds": self.load_seconds,
            "peak_bytes": self.peak_bytes,
            "rows": [row.as_dict() for row in self.rows],
            **({} if self.meter is None else {"meter": self.meter}),
        }

    def markdown(self) -> str:
        """The table, as llama-bench prints it, and a line about the machine."""
        head = ["model", "size MiB", "weights", "engine", "threads", "test", "tokens/s", "spread"]
        head += ["J/token"] if self.meter else []
        name, size = self.bundle["name"], f"{self.bundle['bytes'] / 2**20:.1f}"
        body = [
            (name, size, self.bundle["scheme"], row.engine, str(row.threads or ""), row.test, *_cells(row))
            for row in self.rows
        ]
        widths = [max(len(line[i]) for line in (head, *body)) for i in range(len(head))]
        right = (1, 4, 6, 7, 8)

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
        note += f"; energy of {self.meter}, all that ran meanwhile" if self.meter else ""
        return "\n".join([line(head), rule, *map(line, body), "", note])


@dataclass(frozen=True)
class Workload:
    """The tests to run: each prompt length and each number of generated tokens, at each depth.

    Raises:
        InputError: a count is out of range, or there is no test.
    """

    prompts: Sequence[int] = (512,)
    generated: Sequence[int] = (128,)
    depths: Sequence[int] = (0,)
    repetitions: int = 5

    def __post_init__(self) -> None:
        for name, least in (("prompts", 1), ("generated", 1), ("depths", 0)):
            values = getattr(self, name)
            if any(type(value) is not int or value < least for value in values):
                raise InputError(f"{name} is {list(values)}, expected whole numbers of at least {least}.")
        if type(self.repetitions) is not int or self.repetitions < 1:
            raise InputError(f"repetitions is {self.repetitions!r}, expected a whole number of at least 1.")
        if not self.tests:
            raise InputError("There is nothing to measure: give at least one prompt or generation length.")

    @property
    def tests(self) -> list[Test]:
        """Depth by depth, prompts before generation."""
        kinds: tuple[tuple[Kind, Sequence[int]], ...] = (("pp", self.prompts), ("tg", self.generated))
        return [Test(kind, count, depth) for depth in self.depths for kind, counts in kinds for count in counts]


@dataclass(frozen=True)
class Test:
    """One test: "pp" is a prompt of `tokens` tokens, "tg" generates them one by one, with `depth` tokens before."""

    __test__ = False  # pytest: not a class of tests

    kind: Kind
    tokens: int
    depth: int

    @property
    def name(self) -> str:
        """`pp512`, or `tg128 @ d1024`."""
        return f"{self.kind}{self.tokens}" + (f" @ d{self.depth}" if self.depth else "")


def bench(
    path: str | os.PathLike[str],
    workload: Workload | None = None,
    engine: EngineOptions | None = None,
    *,
    threads: Sequence[int | None] = (None,),
    progress: Callable[[str, int, int], None] | None = None,
    meter: Meter | None = None,
) -> Benchmark:
    """Rates of every test of `workload`, for every number of threads (None: the physical cores).

    `progress` is called with (test, runs done, runs in all). `meter` tells the energy of each test (`open_meter`).

    Raises:
        InputError: the model is no language model, or a test does not fit its context.
        BundleError, EngineUnavailable: as `load`.
    """
    workload, engine = workload or Workload(), engine or EngineOptions()
    if not threads:
        raise InputError("There is nothing to measure: give at least one number of threads.")
    tests = workload.tests
    rows: list[Row] = []
    total, done = len(tests) * len(threads) * (workload.repetitions + 1), 0
    for count in threads:
        began = time.perf_counter()
        model = load(path, **replace(engine, threads=count).arguments())
        seconds = time.perf_counter() - began
        if not model.is_language_model:
            raise InputError(f"{path} is a {model.bundle.task} model; bench measures language models.")
        _check_fit(model, tests)
        for test in tests:
            base = _filled(model, test.depth)
            rates, joules = [], 0.0
            for repetition in range(workload.repetitions + 1):  # the first is a warm-up
                if progress is not None:
                    progress(test.name, done, total)
                state, before = base.fork(), meter.joules() if meter else 0.0
                rate = _measure(model, state, test)
                done += 1
                if repetition:
                    rates.append(rate)
                    joules += meter.joules() - before if meter else 0.0
            energy = joules / (test.tokens * workload.repetitions) if meter else None
            used = getattr(model.engine, "threads", count)
            rows.append(Row(test.name, model.engine.name, used, tuple(rates), energy))
    if progress is not None:
        progress("", done, total)
    facts = _bundle_facts(model), _machine_facts(model)
    return Benchmark(*facts, seconds, peak_memory(), tuple(rows), meter.name if meter else None)


def profile(model: Model, workload: Workload | None = None) -> str:
    """A table of the time by operation for each test, below the measured memory bandwidth of this machine.

    The bandwidth is that of reading 256 MiB with as many threads. Weights that fit in the last-level cache may be
    read faster. `workload.repetitions` is not used.

    Raises:
        EngineUnavailable: the engine has no profile.
        InputError: a test does not fit the model's context.
    """
    engine: Any = model.engine
    if not hasattr(engine, "profile"):
        raise EngineUnavailable(f"The {model.engine.name} engine has no profile; use --engine native.")
    from edgeformer._native import testing

    tests = (workload or Workload()).tests
    _check_fit(model, tests)
    size = 1 << 28
    limit = max(size / testing.memory_read(engine.threads, size) / 1e9 for _ in range(3))
    threads = f"{engine.threads} thread{'s' if engine.threads > 1 else ''}"
    parts = [f"{threads}, {engine.isa} kernels; a plain read of memory: {limit:.1f} GB/s"]
    for test in tests:
        base = _filled(model, test.depth)
        _measure(model, base.fork(), test)  # warm-up
        with engine.profile() as report:
            rate = _measure(model, base.fork(), test)
        rows = test.tokens // report.runs  # of one pass
        batch, sequence = engine.program.row_symbols
        sizes = dict.fromkeys(engine.program.symbols, 1)
        sizes |= {batch: 1, sequence: rows, engine.program.past_symbol: test.depth}
        title = f"{test.name}: {rate:.1f} tokens/s, {report.runs} passes of {rows} tokens"
        parts += ["", title, report.table(sizes, limit)]
    return "\n".join(parts)


def _cells(row: Row) -> list[str]:
    energy = [] if row.joules is None else [f"{row.joules:.3g}"]
    return [f"{row.median:.1f}", f"± {100 * row.spread:.1f} %", *energy]


def _check_fit(model: Model, tests: Sequence[Test]) -> None:
    limits = Limits.of(model.bundle, model.engine)
    context = limits.context
    longest = max(test.tokens + test.depth for test in tests)
    if context is not None and longest > context:
        raise InputError(
            f"The largest test needs {longest} positions, the limit is {context} ({limits.context_reason}); "
            f"ask for less with -p, -n or -d."
        )


def _filled(model: Model, depth: int) -> State:
    state = model.engine.new_state()
    if depth:
        _run(model.engine, state, _random_ids(model, depth)[None], Limits.of(model.bundle, model.engine))
    return state


def _measure(model: Model, state: State, test: Test) -> float:
    """Tokens a second of one repetition."""
    ids, limits, engine = _random_ids(model, test.tokens), Limits.of(model.bundle, model.engine), model.engine
    began = time.perf_counter()
    if test.kind == "pp":
        _run(engine, state, ids[None], limits)
    else:
        for start in range(test.tokens):
            _run(engine, state, ids[None, start : start + 1], limits)
    return test.tokens / (time.perf_counter() - began)


def _run(engine: Engine, state: State, ids: Array, limits: Limits) -> None:
    """Runs `ids` [1, length] through `state` in chunks; only the last logits are computed, where the graph allows."""
    chunk, keep = CHUNK if limits.cached else None, 1 if limits.keeps_logits else None
    for _ in feed(engine, state, {IDS: ids}, chunk=chunk, keep=keep):
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
        "system": " ".join(system_name()[::2]),
        "python": platform.python_version(),
        "edgeformer": edgeformer.__version__,
        "onnxruntime": getattr(model.engine, "version", None),
    }
