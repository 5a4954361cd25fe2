"""The parity check on the device, without torch: an engine against the bundle's own reference values."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from edgeformer.bundle.bundle import Bundle
from edgeformer.engines.choose import EngineName, check_arguments, choose
from edgeformer.engines.native.options import NativeOptions
from edgeformer.engines.reference import Check, checks
from edgeformer.machine import default_threads


@dataclass(frozen=True)
class Report:
    """What `verify` found."""

    path: str
    engine: str
    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    def as_dict(self) -> dict[str, Any]:
        checks = [asdict(check) | {"passed": check.passed} for check in self.checks]
        return {"path": self.path, "engine": self.engine, "passed": self.passed, "checks": checks}


def verify(
    path: str | os.PathLike[str],
    engine: EngineName = "auto",
    threads: int | None = None,
    *,
    isa: str | None = None,
    kv: str = "float32",
    progress: Callable[[str], None] = lambda step: None,
) -> Report:
    """The reference run on this machine's engine, as a whole and step by step with the KV cache.

    All hashes are checked first. The native engine's cache is float32 unless `kv` says "int8": the reference knows no
    quantized cache, and its tolerance has no room for one where the weights are float. `progress` is told each
    step's name. An engine that `load` would refuse for its numbers is run all the same: this is where they are shown.

    Raises:
        BundleError: the bundle is damaged, or holds no reference that can be judged.
        EngineUnavailable: the engine cannot run here.
    """
    check_arguments(engine, threads, isa)
    progress("checking hashes")
    bundle = Bundle.open(path, check="hashes")
    progress("loading")
    engines, choice = choose(bundle, engine, threads or default_threads(), NativeOptions(isa, kv), judged=False)
    return Report(str(bundle.path), choice.engine, tuple(checks(bundle, engines, progress)))
