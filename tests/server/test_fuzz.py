"""Requests made from our own OpenAPI document, right and wrong ones: no 5xx, and answers of the documented shape."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings

schemathesis = pytest.importorskip("schemathesis")

from schemathesis.checks import not_a_server_error
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import response_schema_conformance

from edgeformer.server.app import GROUPS

FUZZED = [
    (one.method, one.path.replace(":path", ""), mode)
    for group in GROUPS
    for one in group.ENDPOINTS
    for mode in GenerationMode
    if one.path != "/metrics" and (one.body is not None or mode is GenerationMode.POSITIVE)
]


@pytest.mark.parametrize(("method", "path", "mode"), FUZZED)
def test_requests_of_the_document_get_documented_answers(server, method, path, mode):
    api = schemathesis.openapi.from_url(server.url + "/openapi.json")
    cases = api[path][method].as_strategy(generation_mode=mode)

    @settings(max_examples=25, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(case=cases)
    def check(case):
        if isinstance(case.body, dict):
            if "model" in case.body and mode is GenerationMode.POSITIVE:
                case.body["model"] = "encoder" if path in ("/v1/embeddings", "/v1/rerank") else "lm"
            for limit in ("max_tokens", "max_output_tokens"):
                if isinstance(case.body.get(limit), int):
                    case.body[limit] %= 50
        case.call_and_validate(checks=[not_a_server_error, response_schema_conformance], timeout=30)

    check()
