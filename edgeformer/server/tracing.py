"""Traces of requests, and OpenTelemetry's metrics of them, sent by OTLP over HTTP; no prompts and no answers.

A request is one span of the kind SERVER, in the trace that its header `traceparent` names (W3C Trace Context). It has
the spans "queue", "prefill" and "decode" of its answers as children. Nothing of OpenTelemetry is imported unless an
endpoint is given.
"""

from __future__ import annotations

import logging
import os
import time
from typing import TYPE_CHECKING, Any

from edgeformer.decoding.result import Result
from edgeformer.decoding.worker import Answer
from edgeformer.errors import InputError, pip_install
from edgeformer.server import trace_names as names
from edgeformer.server.options import ServeOptions

if TYPE_CHECKING:
    from opentelemetry.sdk.metrics.export import MetricReader
    from opentelemetry.sdk.trace import SpanProcessor
    from starlette.requests import Request

ENDPOINTS = tuple(f"OTEL_EXPORTER_OTLP_{kind}ENDPOINT" for kind in ("", "TRACES_", "METRICS_"))
CLOSE_MILLISECONDS = 5000  # for what is not sent yet

log = logging.getLogger("edgeformer.server")


def open_tracing(options: ServeOptions) -> Tracing | None:
    """Sends to `options.otlp_endpoint`, else to where OpenTelemetry's variables say; None without either.

    Raises:
        InputError: an endpoint is given, and OpenTelemetry is not installed.
    """
    base = options.otlp_endpoint
    said = ["--otlp-endpoint"] if base else [name for name in ENDPOINTS if os.environ.get(name)]
    if not said or os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return None
    try:
        from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ModuleNotFoundError as error:
        needed = pip_install("opentelemetry-sdk", "opentelemetry-exporter-otlp-proto-http")
        raise InputError(f"{said[0]} is given, and {error.name} is not installed: {needed}") from error
    base = None if base is None else base.rstrip("/")
    spans = OTLPSpanExporter(endpoint=base and f"{base}/v1/traces")
    metrics = OTLPMetricExporter(endpoint=base and f"{base}/v1/metrics")
    return Tracing(BatchSpanProcessor(spans), PeriodicExportingMetricReader(metrics))


class Tracing:
    """The tracer of one server. `close` it: it sends what is left."""

    def __init__(self, processor: SpanProcessor, reader: MetricReader) -> None:
        from opentelemetry.sdk.metrics import MeterProvider
        from opentelemetry.sdk.resources import SERVICE_NAME, OTELResourceDetector, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        import edgeformer

        found = OTELResourceDetector().detect()  # OTEL_SERVICE_NAME, OTEL_RESOURCE_ATTRIBUTES
        resource = Resource.create({SERVICE_NAME: names.SERVICE, "service.version": edgeformer.__version__}).merge(
            found
        )
        self._spans = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._spans.add_span_processor(processor)
        self._meters = MeterProvider([reader], resource=resource, shutdown_on_exit=False)
        self.tracer = self._spans.get_tracer(names.SERVICE, edgeformer.__version__)
        meter = self._meters.get_meter(names.SERVICE, edgeformer.__version__)
        self.histograms = {
            name: meter.create_histogram(name, "s", text, explicit_bucket_boundaries_advisory=bounds)
            for name, (text, bounds) in names.HISTOGRAMS.items()
        }
        self.propagator = TraceContextTextMapPropagator()

    def close(self) -> None:
        """Sends what has not been sent, for a few seconds. Blocks."""
        self._spans.force_flush(CLOSE_MILLISECONDS)
        self._spans.shutdown()
        self._meters.shutdown(timeout_millis=CLOSE_MILLISECONDS)


