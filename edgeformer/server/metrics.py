"""Prometheus metrics under the names of llama-server and vLLM, so that their dashboards work.

https://github.com/ggml-org/llama.cpp/tree/master/tools/server (GET /metrics),
https://docs.vllm.ai/en/latest/design/metrics

Tokens and steps are counted as they come, also those of answers that are cancelled or fail (live_metrics.py). What
belongs to a whole answer is counted here, at its end. A prompt with several answers runs once and is counted once.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest

from edgeformer.decoding.counters import GAP_BOUNDS
from edgeformer.decoding.result import Result, Timings
from edgeformer.decoding.worker import Answer
from edgeformer.server.live_metrics import LLAMA, VLLM, LiveMetrics, Recent
from edgeformer.server.registry import Entry, Registry

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
# The bounds of vLLM, and smaller ones for small models.
_FIRST = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0,
    640.0, 2560.0,
)  # fmt: skip
_WHOLE = (
    0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0,
    60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0,
)  # fmt: skip
_TOKENS = tuple(float(digit * 10**zeros) for zeros in range(6) for digit in (1, 2, 5))

# Finish reasons -> those of vLLM
REASONS = {"eos": "stop", "stop": "stop", "length": "length", "context": "length", "time": "length", "cancel": "abort"}
FAILED = "error"

_COUNTERS = {
    "llamacpp:prompt_tokens_cached": "Prompt tokens that the prefix cache held.",
    "llamacpp:prompt_seconds": "Seconds in which prompts ran, summed over the requests.",
    "llamacpp:tokens_predicted_seconds": "Seconds in which tokens were generated, summed over the answers.",
    "vllm:prompt_tokens": "Prompt tokens, with those that were cached.",
    "vllm:prompt_tokens_cached": "Prompt tokens that the prefix cache held.",
    "vllm:prefix_cache_queries": "Prompt tokens that were looked up in the prefix cache.",
    "vllm:prefix_cache_hits": "Prompt tokens that the prefix cache held.",
}
_HISTOGRAMS = {
    # of each prompt
    "vllm:time_to_first_token_seconds": ("Seconds from the request to its first token.", _FIRST),
    "vllm:request_queue_time_seconds": ("Seconds that a request waited.", _WHOLE),
    "vllm:request_prefill_time_seconds": ("Seconds in which a prompt ran.", _WHOLE),
    "vllm:request_prompt_tokens": ("Tokens of a prompt.", _TOKENS),
    "vllm:request_prefill_kv_computed_tokens": ("Tokens of a prompt that were not cached.", _TOKENS),
    "vllm:request_params_n": ("Answers that a request asked for.", (1.0, 2.0, 5.0, 10.0, 20.0)),
    "vllm:request_max_num_generation_tokens": ("Tokens of the longest answer of a request.", _TOKENS),
    # of each answer
    "vllm:request_generation_tokens": ("Tokens of an answer.", _TOKENS),
    "vllm:request_decode_time_seconds": ("Seconds from the first token of an answer to its last.", _WHOLE),
    "vllm:request_inference_time_seconds": ("Seconds in which an answer ran, with its prompt.", _WHOLE),
    "vllm:e2e_request_latency_seconds": ("Seconds of an answer, with its time in the queue.", _WHOLE),
    "vllm:request_time_per_output_token_seconds": ("Mean seconds between the tokens of an answer.", GAP_BOUNDS),
}

log = logging.getLogger("edgeformer.server")


class Metrics:
    """The metrics of one server."""

    def __init__(self, models: Registry) -> None:
        self._registry = CollectorRegistry()
        self._counters = {
            name: Counter(name, text, _labels(name), registry=self._registry) for name, text in _COUNTERS.items()
        }
        self._histograms = {
            name: Histogram(name, text, _labels(name), buckets=bounds, registry=self._registry)
            for name, (text, bounds) in _HISTOGRAMS.items()
        }
        self._ended = Counter(
            "vllm:request_success", "Answers by their end.", (*VLLM, "finished_reason"), registry=self._registry
        )
        self._requests = Counter(
            "edgeformer_http_requests", "Requests by path and status.", ("path", "status"), registry=self._registry
        )
        self._recent: dict[str, tuple[Recent, Recent]] = {}
        for name, entry in models.entries.items():
            self._recent[name] = (Recent(), Recent())
            self._begin(entry)
        self._registry.register(LiveMetrics(models, self._recent))
        ProcessCollector(registry=self._registry)  # memory and CPU seconds

    def text(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self._registry)

    def request(self, path: str, status: int) -> None:
        """A request has ended; `path` is the route's, so that there are few."""
        self._requests.labels(path, str(status)).inc()

    def watch(self, model: str, answer: Answer, n: int) -> None:
        """Counts the `n` answers to one prompt when they end, however they do: in the thread of the scheduler."""

        def end(results: list[Result] | None, error: Exception | None) -> None:
            try:
                if results is None:
                    self._ended.labels(*_values(VLLM, model), FAILED).inc(n)
                else:
                    self._answers(model, results)
            except Exception:  # the scheduler must go on
                log.exception("answer was not counted", extra={"model": model, "error": str(error)})

        answer.when_done(end)

    def encoded(self, model: str, queue_seconds: float, seconds: float) -> None:
        """A request to an encoder has ended."""
        self._ended.labels(*_values(VLLM, model), "stop").inc()
        self._observe(model, "vllm:request_queue_time_seconds", queue_seconds)
        self._observe(model, "vllm:request_inference_time_seconds", seconds)
        self._observe(model, "vllm:e2e_request_latency_seconds", queue_seconds + seconds)

    def _begin(self, entry: Entry) -> None:
        """The series of a model begin at 0, so that Prometheus sees the first growth."""
        for name, counter in self._counters.items():
            counter.labels(*_values(_labels(name), entry.name))
        for reason in sorted({*REASONS.values(), FAILED}):
            self._ended.labels(*_values(VLLM, entry.name), reason)

    def _answers(self, model: str, results: Sequence[Result]) -> None:
        if results[0].timings.new_tokens:
            self._prompt(model, results[0].timings)
        for result in results:
            self._ended.labels(*_values(VLLM, model), REASONS[result.finish_reason]).inc()
            self._count(model, "llamacpp:tokens_predicted_seconds", result.timings.decode_seconds)
            self._recent[model][1].add(max(0, len(result.ids) - 1), result.timings.decode_seconds)
        whole = [one for one in results if one.finish_reason != "cancel"]
        if not whole:
            return
        first = whole[0].timings
        of_prompt = {
            "vllm:request_queue_time_seconds": first.queue_seconds,
            "vllm:request_prefill_time_seconds": first.prompt_seconds,
            "vllm:request_prompt_tokens": first.prompt_tokens,
            "vllm:request_prefill_kv_computed_tokens": first.prompt_tokens - first.reused_tokens,
            "vllm:request_params_n": len(results),
            "vllm:request_max_num_generation_tokens": max(len(one.ids) for one in whole),
        }
        if first.new_tokens:
            of_prompt["vllm:time_to_first_token_seconds"] = first.queue_seconds + first.first_token_seconds
        for name, value in of_prompt.items():
            self._observe(model, name, value)
        for result in whole:
            self._answer(model, result.timings)

    def _prompt(self, model: str, timings: Timings) -> None:
        """The tokens of a prompt that has run."""
        self._count(model, "llamacpp:prompt_seconds", timings.prompt_seconds)
        self._recent[model][0].add(timings.prompt_tokens - timings.reused_tokens, timings.prompt_seconds)
        for name in ("vllm:prompt_tokens", "vllm:prefix_cache_queries"):
            self._count(model, name, timings.prompt_tokens)
        for name in ("llamacpp:prompt_tokens_cached", "vllm:prompt_tokens_cached", "vllm:prefix_cache_hits"):
            self._count(model, name, timings.reused_tokens)

    def _answer(self, model: str, timings: Timings) -> None:
        running = timings.first_token_seconds + timings.decode_seconds
        self._observe(model, "vllm:request_generation_tokens", timings.new_tokens)
        self._observe(model, "vllm:request_decode_time_seconds", timings.decode_seconds)
        self._observe(model, "vllm:request_inference_time_seconds", running)
        self._observe(model, "vllm:e2e_request_latency_seconds", timings.queue_seconds + running)
        if timings.new_tokens > 1:
            mean = timings.decode_seconds / (timings.new_tokens - 1)
            self._observe(model, "vllm:request_time_per_output_token_seconds", mean)

    def _count(self, model: str, name: str, value: float) -> None:
        self._counters[name].labels(*_values(_labels(name), model)).inc(value)

    def _observe(self, model: str, name: str, value: float) -> None:
        self._histograms[name].labels(*_values(_labels(name), model)).observe(value)


def _labels(name: str) -> tuple[str, ...]:
    return VLLM if name.startswith("vllm:") else LLAMA


def _values(labels: tuple[str, ...], model: str) -> tuple[Any, ...]:
    """Of the labels. Each model has one engine here, with number 0."""
    return (model,) if labels == LLAMA else (model, "0")
