"""What an int8 KV cache costs a bundle, as its export measured it: the entry `kv_cache` of the manifest."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

# Nats a token. By Pinsker's inequality the next-token probabilities then differ by at most sqrt(1e-3 / 2) = 2.2 % in
# total, on average: not worth four times the memory. Bundles whose weights cost less than this have no better measure.
NEGLIGIBLE = 1e-3


@dataclass(frozen=True)
class CacheCost:
    """KL(float model || bundle) of the next token in nats, with each type of cache on the native engine.

    Attributes:
        float32: with a float32 cache, so what the quantized weights and activations cost.
        int8: with an int8 cache in all layers.
        auto: with the cache of `kv="auto"`: int8 but float32 in `float32_layers`, counted as the caches of the graph.
        unmeasured: why there are no numbers; "" where there are.
    """

    float32: float = 0.0
    int8: float = 0.0
    auto: float = 0.0
    float32_layers: tuple[int, ...] = ()
    unmeasured: str = ""

    @classmethod
    def of(cls, manifest: Mapping[str, Any]) -> CacheCost:
        """What a checked manifest says."""
        entry = manifest.get("kv_cache") or {"unmeasured": "the export of this bundle did not measure it"}
        if "unmeasured" in entry:
            return cls(unmeasured=entry["unmeasured"])
        layers = tuple(entry["float32_layers"])
        kls = [float(entry[kind]["mean_kl"]) for kind in ("float32", "int8", "auto")]
        return cls(kls[0], kls[1], kls[2], layers)

    @property
    def of_int8(self) -> float:
        """What an int8 cache in all layers adds."""
        return self.int8 - self.float32

    @property
    def of_auto(self) -> float:
        """What the cache of `kv="auto"` adds."""
        return self.auto - self.float32

    @property
    def limit(self) -> float:
        """The most that a cache may add: as much as the quantized weights cost, or what is negligible."""
        return max(self.float32, NEGLIGIBLE)

    @property
    def too_much(self) -> bool:
        """Whether an int8 cache in all layers costs more than that."""
        return self.of_int8 > self.limit

    def described(self, kind: str) -> str:
        """The cost of a cache that is "int8" in all layers, or as "auto" chooses, in one phrase for people."""
        if self.unmeasured:
            return f"its cost was not measured: {self.unmeasured}"
        added = max(0.0, self.of_int8 if kind == "int8" else self.of_auto)  # below 0 by chance
        return f"it adds {added:.2g} nats of KL divergence to {self.float32:.2g} of the quantized weights"


def named_layers(layers: Collection[int]) -> str:
    """`layer 3`, or `layers 1, 3`."""
    return f"layer{'s' * (len(layers) > 1)} {', '.join(map(str, layers))}"