class RequestTrace:
    """The span of one request. `end` it."""

    def __init__(self, tracing: Tracing, request: Request, route: str, request_id: str) -> None:
        from opentelemetry.trace import SpanKind, format_trace_id, set_span_in_context

        attributes = {
            names.HTTP_METHOD: request.method,
            names.HTTP_ROUTE: route,
            names.URL_SCHEME: request.url.scheme,
            names.URL_PATH: request.url.path,
            names.REQUEST_ID: request_id,
        }
        self._tracing, self._route = tracing, route
        self._began = time.perf_counter()
        self._failure: str | None = None
        self._span = tracing.tracer.start_span(
            f"{request.method} {route}",
            tracing.propagator.extract(request.headers),
            SpanKind.SERVER,
            attributes,
        )
        self._context = set_span_in_context(self._span)
        self.trace_id = format_trace_id(self._span.get_span_context().trace_id)

    def watch(self, model: str, answer: Answer) -> None:
        """Makes the spans of an answer that was queued now, when it ends: in the thread of the scheduler."""
        queued = time.time_ns()

        def end(results: list[Result] | None, error: Exception | None) -> None:
            try:
                if results is None:
                    self._failure = type(error).__name__
                else:
                    self._answers(model, queued, results)
            except Exception:  # the scheduler must go on
                log.exception("answer was not traced")

        answer.when_done(end)

    def end(self, status: int, body: Any, facts: dict[str, Any]) -> None:
        """The request has ended; `facts` is what the log says of it, `body` what was asked, if it could be read."""
        from opentelemetry.trace import StatusCode

        span, shared = self._span, self._shared(facts.get("model"))
        span.set_attribute(names.HTTP_STATUS, status)
        failure = self._failure or facts.get("error") or ("cancelled" if facts.get("finish") == "abort" else None)
        if failure is not None:
            span.set_attribute(names.ERROR_TYPE, failure)
        if status >= 500 or self._failure is not None:
            span.set_status(StatusCode.ERROR)
        if names.OPERATION in shared:
            span.update_name(f"{shared[names.OPERATION]} {facts.get('model', '')}".rstrip())
            span.set_attributes({**shared, **_asked(body), **_used(facts)})
            error = {} if failure is None else {names.ERROR_TYPE: failure}
            seconds = time.perf_counter() - self._began
            self._tracing.histograms[names.DURATION].record(seconds, {**shared, **error})
        span.end()

    def _shared(self, model: str | None) -> dict[str, str]:
        """The attributes of spans and metrics; none of routes that are no operation of a model."""
        operation = names.OPERATIONS.get(self._route)
        if operation is None:
            return {}
        found = {names.OPERATION: operation, names.PROVIDER: names.SERVICE}
        return found if model is None else {**found, names.REQUEST_MODEL: model, names.RESPONSE_MODEL: model}

    def _answers(self, model: str, queued: int, results: list[Result]) -> None:
        first, shared = results[0].timings, self._shared(model)
        began = queued + _nanoseconds(first.queue_seconds)
        if not first.new_tokens and not first.queue_seconds:  # cancelled before it ran
            self._child(names.QUEUE, queued, time.time_ns(), {})
            return
        self._child(names.QUEUE, queued, began, {})
        prompt = {names.INPUT_TOKENS: first.prompt_tokens, names.CACHED_TOKENS: first.reused_tokens}
        self._child(names.PREFILL, began, began + _nanoseconds(first.prompt_seconds), prompt)
        if first.new_tokens:
            seconds = first.queue_seconds + first.first_token_seconds
            self._tracing.histograms[names.FIRST_TOKEN].record(seconds, shared)
        for index, result in enumerate(results):
            timings = result.timings
            if not timings.new_tokens:
                continue
            start = began + _nanoseconds(timings.first_token_seconds)
            attributes = {
                names.CHOICE: index,
                names.OUTPUT_TOKENS: timings.new_tokens,
                names.FINISH_REASONS: [result.finish_reason],
                names.DRAFTED: result.drafts.proposed,
                names.ACCEPTED: result.drafts.accepted,
            }
            self._child(names.DECODE, start, start + _nanoseconds(timings.decode_seconds), attributes)
            if timings.new_tokens > 1 and result.finish_reason != "cancel":
                mean = timings.decode_seconds / (timings.new_tokens - 1)
                self._tracing.histograms[names.PER_TOKEN].record(mean, shared)

    def _child(self, name: str, start: int, end: int, attributes: dict[str, Any]) -> None:
        span = self._tracing.tracer.start_span(name, self._context, attributes=attributes, start_time=start)
        span.end(end)


def _asked(body: Any) -> dict[str, Any]:
    """The fields of a request that have an attribute."""
    found: dict[str, Any] = {}
    for attribute, fields in names.REQUEST_FIELDS.items():
        given = (getattr(body, field, None) for field in fields)
        value = next((one for one in given if isinstance(one, int | float)), None)
        if value is not None:
            found[attribute] = value
    return found


def _used(facts: dict[str, Any]) -> dict[str, Any]:
    """What the log knows of the answer."""
    found = {
        names.INPUT_TOKENS: facts.get("prompt_tokens"),
        names.CACHED_TOKENS: facts.get("cached_tokens"),
        names.OUTPUT_TOKENS: facts.get("completion_tokens"),
        names.FINISH_REASONS: facts["finish"].split(",") if facts.get("finish") else None,
    }
    return {name: value for name, value in found.items() if value is not None}


def _nanoseconds(seconds: float) -> int:
    return round(seconds * 1e9)
