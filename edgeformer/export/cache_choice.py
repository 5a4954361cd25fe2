"""What an int8 KV cache costs the bundle, and the layers whose cache stays float32 because int8 costs too much there.

Keys of some models have a few channels that are much larger than the others. One scale for a token and head then
leaves few of the 255 levels to the rest. No statistic of the keys says what that does to the answers, so it is
measured: the KL divergence from the float model, as for the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import numpy as np

from edgeformer.bundle.cache_cost import CacheCost, named_layers
from edgeformer.engines.native.engine import NativeEngine
from edgeformer.engines.native.options import NativeOptions
from edgeformer.errors import EdgeformerError, first_line
from edgeformer.export.check.accuracy import Score, Text
from edgeformer.export.check.parity import Runs
from edgeformer.export.engine_gate import EngineRun
from edgeformer.export.progress import Progress

FLOAT32 = NativeOptions(kv="float32", use_disk_cache=False)


def int8(float32_layers: tuple[int, ...] = ()) -> NativeOptions:
    """An int8 cache that is float32 in some layers."""
    return NativeOptions(kv="int8", use_disk_cache=False, float32_layers=float32_layers)


class CacheChoice:
    """Measures the caches of the native engine for a graph file.

    `problem`: why the native engine cannot run it; "" where it can.
    """

    def __init__(self, graph: Path, inputs: Collection[str], text: Text) -> None:
        self._graph, self._inputs = graph, inputs
        self.problem = ""
        self.graphs: dict[str, Runs] = {}  # to be scored with the bundle's own graph
        self._layers: tuple[int, ...] = ()  # whose cache can be int8
        try:
            engine = self._engine(int8())
            runs = {"float32": self._run(FLOAT32), "int8": EngineRun(engine, inputs)}
            runs["int8"]({"input_ids": text.ids[None, :8], "position_ids": np.arange(8)[None]})
        except (EdgeformerError, MemoryError) as error:
            self.problem = f"the native engine cannot run it here: {first_line(error)[:400]}"
            return
        if engine.int8_layers:
            self._layers, self.graphs = engine.int8_layers, {**runs}
        else:
            self.problem = "the graph reads its cache itself, which is always float32"

    def _engine(self, options: NativeOptions) -> NativeEngine:
        return NativeEngine.create(self._graph, "model", None, options)

    def _run(self, options: NativeOptions) -> EngineRun:
        return EngineRun(self._engine(options), self._inputs)

    def report(self, scores: dict[str, Score], text: Text, reference: Runs, progress: Progress) -> dict[str, Any]:
        """The entry `kv_cache` of the manifest: what each type of cache costs, and the layers that are float32."""
        if self.problem:
            return {"unmeasured": self.problem}
        self.graphs = {}  # memory: other engines follow
        float32, whole = scores["float32"], scores["int8"]
        if not np.isfinite([float32.kl, float32.loss, whole.kl, whole.loss]).all():
            return {"unmeasured": "the native engine's logits are not finite"}
        layers: tuple[int, ...] = ()
        auto = whole
        if CacheCost(float32.mean_kl, whole.mean_kl).too_much:
            progress.stage("find the layers where an int8 cache costs too much")
            layers, auto = self._chosen(float32, text, reference, progress)
        found = {"float32": float32, "int8": whole, "auto": auto}
        return {
            "tokens": float32.tokens,
            "text": text.name,
            **{kind: score.as_dict() for kind, score in found.items()},
            "float32_layers": list(layers),
        }

    def _chosen(self, float32: Score, text: Text, reference: Runs, progress: Progress) -> tuple[tuple[int, ...], Score]:
        """Few layers in float32, the most expensive first, with which the others cost no more than allowed.

        Errors of different layers are independent, and KL grows with their squares: so costs add up, nearly. What that
        predicts is measured, and where it is too much, twice as many layers are tried, up to all.
        """

        def measured(options: NativeOptions, on: Text) -> Score:
            return on.score(reference, {"": self._run(options)}, progress)[""]

        costs = self._costs_alone(measured, text.first())
        order = sorted(costs, key=lambda layer: (-costs[layer], layer))
        count, limit = 1, CacheCost(float32.mean_kl).limit
        while count < len(order) and sum(costs[layer] for layer in order[count:]) > limit:
            count += 1
        while count < len(order):
            layers = tuple(sorted(order[:count]))
            score = measured(int8(layers), text)
            if not CacheCost(float32.mean_kl, score.mean_kl).too_much:
                return layers, score
            count *= 2
        return self._layers, float32

    def _costs_alone(self, measured: Callable[[NativeOptions, Text], Score], text: Text) -> dict[int, float]:
        """Layer -> the KL divergence that int8 adds in that layer alone."""
        own = measured(FLOAT32, text).mean_kl
        others = {layer: tuple(other for other in self._layers if other != layer) for layer in self._layers}
        return {layer: measured(int8(rest), text).mean_kl - own for layer, rest in others.items()}


def warning(manifest: dict[str, Any]) -> str:
    """What to tell the user of a bundle whose int8 cache would cost more than its quantized weights; else ""."""
    cost = CacheCost.of(manifest)
    if cost.unmeasured or not cost.too_much:
        return ""
    return (
        f"an int8 KV cache would add {cost.of_int8:.2g} nats of KL divergence, more than the quantized weights' "
        f"{cost.float32:.2g}. So the native engine's cache is float32 in {named_layers(cost.float32_layers)}: it then "
        f"adds {max(0.0, cost.of_auto):.2g}. A float32 layer takes nearly four times the memory; kv='int8' forces int8."
    )
