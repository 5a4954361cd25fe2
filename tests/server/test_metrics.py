"""/metrics: names and types of llama-server and vLLM, and counts that agree with what the answers say."""

from __future__ import annotations

import math

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from support.serving import running, wait_for

CHAT = {"model": "lm", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 12}
BODY = {"ignore_eos": True}

# Read in llama.cpp's tools/server/server-task.cpp and vLLM's vllm/v1/metrics/loggers.py, spec_decode/metrics.py.
LLAMA = {
    "counter": """prompt_tokens prompt_tokens_cached prompt_seconds tokens_predicted tokens_predicted_seconds n_decode
        spec_decode_num_drafts spec_decode_num_draft_tokens spec_decode_num_accepted_tokens
        spec_decode_num_accepted_tokens_per_pos""",
    "gauge": """prompt_tokens_seconds predicted_tokens_seconds requests_processing requests_deferred
        n_busy_slots_per_decode n_tokens_max""",
}
VLLM = {
    "counter": """prompt_tokens prompt_tokens_cached generation_tokens prefix_cache_queries prefix_cache_hits
        request_success spec_decode_num_drafts spec_decode_num_draft_tokens spec_decode_num_accepted_tokens
        spec_decode_num_accepted_tokens_per_pos""",
    "gauge": "num_requests_running num_requests_waiting kv_cache_usage_perc",
    "histogram": """time_to_first_token_seconds inter_token_latency_seconds request_time_per_output_token_seconds
        e2e_request_latency_seconds request_queue_time_seconds request_inference_time_seconds
        request_prefill_time_seconds request_decode_time_seconds request_prompt_tokens request_generation_tokens
        request_prefill_kv_computed_tokens request_params_n request_max_num_generation_tokens iteration_tokens_total""",
}


def families(server):
    found = httpx.get(server.url + "/metrics")
    assert found.headers["content-type"].startswith("text/plain; version=0.0.4")
    return {one.name: one for one in text_string_to_metric_families(found.text)}


def total(server, name, **labels):
    samples = [one for family in families(server).values() for one in family.samples if one.name == name]
    assert samples, f"/metrics has no {name}"
    return sum(one.value for one in samples if labels.items() <= one.labels.items())


class Growth:
    """How much the metrics of the model `lm` grow while a block runs."""

    def __init__(self, server):
        self._server = server

    def _read(self):
        return {
            (one.name, *sorted(one.labels.items())): one.value
            for family in families(self._server).values()
            for one in family.samples
            if one.labels.get("model_name") == "lm"
        }

    def __enter__(self):
        self._before = self._read()
        return self

    def __exit__(self, *_):
        self._after = self._read()

    def __call__(self, name, **labels):
        def summed(samples):
            return sum(v for key, v in samples.items() if key[0] == name and labels.items() <= dict(key[1:]).items())

        assert any(key[0] == name for key in self._after), f"/metrics has no {name}"
        return summed(self._after) - summed(self._before)


@pytest.fixture
def growth(server, client):
    client.completions.create(model="lm", prompt="a", max_tokens=1)  # loads it
    return Growth(server)


def complete(client, **fields):
    return client.chat.completions.create(**CHAT | fields, extra_body=BODY)


def check_counts(grown, prompts, answers, cached, new):
    """That metrics grew by what the answers' usage says. `new`: tokens of each answer."""
    tokens = sum(new)
    assert grown("vllm:prompt_tokens_total") == grown("vllm:prefix_cache_queries_total") == sum(prompts)
    assert grown("vllm:prefix_cache_hits_total") == grown("llamacpp:prompt_tokens_cached_total") == cached
    assert grown("llamacpp:prompt_tokens_total") == sum(prompts) - cached
    assert grown("llamacpp:tokens_predicted_total") == grown("vllm:generation_tokens_total") == tokens
    assert grown("vllm:iteration_tokens_total_sum") == sum(prompts) - cached + tokens
    assert grown("vllm:iteration_tokens_total_count") == grown("llamacpp:n_decode_total")
    assert grown("vllm:request_success_total") == grown("vllm:request_generation_tokens_count") == answers
    assert grown("vllm:request_generation_tokens_sum") == tokens
    assert grown("vllm:request_prompt_tokens_sum") == sum(prompts)
    assert grown("vllm:request_prompt_tokens_count") == len(prompts)
    assert grown("vllm:request_prefill_kv_computed_tokens_sum") == sum(prompts) - cached
    assert grown("vllm:time_to_first_token_seconds_count") == len(prompts)
    assert grown("vllm:e2e_request_latency_seconds_count") == answers


