"""Prometheus metrics under the names of llama-server and vLLM, so that their dashboards work.

https://github.com/ggml-org/llama.cpp/tree/master/tools/server (GET /metrics),
https://docs.vllm.ai/en/latest/design/metrics
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from edgeformer.decoding.result import Result
from edgeformer.server.registry import Entry, Registry

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SHORT = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
_LONG = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
MODEL = ("model_name",)

_COUNTERS = {
    "llamacpp:prompt_tokens": "Prompt tokens that ran.",
    "llamacpp:prompt_seconds": "Seconds in which prompts ran.",
    "llamacpp:tokens_predicted": "Generated tokens.",
    "llamacpp:tokens_predicted_seconds": "Seconds in which tokens were generated.",
    "vllm:prompt_tokens": "Prompt tokens, with those that were cached.",
    "vllm:generation_tokens": "Generated tokens.",
    "vllm:prefix_cache_queries": "Prompt tokens that were looked up in the prefix cache.",
    "vllm:prefix_cache_hits": "Prompt tokens that the prefix cache held.",
    "vllm:spec_decode_num_draft_tokens": "Drafted tokens.",
    "vllm:spec_decode_num_accepted_tokens": "Drafted tokens that were right.",
}
_HISTOGRAMS = {
    "vllm:time_to_first_token_seconds": ("Seconds from the request to its first token.", _LONG),
    "vllm:request_queue_time_seconds": ("Seconds that a request waited.", _LONG),
    "vllm:request_prefill_time_seconds": ("Seconds of a prompt.", _LONG),
    "vllm:request_time_per_output_token_seconds": ("Mean seconds between the tokens of a request.", _SHORT),
    "vllm:e2e_request_latency_seconds": ("Seconds of a whole answer.", _LONG),
}


class Metrics:
    """The metrics of one server."""

    def __init__(self, models: Registry) -> None:
        self._registry = CollectorRegistry()
        self._counters = {name: Counter(name, text, MODEL, registry=self._registry) for name, text in _COUNTERS.items()}
        self._histograms = {
            name: Histogram(name, text, MODEL, buckets=buckets, registry=self._registry)
            for name, (text, buckets) in _HISTOGRAMS.items()
        }
        self._ended = Counter(
            "vllm:request_success", "Answers by their end.", ("model_name", "finished_reason"), registry=self._registry
        )
        self._requests = Counter(
            "edgeformer:http_requests", "Requests by path and status.", ("path", "status"), registry=self._registry
        )
        self._registry.register(_Gauges(models))

    def text(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self._registry)

    def request(self, path: str, status: int) -> None:
        """A request has ended; `path` is the route's, so that there are few."""
        self._requests.labels(path, str(status)).inc()

    def aborted(self, model: str, count: int) -> None:
        """So many answers were ended before their end, because their client went away."""
        self._ended.labels(model, "abort").inc(count)

    def answers(self, model: str, results: Sequence[Result]) -> None:
        """The answers to one prompt have ended."""
        for result in results:
            self._ended.labels(model, result.finish_reason).inc()
            self._count(model, "llamacpp:tokens_predicted", len(result.ids))
            self._count(model, "vllm:generation_tokens", len(result.ids))
            self._count(model, "llamacpp:tokens_predicted_seconds", result.timings.decode_seconds)
            self._count(model, "vllm:spec_decode_num_draft_tokens", result.drafts.proposed)
            self._count(model, "vllm:spec_decode_num_accepted_tokens", result.drafts.accepted)
        first = results[0].timings  # the prompt runs once
        self._count(model, "llamacpp:prompt_tokens", first.prompt_tokens - first.reused_tokens)
        self._count(model, "llamacpp:prompt_seconds", first.prompt_seconds)
        self._count(model, "vllm:prompt_tokens", first.prompt_tokens)
        self._count(model, "vllm:prefix_cache_queries", first.prompt_tokens)
        self._count(model, "vllm:prefix_cache_hits", first.reused_tokens)
        seconds = {
            "vllm:request_queue_time_seconds": first.queue_seconds,
            "vllm:request_prefill_time_seconds": first.prompt_seconds,
            "vllm:e2e_request_latency_seconds": first.queue_seconds + first.first_token_seconds + first.decode_seconds,
        }
        if first.new_tokens:
            seconds["vllm:time_to_first_token_seconds"] = first.queue_seconds + first.first_token_seconds
        if first.new_tokens > 1:
            seconds["vllm:request_time_per_output_token_seconds"] = first.decode_seconds / (first.new_tokens - 1)
        for name, value in seconds.items():
            self._histograms[name].labels(model).observe(value)

    def _count(self, model: str, name: str, value: float) -> None:
        self._counters[name].labels(model).inc(value)


class _Gauges(Collector):
    """What is read when it is asked for."""

    def __init__(self, models: Registry) -> None:
        self._models = models

    def collect(self) -> Iterable[Metric]:
        """The gauges of each model."""
        rows = [(entry, *_load_of(entry)) for entry in self._models.entries.values()]
        yield from _gauges(("llamacpp:requests_processing", "vllm:num_requests_running"), "Running requests.", rows, 1)
        yield from _gauges(("llamacpp:requests_deferred", "vllm:num_requests_waiting"), "Waiting requests.", rows, 2)
        yield from _gauges(("vllm:kv_cache_usage_perc",), "Share of the KV memory that is reserved.", rows, 3)
        loaded = [(entry, float(entry.loaded is not None)) for entry in self._models.entries.values()]
        yield from _gauges(("edgeformer:model_loaded",), "Whether the model is in memory.", loaded, 1)


def _load_of(entry: Entry) -> tuple[float, float, float]:
    loaded = entry.loaded
    if loaded is None:
        return 0, 0, 0
    if loaded.scheduler is None:
        return float(loaded.turn.locked()), loaded.waiting, 0
    share = loaded.scheduler.reserved_bytes / loaded.cache_bytes if loaded.cache_bytes else 0
    return loaded.scheduler.running, loaded.scheduler.waiting, share


def _gauges(
    names: Sequence[str], text: str, rows: Sequence[tuple[Entry, *tuple[float, ...]]], column: int
) -> Iterator[Metric]:
    for name in names:
        family = GaugeMetricFamily(name, text, labels=MODEL)
        for row in rows:
            family.add_metric([row[0].name], float(row[column]))  # type: ignore[arg-type]
        yield family
