"""A client that goes away frees its sequence at once, running or queued, and nobody else is disturbed."""

from __future__ import annotations

import json
import socket
import threading
import time

import pytest
from support.serving import running, wait_for

LONG = {"model": "lm", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 800, "ignore_eos": True}


@pytest.fixture(scope="module")
def narrow(served):
    """A server that runs two answers at once, and lets three wait."""
    options = {"max_sequences": 2, "queue": 3, "ping": 0.05}
    with running([f"lm={served['lm']}", f"encoder={served['encoder']}"], options) as one:
        with one.client() as client:
            client.completions.create(model="lm", prompt="a", max_tokens=1)  # loads it
        yield one


def post(port, path, body):
    """A socket on which the request was sent."""
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(data)}"
    one = socket.create_connection(("127.0.0.1", port))
    one.sendall(head.encode() + b"\r\n\r\n" + data)
    return one


def counts(server):
    scheduler = server.scheduler("lm")
    return scheduler.running, scheduler.waiting


def is_free(server):
    return counts(server) == (0, 0) and server.scheduler("lm").reserved_bytes == 0


@pytest.mark.parametrize("stream", [False, True])
def test_a_running_answer_ends_with_its_client(narrow, slow, stream):
    one = post(narrow.port, "/v1/chat/completions", LONG | {"stream": stream})
    wait_for(lambda: counts(narrow) == (1, 0))
    job = narrow.scheduler("lm")._worker._scheduler.running[0]
    wait_for(lambda: job.count > 3)
    one.close()
    wait_for(lambda: is_free(narrow), 2)
    assert job.reason == "cancel" and job.count < 400
    wait_for(lambda: narrow.registry.entries["lm"].users == 0, 2)
    assert b'finished_reason="abort",model_name="lm"' in narrow.app.state.server.metrics.text()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("messages", {"messages": LONG["messages"], "max_tokens": 800}),
        ("responses", {"input": LONG["messages"], "max_output_tokens": 800}),
    ],
)
def test_an_answer_of_another_api_ends_with_its_client(narrow, slow, path, fields, stream):
    one = post(narrow.port, f"/v1/{path}", {"model": "lm", "stream": stream} | fields)
    wait_for(lambda: counts(narrow) == (1, 0))
    job = narrow.scheduler("lm")._worker._scheduler.running[0]
    wait_for(lambda: job.count > 3)
    one.close()
    wait_for(lambda: is_free(narrow), 2)
    assert job.reason == "cancel" and job.count < 400
    wait_for(lambda: narrow.registry.entries["lm"].users == 0, 2)


@pytest.mark.parametrize("stream", [False, True])
def test_a_queued_answer_ends_with_its_client_and_the_others_go_on(narrow, slow, stream):
    first = [post(narrow.port, "/v1/chat/completions", LONG | {"stream": True}) for _ in range(2)]
    wait_for(lambda: counts(narrow) == (2, 0))
    running_jobs = list(narrow.scheduler("lm")._worker._scheduler.running)
    queued = post(narrow.port, "/v1/chat/completions", LONG | {"stream": stream})
    wait_for(lambda: counts(narrow) == (2, 1))
    queued.close()
    wait_for(lambda: counts(narrow) == (2, 0), 2)
    assert all(job.reason is None for job in running_jobs)
    for one in first:
        one.close()
    wait_for(lambda: is_free(narrow), 2)


def test_all_answers_of_a_request_end(narrow, slow):
    body = {"model": "lm", "prompt": ["a", "b", "c"], "max_tokens": 800, "ignore_eos": True}
    one = post(narrow.port, "/v1/completions", body)
    wait_for(lambda: counts(narrow) == (2, 1))
    one.close()
    wait_for(lambda: is_free(narrow), 2)


def test_a_closed_stream_of_the_client_ends_the_answer(narrow, slow):
    with narrow.client() as client:
        stream = client.chat.completions.create(
            model="lm", messages=LONG["messages"], max_tokens=800, stream=True, extra_body={"ignore_eos": True}
        )
        next(iter(stream))
        stream.close()
        wait_for(lambda: is_free(narrow), 2)


def test_a_silent_stream_gets_comments(narrow, slow):
    first = [post(narrow.port, "/v1/chat/completions", LONG) for _ in range(2)]
    wait_for(lambda: counts(narrow) == (2, 0))
    queued = post(narrow.port, "/v1/chat/completions", LONG | {"stream": True})
    queued.settimeout(10)
    data = b""
    while data.count(b": ping\n\n") < 3:
        data += queued.recv(4096)
    assert b" 200 OK" in data and b"data:" not in data
    for one in (*first, queued):
        one.close()
    wait_for(lambda: is_free(narrow), 2)


def test_a_full_queue_answers_429_and_when_to_come_again(narrow, slow):
    import openai

    taken = [post(narrow.port, "/v1/chat/completions", LONG) for _ in range(5)]
    wait_for(lambda: counts(narrow) == (2, 3))
    with narrow.client() as client, pytest.raises(openai.RateLimitError) as caught:
        client.chat.completions.create(model="lm", messages=LONG["messages"])
    assert int(caught.value.response.headers["retry-after"]) >= 1
    assert caught.value.code == "queue_full"
    for one in taken:
        one.close()
    wait_for(lambda: is_free(narrow), 2)


def test_a_request_waits_no_longer_than_the_time_limit(served, slow):
    import openai

    with running([f"lm={served['lm']}"], {"max_sequences": 1, "queue_timeout": 0.3}) as one:
        with one.client() as client:
            client.completions.create(model="lm", prompt="a", max_tokens=1)
            first = post(one.port, "/v1/chat/completions", LONG)
            wait_for(lambda: counts(one) == (1, 0))
            with pytest.raises(openai.RateLimitError):
                client.chat.completions.create(model="lm", messages=LONG["messages"])
            wait_for(lambda: counts(one) == (1, 0), 2)
        first.close()
        wait_for(lambda: is_free(one), 2)


def test_answers_are_the_same_while_others_come_and_go(narrow, model):
    expected = model.generate("The quick brown", max_new_tokens=40).text
    stop = threading.Event()

    def vanish():
        while not stop.is_set():
            one = post(narrow.port, "/v1/chat/completions", LONG | {"stream": True})
            time.sleep(0.01)
            one.close()

    noise = threading.Thread(target=vanish)
    noise.start()
    try:
        with narrow.client() as client:
            for _ in range(10):
                found = client.completions.create(model="lm", prompt="The quick brown", max_tokens=40)
                assert found.choices[0].text == expected
    finally:
        stop.set()
        noise.join()
    wait_for(lambda: is_free(narrow), 5)


def test_a_failing_answer_is_an_event_of_its_stream(narrow, slow, monkeypatch):
    import openai

    from edgeformer.decoding.sequence import Sequence
    from edgeformer.errors import EdgeformerError

    accept = Sequence.accept

    def fail_at_5(self, logits, likeliest):
        if self.count == 5:
            raise EdgeformerError("planted")
        accept(self, logits, likeliest)

    monkeypatch.setattr(Sequence, "accept", fail_at_5)
    with narrow.client() as client:
        body = {"ignore_eos": True, "speculation": "off"}
        stream = client.chat.completions.create(model="lm", messages=LONG["messages"], stream=True, extra_body=body)
        with pytest.raises(openai.APIError, match="planted"):
            list(stream)
        with pytest.raises(openai.InternalServerError, match="planted"):
            client.chat.completions.create(model="lm", messages=LONG["messages"], extra_body=body)
    wait_for(lambda: is_free(narrow), 2)
