"""The routes beside generation: models, tokens, templates, health, slots, metrics, and the OpenAPI document."""

from __future__ import annotations

import json

import httpx
import jsonschema
import pytest
from prometheus_client.parser import text_string_to_metric_families
from support.serving import wait_for

CHAT = {"model": "lm", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 3}


def get(server, path):
    found = httpx.get(server.url + path)
    assert found.status_code == 200
    return found


def post(server, path, body):
    found = httpx.post(server.url + path, json=body)
    assert found.status_code == 200, found.text
    return found.json()


def test_models_are_listed_with_what_they_are(client, server, model):
    client.chat.completions.create(**CHAT)
    found = {one.id: one for one in client.models.list()}
    assert set(found) == {"lm", "calls", "reasons", "encoder"}
    assert found["lm"].status == "loaded"
    assert found["lm"].meta["n_ctx_train"] == model.bundle.context
    assert found["lm"].meta["size"] == model.bundle.size
    assert client.models.retrieve("encoder").task == "feature-extraction"


def test_tokens_go_there_and_back(server, model):
    text = "hello 東京 <|im_start|>"
    tokens = post(server, "/tokenize", {"model": "lm", "content": text})["tokens"]
    assert tokens == model.tokenizer.encode(text, add_special_tokens=False)
    assert post(server, "/detokenize", {"model": "lm", "tokens": tokens})["content"] == text
    plain = post(server, "/tokenize", {"model": "lm", "content": text, "parse_special": False})["tokens"]
    assert len(plain) > len(tokens)
    pieces = post(server, "/tokenize", {"model": "lm", "content": text, "with_pieces": True})["tokens"]
    data = b"".join(one["piece"].encode() if isinstance(one["piece"], str) else bytes(one["piece"]) for one in pieces)
    assert data.decode() == text
    assert [one["id"] for one in pieces] == tokens


def test_a_template_is_applied(server, model):
    found = post(server, "/apply-template", {"model": "lm", "messages": CHAT["messages"]})
    assert found["prompt"] == model.tokenizer.render_chat(CHAT["messages"])


def test_the_server_describes_itself(server, client):
    client.chat.completions.create(**CHAT)
    assert get(server, "/health").json() == {"status": "ok"}
    assert get(server, "/ready").json() == {"status": "ready"}
    props = get(server, "/props?model=lm").json()
    assert props["total_slots"] == 8 and "im_start" in props["chat_template"]
    slots = [one for one in get(server, "/slots").json() if one["model"] == "lm"]
    assert len(slots) == 8 and not any(one["is_processing"] for one in slots)


def sample(server, name, **labels):
    families = text_string_to_metric_families(get(server, "/metrics").text)
    samples = [one for family in families for one in family.samples if one.name == name]
    return sum(one.value for one in samples if labels.items() <= one.labels.items())


@pytest.mark.parametrize(
    ("name", "growth"),
    [
        ("llamacpp:tokens_predicted_total", 3),
        ("vllm:generation_tokens_total", 3),
        ("vllm:request_success_total", 1),
        ("vllm:time_to_first_token_seconds_count", 1),
        ("vllm:request_queue_time_seconds_count", 1),
        ("vllm:e2e_request_latency_seconds_count", 1),
        ("vllm:num_requests_running", 0),
        ("llamacpp:requests_deferred", 0),
        ("vllm:kv_cache_usage_perc", 0),
    ],
)
def test_metrics_count_answers(server, client, name, growth):
    before = sample(server, name, model_name="lm")
    client.chat.completions.create(**CHAT)
    assert sample(server, name, model_name="lm") - before == growth


def test_metrics_count_the_prompt_once(server, client, model):
    before = sample(server, "vllm:prompt_tokens_total", model_name="lm")
    client.chat.completions.create(**CHAT, n=2)
    count = sample(server, "vllm:prompt_tokens_total", model_name="lm") - before
    assert count == len(model.encode_prompt(CHAT["messages"]))


def test_the_log_has_numbers_and_no_prompts(server, client, caplog):
    import logging

    logging.getLogger("edgeformer.server").propagate = True
    with caplog.at_level(logging.INFO, "edgeformer.server"):
        secret = [{"role": "user", "content": "xyzzy plugh"}]
        found = client.chat.completions.create(**CHAT | {"messages": secret}, extra_headers={"X-Request-Id": "mine"})
        wait_for(lambda: _own(caplog))  # the line is written behind the answer
    (record,) = _own(caplog)
    assert record.status == 200 and record.model == "lm" and record.completion_tokens == 3
    from edgeformer.server.logs import JsonFormatter

    line = JsonFormatter().format(record)
    assert json.loads(line)["prompt_tokens"] == found.usage.prompt_tokens
    for text in ("xyzzy", found.choices[0].message.content):
        assert text not in line


def test_the_openapi_document_describes_what_is_answered(server):
    document = get(server, "/openapi.json").json()
    schemas = {"components": document["components"]}

    def check(path, method, value):
        content = document["paths"][path][method]["responses"]["200"]["content"]
        jsonschema.validate(value, content["application/json"]["schema"] | schemas)

    check("/v1/chat/completions", "post", post(server, "/v1/chat/completions", CHAT))
    check("/v1/completions", "post", post(server, "/v1/completions", {"model": "lm", "prompt": "a"}))
    check("/v1/embeddings", "post", post(server, "/v1/embeddings", {"model": "encoder", "input": "a"}))
    check("/tokenize", "post", post(server, "/tokenize", {"model": "lm", "content": "a"}))
    for path in ("/v1/models", "/health", "/slots", "/props"):
        check(path, "get", get(server, path).json())
    with pytest.raises(jsonschema.ValidationError):
        check("/v1/models", "get", {"data": [{}]})


def _own(caplog):
    """The log's records of the request "mine"."""
    return [one for one in caplog.records if getattr(one, "id", "") == "mine"]
