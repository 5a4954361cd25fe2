"""The metrics that are read when they are asked for: gauges, and what the schedulers have counted."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from edgeformer.decoding.counters import Counters, Tally
from edgeformer.server.registry import Entry, Registry

LLAMA = ("model_name",)  # llama-server has no labels, and one model
VLLM = ("model_name", "engine")
WINDOW = 60.0  # seconds

# name -> (text, value)
_COUNTERS: dict[str, tuple[str, Callable[[Counters], float]]] = {
    "llamacpp:prompt_tokens": ("Prompt tokens that ran, without those that were cached.", lambda c: c.prompt_tokens),
    "llamacpp:tokens_predicted": ("Generated tokens.", lambda c: c.new_tokens),
    "llamacpp:n_decode": ("Steps: calls of the engine.", lambda c: c.steps),
    "vllm:generation_tokens": ("Generated tokens.", lambda c: c.new_tokens),
}
_DRAFTS: dict[str, tuple[str, Callable[[Counters], float]]] = {
    "spec_decode_num_drafts": ("Steps of a sequence that had drafts.", lambda c: c.drafts),
    "spec_decode_num_draft_tokens": ("Drafted tokens.", lambda c: c.draft_tokens),
    "spec_decode_num_accepted_tokens": ("Drafted tokens that were right.", lambda c: sum(c.accepted)),
}
_TALLIES: dict[str, tuple[str, Callable[[Counters], Tally]]] = {
    "vllm:iteration_tokens_total": ("Tokens of a step: of prompts, and generated.", lambda c: c.step_tokens),
    "vllm:inter_token_latency_seconds": ("Seconds between two steps that gave an answer tokens.", lambda c: c.gaps),
}


class Recent:
    """Tokens per second of what ended in the last minute; 0 if nothing did."""

    def __init__(self) -> None:
        self._ended: deque[tuple[float, int, float]] = deque()

    def add(self, tokens: int, seconds: float) -> None:
        """Something of so many tokens has ended, which took so many seconds."""
        now = time.monotonic()
        self._ended.append((now, tokens, seconds))
        while self._ended and self._ended[0][0] < now - WINDOW:
            self._ended.popleft()

    @property
    def speed(self) -> float:
        """Tokens per second."""
        since = time.monotonic() - WINDOW
        ended = [one for one in tuple(self._ended) if one[0] >= since]
        seconds = sum(one[2] for one in ended)
        return sum(one[1] for one in ended) / seconds if seconds > 0 else 0.0


class LiveMetrics(Collector):
    """Of all models, loaded or not. `recent` has each model's prompts and answers."""

    def __init__(self, models: Registry, recent: Mapping[str, tuple[Recent, Recent]]) -> None:
        self._models = models
        self._recent = recent

    def collect(self) -> Iterable[Metric]:
        """The metrics."""
        entries = list(self._models.entries.values())
        yield from _gauges(entries, self._recent)
        for name, (text, value) in _COUNTERS.items():
            yield _counter(name, text, {entry.name: value(entry.counters) for entry in entries})
        for prefix in ("llamacpp:", "vllm:"):
            for name, (text, value) in _DRAFTS.items():
                yield _counter(prefix + name, text, {entry.name: value(entry.counters) for entry in entries})
            yield _by_position(prefix, entries)
        for name, (text, tally) in _TALLIES.items():
            family = HistogramMetricFamily(name, text, labels=VLLM)
            for entry in entries:
                found = tally(entry.counters)
                family.add_metric(_values(name, entry.name), list(_buckets(found)), found.sum)
            yield family


def _gauges(entries: list[Entry], recent: Mapping[str, tuple[Recent, Recent]]) -> Iterator[Metric]:
    loads = {entry.name: _load_of(entry) for entry in entries}
    running, waiting, share = ({name: load[place] for name, load in loads.items()} for place in range(3))
    yield _gauge("llamacpp:requests_processing", "Requests that run.", running)
    yield _gauge("llamacpp:requests_deferred", "Requests that wait.", waiting)
    yield _gauge("vllm:num_requests_running", "Requests that run.", running)
    yield _gauge("vllm:num_requests_waiting", "Requests that wait.", waiting)
    yield _gauge("vllm:kv_cache_usage_perc", "Share of the memory of KV caches that is reserved, 0 to 1.", share)
    busy = {entry.name: _busy(entry.counters) for entry in entries}
    yield _gauge("llamacpp:n_busy_slots_per_decode", "Sequences of a step, on average since the start.", busy)
    longest = {entry.name: float(entry.counters.longest) for entry in entries}
    yield _gauge("llamacpp:n_tokens_max", "Most tokens of a sequence, with its prompt.", longest)
    minute = "in the last minute, while they ran"
    prompts = {name: one[0].speed for name, one in recent.items()}
    yield _gauge("llamacpp:prompt_tokens_seconds", f"Prompt tokens per second of prompts that ended {minute}.", prompts)
    answers = {name: one[1].speed for name, one in recent.items()}
    yield _gauge("llamacpp:predicted_tokens_seconds", f"Tokens per second of answers that ended {minute}.", answers)
    loaded = {entry.name: float(entry.loaded is not None) for entry in entries}
    yield _gauge("edgeformer_model_loaded", "Whether the model is in memory.", loaded)


def _load_of(entry: Entry) -> tuple[float, float, float]:
    """(requests that run, that wait, share of the cache)"""
    loaded = entry.loaded
    if loaded is None:
        return 0, 0, 0
    if loaded.scheduler is None:
        return float(loaded.turn.locked()), loaded.waiting, 0
    share = loaded.scheduler.reserved_bytes / loaded.cache_bytes if loaded.cache_bytes else 0
    return loaded.scheduler.running, loaded.scheduler.waiting, share


def _busy(counters: Counters) -> float:
    return counters.sequences / counters.steps if counters.steps else 0.0


def _gauge(name: str, text: str, values: Mapping[str, float]) -> Metric:
    family = GaugeMetricFamily(name, text, labels=VLLM if name.startswith("vllm:") else LLAMA)
    for model, value in values.items():
        family.add_metric(_values(name, model), value)
    return family


def _counter(name: str, text: str, values: Mapping[str, float]) -> Metric:
    family = CounterMetricFamily(name, text, labels=VLLM if name.startswith("vllm:") else LLAMA)
    for model, value in values.items():
        family.add_metric(_values(name, model), value)
    return family


def _by_position(prefix: str, entries: list[Entry]) -> Metric:
    name = f"{prefix}spec_decode_num_accepted_tokens_per_pos"
    labels = VLLM if prefix == "vllm:" else LLAMA
    family = CounterMetricFamily(name, "Drafted tokens that were right, by their place.", labels=(*labels, "position"))
    for entry in entries:
        for position, count in enumerate(tuple(entry.counters.accepted)):
            family.add_metric([*_values(name, entry.name), str(position)], count)
    return family


def _values(name: str, model: str) -> list[str]:
    """Of the labels. Each model has one engine here, with number 0."""
    return [model, "0"] if name.startswith("vllm:") else [model]


def _buckets(tally: Tally) -> Iterator[tuple[str, float]]:
    """(upper bound, values up to it)"""
    count = 0
    for bound, own in zip((*tally.bounds, float("inf")), tuple(tally.counts), strict=True):
        count += own
        yield "+Inf" if bound == float("inf") else str(float(bound)), count
