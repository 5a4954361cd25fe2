"""What goes over the wire, byte by byte: server-sent events, request ids, and tricks that the parser must refuse."""

from __future__ import annotations

import json
import socket

import pytest

CHAT = {"model": "lm", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}


def exchange(server, data):
    """All that the server sends until it closes the connection, or is silent for a second."""
    with socket.create_connection(("127.0.0.1", server.port)) as one:
        one.sendall(data)
        one.settimeout(1)
        found = b""
        try:
            while part := one.recv(65536):
                found += part
        except (TimeoutError, ConnectionResetError):
            pass
    return found


def request(body, *headers, path="/v1/chat/completions", method="POST"):
    lines = [f"{method} {path} HTTP/1.1", "Host: localhost", "Content-Type: application/json", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def body_of(value):
    return json.dumps(value).encode()


def test_a_stream_is_events_that_end_with_done(server):
    import httpx

    found = httpx.post(server.url + "/v1/chat/completions", json=CHAT | {"stream": True})
    assert found.headers["content-type"].startswith("text/event-stream")
    events = found.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    for event in events[:-2]:
        assert event.startswith("data: ")
        assert json.loads(event[6:])["object"] == "chat.completion.chunk"


def test_a_request_id_is_kept_or_made(server):
    import httpx

    assert httpx.get(server.url + "/v1/models", headers={"X-Request-Id": "mine-1"}).headers["x-request-id"] == "mine-1"
    for bad in ("a b", "x" * 100, '"'):
        made = httpx.get(server.url + "/v1/models", headers={"X-Request-Id": bad}).headers["x-request-id"]
        assert made != bad and len(made) == 24


@pytest.mark.parametrize(
    ("path", "more", "status"),
    [
        ("/nothing", {}, 404),
        ("/v1/chat/completions", {}, 405),
        ("/v1/models", {"Host": "evil.example"}, 403),
        ("/v1/models/nobody", {}, 404),
        ("/v1/messages", {}, 405),
    ],
)
def test_a_refused_request_has_an_id_too(server, path, more, status):
    import httpx

    made = httpx.get(server.url + path, headers=more)
    assert (made.status_code, len(made.headers["x-request-id"])) == (status, 24)
    found = httpx.get(server.url + path, headers=more | {"X-Request-Id": "mine"})
    assert found.headers["x-request-id"] == "mine"
    if path == "/v1/messages":
        assert found.headers["request-id"] == found.json()["request_id"] == "mine"


def test_a_connection_is_used_again(server):
    data = request(b"", path="/health", method="GET")
    assert exchange(server, data + data).count(b"HTTP/1.1 200") == 2


def test_a_chunked_body_is_read(server):
    text = body_of(CHAT)
    chunked = b"%x\r\n" % len(text) + text + b"\r\n0\r\n\r\n"
    assert exchange(server, request(chunked, "Transfer-Encoding: chunked")).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize(
    "headers",
    [
        ("Transfer-Encoding: chunked", "Content-Length: 5"),
        ("Content-Length: 5", "Transfer-Encoding: chunked"),
        ("Transfer-Encoding: chunked, identity",),
        ("Transfer-Encoding: identity, chunked",),
        ("Transfer-Encoding: xchunked",),
        ("Transfer-Encoding: chunked", "Transfer-Encoding: identity"),
        ("Transfer-Encoding : chunked",),
        ("Transfer-Encoding:\x0bchunked",),
        ("Transfer_Encoding: chunked", "Content-Length: 5", "Content-Length: 6"),
        ("Content-Length: 5", "Content-Length: 6"),
        ("Content-Length: +5",),
        ("Content-Length: 5, 6",),
        ("Content-Length: -1",),
        ("Content-Length: 0x5",),
    ],
)
def test_ambiguous_framing_is_refused_and_the_connection_closed(server, headers):
    smuggled = request(b"", path="/health", method="GET")
    text = body_of(CHAT)
    chunked = b"%x\r\n" % len(text) + text + b"\r\n0\r\n\r\n"
    found = exchange(server, request(chunked, *headers) + smuggled)
    assert found.split(b"\r\n")[0].split()[1] in (b"400", b"501")
    assert found.count(b"HTTP/1.1 ") == 1  # what follows was not taken for a request


@pytest.mark.parametrize("chunk", [b"-1\r\n", b"0x5\r\nhello", b"5\r\nhelloX", b"\xff\r\n", b"1" * 40 + b"\r\n"])
def test_malformed_chunks_are_refused(server, chunk):
    found = exchange(server, request(chunk + b"\r\n0\r\n\r\n", "Transfer-Encoding: chunked"))
    assert b"HTTP/1.1 200" not in found


def test_a_huge_header_is_refused(server):
    found = exchange(server, request(b"", "X-Long: " + "a" * 200_000, path="/health", method="GET"))
    assert not found or found.split()[1] in (b"400", b"431")  # none where the connection was reset first


def test_garbage_is_refused(server):
    assert exchange(server, b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n").split()[1] == b"400"
