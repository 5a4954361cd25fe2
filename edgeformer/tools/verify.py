"""The parity check on the device, without torch: an engine against the bundle's own reference values."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from edgeformer.bundle.bundle import Bundle
from edgeformer.engines.choose import EngineName, check_arguments, choose
from edgeformer.engines.native.engine import NativeEngine
from edgeformer.engines.native.options import NativeOptions
from edgeformer.engines.reference import Check, compare, compared, outputs, read_reference


@dataclass(frozen=True)
class Report:
    """The result of `verify`."""

    path: str
    engine: str
    checks: tuple[Check, ...]
    cache: str = ""  # the engine's KV cache when it is loaded, why, and what the export found that it costs

    @property
    def passed(self) -> bool:
        """Whether every check is within its tolerance."""
        return all(check.passed for check in self.checks)

    def as_dict(self) -> dict[str, Any]:
        """The report as plain data, for JSON."""
        checks = [asdict(check) | {"passed": check.passed} for check in self.checks]
        return {"path": self.path, "engine": self.engine, "passed": self.passed, "checks": checks, "cache": self.cache}


def verify(
    path: str | os.PathLike[str],
    engine: EngineName = "auto",
    threads: int | None = None,
    *,
    isa: str | None = None,
    kv: str = "float32",
    progress: Callable[[str], None] = lambda _: None,
) -> Report:
    """The parity report of an engine on this machine: the reference in one run, and step by step with the KV cache.

    All hashes are checked first. The native engine's cache is float32 unless `kv` says "int8": the reference knows no
    quantized cache, and its tolerance has no room for one where the weights are float. What the cache of `kv="auto"`
    changes against float32 is shown too, without a tolerance. `progress` is called with each step's name. An engine
    that `load` refuses for its outputs runs here all the same, so that they can be seen.

    Raises:
        BundleError: the bundle is damaged, or holds no reference that can be judged.
        EngineUnavailable: the engine cannot run here.
    """
    check_arguments(engine, threads, isa)
    progress("checking hashes")
    bundle = Bundle.open(path, check="hashes")
    progress("loading")
    engines, choice = choose(bundle, engine, threads, NativeOptions(isa, kv), judged=False)
    reference = read_reference(bundle)
    exact = dict(outputs(bundle, engines, reference[0], progress))
    found = tuple(compared(bundle, reference, exact.items()))
    native = [engine for engine in engines.values() if isinstance(engine, NativeEngine) and engine.cache]
    if not native or kv != "float32":
        return Report(str(bundle.path), choice.engine, found)
    del engines, native  # memory: the weights are loaded again
    progress("loading with the default KV cache")
    usual, _ = choose(bundle, "native", threads, NativeOptions(isa), judged=False)
    caches = [engine for engine in usual.values() if isinstance(engine, NativeEngine) and engine.cache]
    if any(engine.int8_layers for engine in caches):
        for run, arrays in outputs(bundle, usual, reference[0], progress):
            found += tuple(
                compare(name, "float32 cache", f"{run}, int8 cache", array, exact[run][name], None)
                for name, array in arrays.items()
            )
    return Report(str(bundle.path), choice.engine, found, caches[0].cache)
