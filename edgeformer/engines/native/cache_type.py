"""The type of the KV cache, layer by layer: int8 or float32, as asked, or as the weights and the bundle have it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeformer.bundle.cache_cost import CacheCost, named_layers
from edgeformer.bundle.manifest import MANIFEST
from edgeformer.errors import BundleError, InputError

if TYPE_CHECKING:
    from edgeformer.bundle.bundle import Bundle
    from edgeformer.engines.native.options import NativeOptions
    from edgeformer.engines.native.program.executable import Executable

KV = ("auto", "int8", "float32")


@dataclass(frozen=True, slots=True)
class CacheType:
    """`kind`: "int8" or "float32", of keys and values that may be int8. The cache is int8 in `int8_layers` and float32
    in others. `text` is for people, "" without a cache.
    """

    kind: str
    int8_layers: tuple[int, ...]
    text: str

    def of(self, program: dict[str, Any]) -> dict[str, Any]:
        """The program (`program.spec`) with all other layers in float32."""
        caches = [cache | {"plain": i not in self.int8_layers} for i, cache in enumerate(program["caches"])]
        return {**program, "caches": caches}


def cache_type(options: NativeOptions, executable: Executable, path: Path, bundle: Bundle | None) -> CacheType:
    """The cache that the options ask for, of the graph file `path`.

    Raises:
        InputError: `kv` is not one of KV.
        BundleError: the bundle names a layer that the graph does not have.
    """
    kind, why = _kind(options.kv, executable)
    caches = executable.program["caches"]
    able = tuple(i for i, cache in enumerate(caches) if not cache["plain"])
    if not able:
        return CacheType(kind, (), "float32 cache: the graph reads it itself" if caches else "")
    if kind == "float32":
        return CacheType(kind, (), f"float32 cache: {why}")
    cost = CacheCost.of({} if bundle is None else bundle.manifest)
    floats = options.float32_layers
    if floats is None:
        floats = cost.float32_layers if options.kv == "auto" else ()
    if wrong := [layer for layer in floats if layer not in able]:
        raise BundleError(
            f"{path.with_name(MANIFEST)}: kv_cache.float32_layers has {wrong[0]}, but {path.name} has {len(caches)} "
            f"caches, of which {len(able)} may be int8, counted from 0; export the model again."
        )
    if not floats:
        return CacheType(kind, able, f"int8 cache: {why}; {cost.described('int8')}")
    rest = tuple(i for i in able if i not in floats)
    named = f"int8 cache but float32 in {named_layers(floats)}" if rest else "float32 cache"
    more = f"{cost.described('auto')}; int8 in all layers would add {cost.of_int8:.2g}"
    return CacheType(kind, rest, f"{named}: {why}; {more}")


def _kind(kv: str, executable: Executable) -> tuple[str, str]:
    """("int8" or "float32", why)"""
    if kv not in KV:
        raise InputError(f"kv is {kv!r}, expected {', '.join(KV)}.")
    if kv != "auto":
        return kv, f"kv={kv!r}"
    quantized = any(weight.type != "f32" for weight in executable.weights)
    return ("int8", "its weights are quantized") if quantized else ("float32", "its weights are float")