def test_names_and_types_are_those_of_llama_server_and_vllm(server, client):
    complete(client)
    found = families(server)
    for prefix, kinds in (("llamacpp", LLAMA), ("vllm", VLLM)):
        for kind, names in kinds.items():
            for name in names.split():
                assert found[f"{prefix}:{name}"].type == kind, name
    own = [name for name in found if name.startswith("vllm:") and not name.endswith("_created")]
    published = {name.removeprefix("vllm:") for name in own}
    assert published == {name for names in VLLM.values() for name in names.split()}
    for family in found.values():
        for one in family.samples:
            if one.name.startswith("vllm:"):
                assert {"model_name", "engine"} <= one.labels.keys(), one
            assert not math.isnan(one.value)
    reasons = {one.labels["finished_reason"] for one in found["vllm:request_success"].samples}
    assert reasons == {"stop", "length", "abort", "error"}


def test_the_parser_refuses_what_is_not_the_format():
    with pytest.raises(ValueError):  # noqa: PT011 (each reader has its own message)
        list(text_string_to_metric_families('vllm:tokens{model_name="a} 3\n'))


def test_histograms_add_up(server, client):
    complete(client)
    for family in families(server).values():
        if family.type != "histogram":
            continue
        rows = {}
        for one in family.samples:
            labels = tuple(sorted((k, v) for k, v in one.labels.items() if k != "le"))
            rows.setdefault(labels, []).append(one)
        for samples in rows.values():
            counts = [one.value for one in samples if one.name.endswith("_bucket")]
            bounds = [float(one.labels["le"]) for one in samples if one.name.endswith("_bucket")]
            assert counts == sorted(counts) and bounds == sorted(bounds) and bounds[-1] == math.inf
            assert counts[-1] == next(one.value for one in samples if one.name.endswith("_count"))


@pytest.mark.parametrize("stream", [False, True])
def test_counts_are_those_of_the_answers(growth, client, stream):
    prompt = [{"role": "user", "content": f"The quick brown fox jumps over the lazy dog {stream}"}]
    usages = []
    with growth as grown:
        for _ in range(2):
            found = complete(client, messages=prompt, stream=stream) if not stream else [
                *complete(client, messages=prompt, stream=True, stream_options={"include_usage": True})
            ][-1]  # fmt: skip
            usages.append(found.usage)
    cached = sum(one.prompt_tokens_details.cached_tokens for one in usages)
    new = [one.completion_tokens for one in usages]
    assert new == [12, 12]
    check_counts(grown, [one.prompt_tokens for one in usages], 2, cached, new)
    assert grown("vllm:request_success_total", finished_reason="length") == 2


def test_a_prompt_with_several_answers_is_counted_once(growth, client):
    with growth as grown:
        usage = complete(client, n=3, temperature=1.0, seed=1).usage
    assert usage.completion_tokens == 36
    cached = usage.prompt_tokens_details.cached_tokens
    check_counts(grown, [usage.prompt_tokens], 3, cached, [12, 12, 12])
    assert grown("vllm:request_params_n_sum") == 3
    assert grown("vllm:request_max_num_generation_tokens_sum") == 12


def test_finish_reasons_are_those_of_vllm(growth, client):
    with growth as grown:
        reasons = [
            client.completions.create(model="lm", prompt="a", max_tokens=200, seed=s, temperature=1.5).choices[0]
            for s in range(6)
        ]
        stopped = client.completions.create(
            model="lm", prompt="The", max_tokens=30, extra_body={"choices": ["yes", "no"]}
        )
    ends = [one.finish_reason for one in reasons] + [stopped.choices[0].finish_reason]
    assert "stop" in ends
    for reason in ("stop", "length"):
        assert grown("vllm:request_success_total", finished_reason=reason) == ends.count(reason)


def test_drafts_are_counted_as_the_answer_says(growth, client):
    with growth as grown:  # the grammar forces tokens: drafts that are right
        found = client.completions.create(
            model="lm", prompt="a", max_tokens=60, extra_body={"choices": ["one two three four five six seven eight"]}
        )
    timings = found.model_extra["timings"]
    right = timings["draft_n_accepted"]
    assert right > 1
    for prefix in ("vllm", "llamacpp"):
        assert grown(f"{prefix}:spec_decode_num_draft_tokens_total") == timings["draft_n"]
        assert grown(f"{prefix}:spec_decode_num_accepted_tokens_total") == right
        steps = grown(f"{prefix}:spec_decode_num_drafts_total")
        by_place = f"{prefix}:spec_decode_num_accepted_tokens_per_pos_total"
        places = [grown(by_place, position=str(place)) for place in range(right)]
        assert sum(places) == grown(by_place) == right
        assert [steps, *places] == sorted([steps, *places], reverse=True)  # a later one is right only after the earlier
    new = found.usage.completion_tokens
    assert grown("vllm:generation_tokens_total") == new  # drafts or not
    assert grown("llamacpp:n_decode_total") < new  # a step gives several tokens


