"""The names of OpenTelemetry's conventions that traces and OTLP metrics use, in one place: they still change.

https://opentelemetry.io/docs/specs/semconv/gen-ai (status: Development), .../semconv/http. tests/server/test_tracing.py
compares them with the package opentelemetry-semantic-conventions.
"""

from __future__ import annotations

SERVICE = "edgeformer"  # also the provider's name

HTTP_METHOD, HTTP_ROUTE, HTTP_STATUS = "http.request.method", "http.route", "http.response.status_code"
URL_SCHEME, URL_PATH = "url.scheme", "url.path"
ERROR_TYPE = "error.type"

OPERATION, PROVIDER = "gen_ai.operation.name", "gen_ai.provider.name"
REQUEST_MODEL, RESPONSE_MODEL = "gen_ai.request.model", "gen_ai.response.model"
FINISH_REASONS = "gen_ai.response.finish_reasons"
INPUT_TOKENS, OUTPUT_TOKENS = "gen_ai.usage.input_tokens", "gen_ai.usage.output_tokens"
CACHED_TOKENS = "gen_ai.usage.cache_read.input_tokens"

# Routes -> the operation
OPERATIONS = {
    "/v1/chat/completions": "chat",
    "/v1/responses": "chat",
    "/v1/messages": "chat",
    "/v1/completions": "text_completion",
    "/v1/embeddings": "embeddings",
}
# Attributes -> the fields of requests that have them; the first that is set counts
REQUEST_FIELDS = {
    "gen_ai.request.max_tokens": ("max_completion_tokens", "max_tokens", "max_output_tokens"),
    "gen_ai.request.temperature": ("temperature",),
    "gen_ai.request.top_p": ("top_p",),
    "gen_ai.request.top_k": ("top_k",),
    "gen_ai.request.seed": ("seed",),
    "gen_ai.request.choice.count": ("n",),
    "gen_ai.request.frequency_penalty": ("frequency_penalty",),
    "gen_ai.request.presence_penalty": ("presence_penalty",),
    "gen_ai.request.stream": ("stream",),
}

# Of this server alone
REQUEST_ID = "edgeformer.request.id"
CHOICE = "edgeformer.choice.index"
DRAFTED, ACCEPTED = "edgeformer.drafts.proposed", "edgeformer.drafts.accepted"
QUEUE, PREFILL, DECODE = "queue", "prefill", "decode"  # spans

DURATION, FIRST_TOKEN = "gen_ai.server.request.duration", "gen_ai.server.time_to_first_token"
PER_TOKEN = "gen_ai.server.time_per_output_token"
# name -> (text, bounds in seconds: those of the conventions)
HISTOGRAMS = {
    DURATION: (
        "Seconds of a request, to the last byte of its answer.",
        (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92),
    ),
    FIRST_TOKEN: (
        "Seconds from the request to its first token.",
        (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0),
    ),
    PER_TOKEN: (
        "Mean seconds between the tokens of an answer.",
        (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5),
    ),
}
