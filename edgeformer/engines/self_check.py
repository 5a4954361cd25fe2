"""The parity check at the first load of a bundle by an engine on this machine; its result is kept in the disk cache.

The exporter checked the engines of its own machine. A device has another CPU, another kernel table and another ONNX
Runtime. So the first load runs `reference.npz`, about 24 tokens. The cache key names all that the result depends on.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version

import edgeformer
from edgeformer import disk_cache
from edgeformer.bundle.bundle import Bundle
from edgeformer.engines.base import Engine
from edgeformer.engines.reference import Check, checks
from edgeformer.errors import BundleError, EdgeformerError, OutOfMemory
from edgeformer.machine import cpu_name

# An int8 KV cache has one scale a token and head, so a value errs by at most 1/254 of the largest value of its head.
# The tolerance of a bundle with float weights does not include that. Measured on SmolLM2 it moves logits by 0.5 % of
# their range; a wrong mask, position or weight moves them by 5 % and more.
INT8_CACHE = 2e-2


def recorded_problem(bundle: Bundle, name: str) -> str | None:
    """The problem that the export recorded for this engine; None where it recorded none."""
    engines = (bundle.manifest.get("parity") or {}).get("engines")
    found = engines.get(name) if isinstance(engines, dict) else None
    if not isinstance(found, dict) or found.get("passed", True) is not False:
        return None
    return (
        f"it failed the parity check when {bundle.path.name} was exported: {found.get('problem')} "
        "Export again with a newer edgeformer, or use another engine."
    )


def self_check(bundle: Bundle, name: str, engines: Mapping[str, Engine]) -> str | None:
    """How the engines' numbers differ from the bundle's reference by more than it allows, or why they fail on it; None
    where they do not, and where the bundle holds no reference.

    Raises:
        BundleError: the reference is damaged, or does not fit the graph.
    """
    if bundle.manifest["reference"] is None:
        return None
    entry = _entry(bundle, name, engines)
    known = disk_cache.read(entry)
    if known is not None:
        return known.decode() or None
    slack = INT8_CACHE if _rounds_cache(bundle, engines) else 0.0
    try:
        failed = [check for check in checks(bundle, engines) if not _passes(check, slack)]
    except (BundleError, OutOfMemory):
        raise
    except EdgeformerError as error:  # sizes that do not fit together show when the graph runs
        return f"the {name} engine fails on this bundle's reference: {error}"
    problem = "" if not failed else _describe(name, failed, engines)
    disk_cache.write(entry, problem.encode())
    return problem or None


def _passes(check: Check, slack: float) -> bool:
    return check.tolerance is None or check.worst <= check.tolerance + slack  # a NaN is never <=


def _rounds_cache(bundle: Bundle, engines: Mapping[str, Engine]) -> bool:
    """Whether the KV cache is int8 while the weights are float."""
    return bundle.manifest["quantization"]["scheme"] == "none" and any(
        getattr(engine, "kv", None) == "int8" for engine in engines.values()
    )


def _describe(name: str, failed: list[Check], engines: Mapping[str, Engine]) -> str:
    worst = max(failed, key=lambda check: check.worst)
    caches = [str(getattr(engine, "cache", "")) for engine in engines.values() if getattr(engine, "int8_layers", ())]
    return (
        f"the {name} engine differs from this bundle's reference: {worst}. The engine or this machine is at fault; "
        "`edgeformer verify` shows the details. Another engine may be right."
        + "".join(f" It ran with this cache: {cache}." for cache in caches)
    )


def _entry(bundle: Bundle, name: str, engines: Mapping[str, Engine]) -> str:
    """The cache key: it changes with the bundle, the engine, its options, its code and the CPU."""
    options = [
        (graph, *(str(getattr(engine, option, "")) for option in ("isa", "kv", "int8_layers")))
        for graph, engine in sorted(engines.items())
    ]
    facts = (bundle.fingerprint, name, repr(options), edgeformer.__version__, repr(_code(name)), cpu_name())
    return disk_cache.key(b"self-check", *(fact.encode() for fact in facts)) + ".parity"


def _code(name: str) -> list[object]:
    """Identifies the code of an engine. The native one's files count: an editable installation changes them without
    a new version.
    """
    if name != "native":
        found = []
        for wheel in ("onnxruntime", "onnxruntime-gpu"):
            try:
                found.append((wheel, version(wheel)))
            except PackageNotFoundError:
                continue
        return [*found]
    from edgeformer.engines.native.program.executable import code_identity

    return [code_identity()]
