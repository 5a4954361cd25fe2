"""Traces: spans of requests and their phases in the caller's trace, and nothing of OpenTelemetry unless asked for."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest
from support.serving import running, wait_for

for module in ("opentelemetry.sdk", "opentelemetry.exporter.otlp.proto.http"):
    pytest.importorskip(module)

from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from edgeformer.errors import InputError
from edgeformer.server import trace_names
from edgeformer.server.options import ServeOptions
from edgeformer.server.tracing import Tracing, open_tracing

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
GIVEN = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
CHAT = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 6, "ignore_eos": True}


@pytest.fixture(scope="module")
def traced(served):
    with running([f"lm={served['lm']}", f"encoder={served['encoder']}"]) as one:
        yield one


@pytest.fixture
def collected(traced):
    """(the exporter of spans, the reader of metrics) of a server that traces."""
    spans, metrics = InMemorySpanExporter(), InMemoryMetricReader()
    traced.app.state.server.tracing = Tracing(SimpleSpanProcessor(spans), metrics)
    yield spans, metrics
    traced.app.state.server.tracing = None


def spans_of(exporter, count):
    wait_for(lambda: len(exporter.get_finished_spans()) >= count)
    found = exporter.get_finished_spans()
    assert len(found) == count, [one.name for one in found]
    return sorted(found, key=lambda one: (one.start_time, -one.end_time))


def post(server, path, body, **more):
    return httpx.post(server.url + path, json={"model": "lm"} | body, timeout=60, **more)


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_has_a_span_and_its_phases_are_children(traced, collected, stream):
    body = CHAT | {"stream": stream, "stream_options": {"include_usage": True}} if stream else CHAT
    answer = post(traced, "/v1/chat/completions", body | {"temperature": 0.5, "seed": 3}, headers=GIVEN)
    lines = answer.text.split("data: ")
    usage = json.loads(lines[-2])["usage"] if stream else answer.json()["usage"]
    request, queue, prefill, decode = spans_of(collected[0], 4)
    assert (request.name, request.kind) == ("chat lm", SpanKind.SERVER)
    assert (queue.name, prefill.name, decode.name) == ("queue", "prefill", "decode")
    assert request.parent.span_id == int(PARENT, 16) and request.parent.is_remote
    for one in (request, queue, prefill, decode):
        assert one.context.trace_id == int(TRACE, 16)
    for child in (queue, prefill, decode):
        assert child.parent.span_id == request.context.span_id
        assert request.start_time <= child.start_time <= child.end_time
    assert queue.end_time == prefill.start_time <= prefill.end_time <= decode.start_time
    facts = request.attributes
    assert (
        facts["gen_ai.usage.input_tokens"] == usage["prompt_tokens"] == prefill.attributes["gen_ai.usage.input_tokens"]
    )
    assert facts["gen_ai.usage.output_tokens"] == decode.attributes["gen_ai.usage.output_tokens"] == 6
    assert facts["gen_ai.usage.cache_read.input_tokens"] == usage["prompt_tokens_details"]["cached_tokens"]
    assert facts["gen_ai.response.finish_reasons"] == ("length",)
    assert facts["gen_ai.request.temperature"] == 0.5 and facts["gen_ai.request.seed"] == 3
    assert facts["gen_ai.request.max_tokens"] == 6
    assert facts["http.route"] == "/v1/chat/completions" and facts["http.response.status_code"] == 200
    assert facts["edgeformer.request.id"] == answer.headers["x-request-id"]
    assert "hello" not in str([one.to_json() for one in (request, queue, prefill, decode)])


def test_each_answer_has_its_own_decode_span(traced, collected):
    post(traced, "/v1/completions", {"prompt": ["a", "b"], "max_tokens": 4, "n": 2, "ignore_eos": True})
    found = spans_of(collected[0], 1 + 2 * (2 + 2))
    names = [one.name for one in found]
    assert names.count("decode") == 4 and names.count("prefill") == 2 and "text_completion lm" in names
    assert [one.attributes[trace_names.CHOICE] for one in found if one.name == "decode"].count(1) == 2


def test_a_cancelled_request_is_marked(traced, collected, slow):
    with httpx.stream(
        "POST", traced.url + "/v1/chat/completions", json=CHAT | {"model": "lm", "max_tokens": 400, "stream": True}
    ) as answer:
        next(answer.iter_lines())
    request, *_, decode = spans_of(collected[0], 4)
    assert request.attributes["error.type"] == "cancelled"
    assert decode.attributes["gen_ai.response.finish_reasons"] == ("cancel",)
    assert decode.attributes["gen_ai.usage.output_tokens"] < 400


def test_a_failure_is_an_error(traced, collected, monkeypatch):
    from edgeformer.decoding.sequence import Sequence
    from edgeformer.errors import EdgeformerError

    def fail(self, logits, likeliest):
        raise EdgeformerError("planted")

    monkeypatch.setattr(Sequence, "accept", fail)
    assert post(traced, "/v1/chat/completions", CHAT).status_code == 500
    (request,) = spans_of(collected[0], 1)
    assert request.status.status_code == StatusCode.ERROR
    assert request.attributes["error.type"] == "EdgeformerError"


@pytest.mark.parametrize(
    ("path", "body", "name", "error"),
    [
        ("/v1/embeddings", {"model": "encoder", "input": "a"}, "embeddings encoder", None),
        ("/v1/embeddings", {"model": "no", "input": "a"}, "embeddings", "model_not_found"),
        ("/tokenize", {"model": "lm", "content": "a"}, "POST /tokenize", None),
    ],
)
def test_other_routes_have_a_span(traced, collected, path, body, name, error):
    post(traced, path, body)
    (request,) = spans_of(collected[0], 1)
    assert request.name == name and request.parent is None
    assert request.attributes.get("error.type") == error
    assert request.status.status_code == StatusCode.UNSET  # a 400 is not the server's error


@pytest.mark.parametrize("header", ["", "00-zz-1-01", f"00-{'0' * 32}-{PARENT}-01", f"ff-{TRACE}-{PARENT}-01"])
def test_a_wrong_traceparent_begins_a_trace_of_its_own(traced, collected, header):
    post(traced, "/tokenize", {"content": "a"}, headers={"traceparent": header})
    (request,) = spans_of(collected[0], 1)
    assert request.parent is None and request.context.trace_id != int(TRACE, 16)


def test_probes_are_not_traced(traced, collected):
    for path in ("/health", "/ready", "/metrics"):
        httpx.get(traced.url + path)
    httpx.get(traced.url + "/v1/models")
    assert [one.name for one in spans_of(collected[0], 1)] == ["GET /v1/models"]


def test_the_log_names_the_trace(traced, collected, caplog):
    from edgeformer.server.logs import REQUEST, JsonFormatter

    lines = []

    class Keep(logging.Handler):
        def emit(self, record):
            lines.append(json.loads(JsonFormatter().format(record)))

    handler = Keep()
    logging.getLogger("edgeformer.server").addHandler(handler)
    try:
        logging.getLogger("edgeformer.server").setLevel(logging.INFO)
        post(traced, "/tokenize", {"content": "a"}, headers=GIVEN | {"X-Request-Id": "mine"})
        wait_for(lambda: lines)
    finally:
        logging.getLogger("edgeformer.server").removeHandler(handler)
    assert (lines[0]["id"], lines[0]["trace_id"]) == ("mine", TRACE)
    assert REQUEST.get() == {}  # outside requests


def test_metrics_of_the_conventions_are_recorded(traced, collected):
    post(traced, "/v1/chat/completions", CHAT)
    spans_of(collected[0], 4)
    (resource,) = collected[1].get_metrics_data().resource_metrics
    assert resource.resource.attributes["service.name"] == "edgeformer"
    found = {one.name: one for one in resource.scope_metrics[0].metrics}
    assert found.keys() == trace_names.HISTOGRAMS.keys()
    for one in found.values():
        (point,) = one.data.data_points
        assert one.unit == "s" and point.count == 1 and point.sum > 0
        assert point.attributes["gen_ai.operation.name"] == "chat"
        assert point.attributes["gen_ai.response.model"] == "lm"


def test_the_names_are_those_of_the_conventions():
    from opentelemetry.semconv._incubating.attributes import gen_ai_attributes, http_attributes, url_attributes
    from opentelemetry.semconv._incubating.metrics import gen_ai_metrics
    from opentelemetry.semconv.attributes import error_attributes

    def values(*modules):
        return {value for one in modules for name, value in vars(one).items() if name.isupper()}

    known = values(gen_ai_attributes, http_attributes, url_attributes, error_attributes, gen_ai_metrics)
    used = {value for name, value in vars(trace_names).items() if name.isupper() and isinstance(value, str)}
    own = {trace_names.SERVICE, trace_names.QUEUE, trace_names.PREFILL, trace_names.DECODE}
    used |= {*trace_names.REQUEST_FIELDS, *trace_names.HISTOGRAMS}
    assert {one for one in used - own if not one.startswith("edgeformer.")} <= known
    assert set(trace_names.OPERATIONS.values()) <= {one.value for one in gen_ai_attributes.GenAiOperationNameValues}
    assert "gen_ai.server.requests.duration" not in known


class Receiver(BaseHTTPRequestHandler):
    """Takes OTLP over HTTP, and keeps (path, body)."""

    def do_POST(self):
        self.server.taken.append((self.path, self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_):
        pass


@pytest.fixture
def receiver():
    with ThreadingHTTPServer(("127.0.0.1", 0), Receiver) as one:
        one.taken = []
        threading.Thread(target=one.serve_forever, daemon=True).start()
        yield one
        one.shutdown()


@pytest.mark.parametrize("by_environment", [False, True])
def test_spans_and_metrics_arrive_by_otlp(served, receiver, monkeypatch, by_environment):
    from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    address = f"http://127.0.0.1:{receiver.server_port}"
    if by_environment:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", address)
        monkeypatch.setenv("OTEL_SERVICE_NAME", "kitchen")
    options = {} if by_environment else {"otlp_endpoint": address + "/"}
    with running([f"lm={served['lm']}"], options) as one:
        assert post(one, "/v1/chat/completions", CHAT, headers=GIVEN).status_code == 200
    spans, names = {}, set()
    for path, body in receiver.taken:  # the server has ended: all was sent
        if path == "/v1/traces":
            for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                facts = {one.key: one.value.string_value for one in resource.resource.attributes}
                assert facts["service.name"] == ("kitchen" if by_environment else "edgeformer")
                spans |= {span.name: span for scope in resource.scope_spans for span in scope.spans}
        else:
            assert path == "/v1/metrics"
            for resource in ExportMetricsServiceRequest.FromString(body).resource_metrics:
                names |= {metric.name for scope in resource.scope_metrics for metric in scope.metrics}
    assert spans.keys() == {"chat lm", "queue", "prefill", "decode"}
    assert all(span.trace_id.hex() == TRACE for span in spans.values())
    assert names == trace_names.HISTOGRAMS.keys()


def test_without_an_endpoint_nothing_of_opentelemetry_is_imported(served):
    code = (
        "import sys\nfrom edgeformer.server.app import create_app\nfrom edgeformer.server.options import ServeOptions\n"
        "from edgeformer.server.registry import Registry\noptions = ServeOptions()\n"
        f"create_app(Registry([{str(served['lm'])!r}], options), options)\n"
        "print(sorted(one for one in sys.modules if one.startswith('opentelemetry')))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert found.stdout.strip() == "[]", found.stderr


def test_a_missing_package_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(InputError, match=r"--otlp-endpoint is given, and .* is not installed: .*pip install"):
        open_tracing(ServeOptions(otlp_endpoint="http://localhost:4318"))


def test_an_endpoint_must_be_an_address():
    with pytest.raises(InputError, match="--otlp-endpoint is 'localhost:4318'"):
        ServeOptions(otlp_endpoint="localhost:4318")


def test_the_sdk_can_be_disabled(monkeypatch):
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    assert open_tracing(ServeOptions(otlp_endpoint="http://localhost:4318")) is None