def test_tokens_of_a_cancelled_answer_are_counted(growth, server, slow):
    with growth as grown:
        with httpx.stream(
            "POST",
            f"{server.url}/v1/chat/completions",
            json=CHAT | BODY | {"max_tokens": 400, "stream": True, "speculation": "off"},
        ) as answer:
            texts = [line for line, _ in zip(answer.iter_lines(), range(12), strict=False) if "content" in line]
        wait_for(lambda: total(server, "vllm:num_requests_running") == 0)
        wait_for(lambda: total(server, "vllm:request_success_total", finished_reason="abort") > 0)
    new = grown("vllm:generation_tokens_total")
    assert len(texts) - 1 <= new < 400  # the first has no text
    assert grown("vllm:request_success_total", finished_reason="abort") == 1
    assert grown("vllm:request_success_total") == 1
    assert grown("vllm:prompt_tokens_total") > 0
    assert grown("vllm:request_generation_tokens_count") == 0  # of whole answers
    assert grown("vllm:inter_token_latency_seconds_count") == new - 1
    assert 0.02 * (new - 1) <= grown("vllm:inter_token_latency_seconds_sum")  # `slow` adds 20 ms to a step


def test_tokens_of_a_failed_answer_are_counted(growth, client, monkeypatch):
    import openai

    from edgeformer.decoding.sequence import Sequence
    from edgeformer.errors import EdgeformerError

    accept = Sequence.accept

    def fail_at_5(self, logits, likeliest):
        if self.count == 5:
            raise EdgeformerError("planted")
        accept(self, logits, likeliest)

    monkeypatch.setattr(Sequence, "accept", fail_at_5)
    with growth as grown, pytest.raises(openai.InternalServerError):
        client.chat.completions.create(**CHAT, extra_body=BODY | {"speculation": "off"})
    assert grown("vllm:generation_tokens_total") == 5
    assert grown("vllm:request_success_total", finished_reason="error") == 1
    assert grown("vllm:request_success_total") == 1


def test_queued_and_running_requests_are_seen(served, slow):
    with running([f"lm={served['lm']}"], {"max_sequences": 2}) as one:
        with one.client() as client:
            client.completions.create(model="lm", prompt="a", max_tokens=1)
            body = BODY | {"speculation": "off"}
            streams = [
                client.chat.completions.create(**CHAT | {"max_tokens": 200}, stream=True, extra_body=body)
                for _ in range(2)
            ]
            waiting = httpx.Client(timeout=None)
            queued = waiting.stream("POST", one.url + "/v1/chat/completions", json=CHAT | BODY | {"stream": True})
            import threading

            thread = threading.Thread(target=lambda: queued.__enter__().read())
            thread.start()
            wait_for(lambda: total(one, "vllm:num_requests_waiting") == 1)
            assert total(one, "llamacpp:requests_deferred") == 1
            assert total(one, "llamacpp:requests_processing") == total(one, "vllm:num_requests_running") == 2
            assert 0 < total(one, "vllm:kv_cache_usage_perc") <= 1
            for stream in streams:
                stream.close()
            thread.join()
            queued.__exit__(None, None, None)
            waiting.close()
        assert 1 < total(one, "llamacpp:n_busy_slots_per_decode") <= 2
        assert total(one, "vllm:request_queue_time_seconds_sum") > 0
        assert total(one, "llamacpp:predicted_tokens_seconds") > 0


def test_counts_outlive_the_model(served):
    with running([f"lm={served['lm']}"], {"idle_timeout": 0.2}) as one, one.client() as client:
        client.completions.create(model="lm", prompt="a", max_tokens=3, extra_body=BODY)
        wait_for(lambda: one.loaded("lm") is None)
        assert total(one, "edgeformer_model_loaded") == 0
        client.completions.create(model="lm", prompt="a", max_tokens=3, extra_body=BODY)
        assert total(one, "vllm:generation_tokens_total") == 6


def test_requests_to_encoders_are_counted(server, client):
    def count():
        return total(server, "vllm:request_success_total", model_name="encoder")

    before = count()
    client.embeddings.create(model="encoder", input=["a", "b"])
    assert count() == before + 1
