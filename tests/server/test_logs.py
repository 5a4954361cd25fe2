"""The log on a terminal: lines of text for a person, in which no text of a client steers the terminal."""

from __future__ import annotations

import io
import logging
import re

import httpx
import pytest
from support.serving import wait_for

from edgeformer.server import logs

CHAT = {"model": "lm", "messages": [{"role": "user", "content": "xyzzy plugh"}], "max_tokens": 3}
NAMES = ("edgeformer.server", "uvicorn", "opentelemetry")


class Terminal(io.StringIO):
    """A stream that says it is a terminal, or that it is none."""

    def __init__(self, is_terminal):
        super().__init__()
        self._is_terminal = is_terminal

    def isatty(self):
        return self._is_terminal


@pytest.fixture
def log_to(monkeypatch):
    """`log_to(is_terminal)`: the stream to which `logs.set_up` sends the log from now on."""
    kept = {name: (log.handlers, log.propagate, log.level) for name in NAMES if (log := logging.getLogger(name))}

    def begin(is_terminal):
        stream = Terminal(is_terminal)
        monkeypatch.setattr("sys.stderr", stream)
        logs.set_up()
        return stream

    yield begin
    for name, (handlers, propagate, level) in kept.items():
        log = logging.getLogger(name)
        log.handlers, log.propagate = handlers, propagate
        log.setLevel(level)


def lines_of(stream, count):
    wait_for(lambda: stream.getvalue().count("\n") >= count)
    return stream.getvalue().splitlines()


@pytest.fixture
def loaded(server):
    """The server with its model loaded, which it says in the log."""
    assert httpx.post(server.url + "/v1/chat/completions", json=CHAT).status_code == 200
    return server


def test_a_person_reads_text(loaded, log_to):
    stream = log_to(True)
    httpx.post(loaded.url + "/v1/chat/completions", json=CHAT, headers={"X-Request-Id": "mine"})
    httpx.get(loaded.url + "/v1/models/%1b[31mred%0a")
    httpx.get(loaded.url + "/%1b[2Jpath")
    answered, unknown, nowhere = lines_of(stream, 3)
    # The time, what was asked and how it went, and the fields of the JSON log but for the id.
    pattern = (
        r"\d\d:\d\d:\d\d  POST /v1/chat/completions 200 in \d+ ms  model=lm prompt_tokens=\d+ cached_tokens=\d+ "
        r"completion_tokens=3 finish=length first_token_ms=[\d.]+"
    )
    assert re.fullmatch(pattern, answered), answered
    assert "xyzzy" not in answered
    assert "GET" in unknown and "404" in unknown and "error=model_not_found" in unknown
    assert '"/\\u001b[2Jpath" 404' in nowhere  # as JSON: a terminal obeys none of it
    assert "\x1b" not in stream.getvalue()


def test_what_is_no_request_has_its_level_and_traceback(log_to):
    stream = log_to(True)
    try:
        raise ValueError("planted")
    except ValueError:
        logging.getLogger("edgeformer.server").error("request failed", exc_info=True, extra={"model": "a b\n"})
    first, *rest = lines_of(stream, 4)
    assert re.fullmatch(r'\d\d:\d\d:\d\d  error: request failed  model="a b\\n"', first)
    assert rest[0].startswith("Traceback") and rest[-1] == "ValueError: planted"


def test_a_file_gets_json(loaded, log_to):
    stream = log_to(False)
    httpx.post(loaded.url + "/v1/chat/completions", json=CHAT, headers={"X-Request-Id": "mine"})
    (line,) = lines_of(stream, 1)
    assert line.startswith('{"time": ') and '"id": "mine"' in line


@pytest.mark.parametrize("is_terminal", [True, False])
def test_fields_that_a_library_gives_every_record_are_left_out(log_to, is_terminal):
    kept = logging.getLogRecordFactory()

    def stamped(*args, **kwargs):
        record = kept(*args, **kwargs)
        record.stamp_of_a_library = 1
        return record

    stream = log_to(is_terminal)
    logging.setLogRecordFactory(stamped)
    try:
        logging.getLogger("edgeformer.server").info("said", extra={"model": "lm"})
    finally:
        logging.setLogRecordFactory(kept)
    (line,) = lines_of(stream, 1)
    assert "lm" in line and "stamp" not in line
