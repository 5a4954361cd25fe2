"""Clients that send or read slowly, send ahead, or only connect: none may cost more than a socket for a while."""

from __future__ import annotations

import json
import logging
import socket
import time
from http.client import HTTPResponse

import httpx
import pytest
from support.serving import running, wait_for

from edgeformer.server import connection

CHAT = {"model": "lm", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}


@pytest.fixture(scope="module")
def impatient(served):
    """A server that waits half a second for heads and for readers; its sockets buffer little."""
    with pytest.MonkeyPatch.context() as patch, running([f"lm={served['lm']}"], {"max_sequences": 2}) as one:
        patch.setattr(connection, "HEAD_SECONDS", 0.5)
        patch.setattr(connection, "STALL_SECONDS", 0.5)
        one.server.servers[0].sockets[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192)
        yield one


def connected(server):
    one = socket.create_connection(("127.0.0.1", server.port))
    one.settimeout(10)
    return one


def post(body):
    data = json.dumps(body).encode()
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return head.encode() + b"Content-Length: %d\r\n\r\n" % len(data) + data


def is_closed(one):
    try:
        return one.recv(65536) == b""
    except ConnectionResetError:
        return True


@pytest.mark.parametrize("sent", [b"", b"GET /health HTTP/1.1\r\n"])
def test_a_connection_without_a_request_is_closed(impatient, sent):
    with connected(impatient) as one:
        one.sendall(sent)
        assert is_closed(one)


def test_single_bytes_do_not_prolong_a_head(impatient):
    began = time.monotonic()
    with connected(impatient) as one:
        try:
            for byte in b"GET /health HTTP/1.1\r\nX-Long: " + b"a" * 1000:
                one.sendall(bytes([byte]))
                time.sleep(0.05)
        except ConnectionError:
            pass
    assert time.monotonic() - began < 10


def test_a_kept_connection_may_rest_longer(impatient):
    request = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with connected(impatient) as one:
        for _ in range(2):
            one.sendall(request)
            answer = HTTPResponse(one)
            answer.begin()
            assert answer.status == 200 and answer.read()  # all of it: head and body may come apart
            time.sleep(0.8)
        one.sendall(request[:9])  # but the rest of a head that has begun must come
        assert is_closed(one)


def test_a_request_may_take_longer_than_its_head(impatient, slow):
    body = CHAT | {"max_tokens": 60, "ignore_eos": True, "speculation": "off", "stream": True}
    with connected(impatient) as one:
        one.sendall(post(body))
        found, began = b"", time.monotonic()
        while b"[DONE]" not in found:
            found += one.recv(65536)
    assert time.monotonic() - began > 0.5


def test_a_client_that_does_not_read_is_let_go_and_nobody_waits_for_it(impatient):
    body = CHAT | {"max_tokens": 900, "ignore_eos": True, "stream": True, "logprobs": True, "top_logprobs": 20}
    with socket.socket() as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        one.connect(("127.0.0.1", impatient.port))
        one.sendall(post(body))
        wait_for(lambda: impatient.loaded("lm") is not None and impatient.loaded("lm").streams == 1)
        found = httpx.post(impatient.url + "/v1/chat/completions", json=CHAT)
        assert found.json()["usage"]["completion_tokens"] > 0
        wait_for(lambda: impatient.registry.entries["lm"].users == 0)
        assert impatient.loaded("lm").streams == 0
        wait_for(lambda: impatient.scheduler("lm").reserved_bytes == 0)
        one.settimeout(10)
        read = b""
        while part := one.recv(65536):
            read += part
    assert b"data: {" in read and b"[DONE]" not in read


def test_a_slow_client_gets_all(impatient):
    body = CHAT | {"max_tokens": 300, "ignore_eos": True, "stream": True, "logprobs": True, "top_logprobs": 20}
    with socket.socket() as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        one.connect(("127.0.0.1", impatient.port))
        one.settimeout(10)
        one.sendall(post(body))
        read = b""
        while b"[DONE]" not in read:
            read += one.recv(16384)
            time.sleep(0.02)
    assert read.count(b'"top_logprobs"') == 300


def test_requests_sent_ahead_are_answered_in_order(impatient):
    texts = ["one", "two", "three"]
    asked = [CHAT | {"messages": [{"role": "user", "content": text}], "stream": text == "two"} for text in texts]
    with connected(impatient) as one:
        one.sendall(b"".join(map(post, asked)) + b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        found = b""
        while b'{"status":"ok"}' not in found:
            found += one.recv(65536)
    parts = found.split(b"HTTP/1.1 200 OK\r\n")[1:]
    assert len(parts) == 4 and b"[DONE]" in parts[1] and b"[DONE]" not in parts[0] + parts[2]
    for body, part in zip(asked, parts[:3], strict=True):
        alone = httpx.post(impatient.url + "/v1/chat/completions", json=body | {"stream": False}).json()
        content = alone["choices"][0]["message"]["content"]
        if body["stream"]:
            events = [json.loads(line[6:]) for line in part.decode().splitlines() if line.startswith("data: {")]
            assert "".join(one["choices"][0]["delta"].get("content", "") for one in events) == content
        else:
            assert json.loads(part[part.index(b"{") :])["choices"][0]["message"]["content"] == content


def test_hundreds_of_idle_connections_stop_nobody(impatient):
    idle = [connected(impatient) for _ in range(300)]
    try:
        assert httpx.get(impatient.url + "/health").status_code == 200
        assert all(is_closed(one) for one in idle)
    finally:
        for one in idle:
            one.close()


def test_a_path_that_is_not_there_is_logged_with_the_one_that_was_meant(impatient, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("edgeformer.server"), "propagate", True)
    with caplog.at_level(logging.INFO, "edgeformer.server"):
        found = httpx.post(impatient.url + "/chat/completions", json=CHAT)
        assert found.status_code == 404 and "/v1/chat/completions" in found.json()["error"]["message"]
        assert httpx.get(impatient.url + "/nothing").json()["error"]["message"] == "There is no GET /nothing here."
        httpx.get(impatient.url + "/health", headers={"Host": "evil.example"})
        assert httpx.get(impatient.url + "/v1/models", headers={"Host": "evil.example"}).status_code == 403
    lines = [(one.path, one.status) for one in caplog.records if one.message == "request" and one.status >= 400]
    assert lines == [("/chat/completions", 404), ("/nothing", 404), ("/v1/models", 403)]
