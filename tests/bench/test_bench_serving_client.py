"""The load client of bench.serving reports what came when.

With a clock of the test's own its times are exact; with a real server, which notes when it sends, no time is earlier
than the sending. How much later a read is depends on the machine, and is not asserted.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading
import time
import unittest.mock
from itertools import pairwise
from pathlib import Path

import pytest

pytest.importorskip("h11")
from bench.serving import client
from bench.serving.setting import amounts

ROOT = Path(__file__).parents[2]
FIRST, GAP, LONG = 0.05, 0.01, 0.1  # seconds


def chunk(data):
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


def event(text, **more):
    return b"data: " + json.dumps({"choices": [{"delta": {"content": text}}], **more}).encode() + b"\n\n"


class Known:
    """A server that sends a script: [(seconds to wait, bytes)], and notes when it sent each.

    It answers each request by the script that its body's `model` names.
    """

    def __init__(self, scripts):
        self.scripts = scripts
        self.sent = {}  # id of the body -> when each part was sent
        ready = threading.Event()
        self._loop = asyncio.new_event_loop()
        self.port = 0

        async def start():
            server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
            self.port = server.sockets[0].getsockname()[1]
            ready.set()

        def run():
            self._loop.run_until_complete(start())
            self._loop.run_forever()

        self._thread = threading.Thread(target=run, daemon=True)
        self._thread.start()
        ready.wait(10)

    async def _serve(self, reader, writer):
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        size = next(int(line.split(":")[1]) for line in head.split("\r\n") if line.startswith("content-length"))
        body = json.loads(await reader.readexactly(size))
        times = self.sent[body.get("id", 0)] = []
        if body["model"] == "meet":
            await self.meeting.wait()
        for wait, data in self.scripts[body["model"]]:
            await asyncio.sleep(wait)
            times.append(time.perf_counter())
            writer.write(data)
            await writer.drain()
        writer.close()

    def close(self):
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)


HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
ROLE = chunk(b'data: {"choices":[{"delta":{"role":"assistant","content":""}}]}\n\n')
USAGE = chunk(b'data: {"choices":[],"usage":{"prompt_tokens":5,"completion_tokens":6,'
              b'"prompt_tokens_details":{"cached_tokens":3}}}\n\n')  # fmt: skip
END = chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n"
SPLIT = chunk(event("d"))
SCRIPTS = {
    # what comes: the role alone, a token, two tokens at once, one in two halves, a late one
    "steady": [
        (0.0, HEAD + ROLE),
        (FIRST, chunk(event("a"))),
        (GAP, chunk(event("b") + event("c"))),
        (GAP, SPLIT[:20]),
        (GAP, SPLIT[20:]),
        (LONG, chunk(event("e")) + chunk(b": ping\n\n")),
        (GAP, chunk(event("f"))),
        (0.0, USAGE + END),
    ],
    "meet": [(0.0, HEAD + chunk(event("a")) + END)],
    "cut": [(0.0, HEAD + chunk(event("a")))],
    "status": [(0.0, b'HTTP/1.1 429 Too Many Requests\r\nContent-Length: 24\r\n\r\n{"error": {"message": 1}}'[:-1])],
    "event": [(0.0, HEAD + chunk(event("a")) + chunk(b'data: {"error": {"message": "planted"}}\n\n') + END)],
    "no end": [(0.0, HEAD + chunk(event("a")) + b"0\r\n\r\n")],
    "garbage": [(0.0, b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n")],
    "not json": [(0.0, HEAD + chunk(b"data: {\n\n") + END)],
}


@pytest.fixture(scope="module")
def known():
    one = Known(SCRIPTS)
    yield one
    one.close()


def play(known, clients):
    job = {"host": "127.0.0.1", "port": known.port, "path": "/v1/chat/completions", "clients": clients}
    known.sent.clear()
    began, played = asyncio.run(client.play(job))
    return began, [client.outcome(one, began) for one in played]


TEXTS = (1, 2, 4, 5, 6)  # parts of "steady" that complete a text


def check(outcome, due, sent):
    """A read for each part with text, or for several together; none before it was sent, all before the end."""
    assert 1 <= len(outcome.arrivals) <= len(TEXTS)
    for found, part in zip(outcome.arrivals, TEXTS, strict=False):
        assert due + found >= sent[part]
    assert due + outcome.arrivals[-1] >= sent[TEXTS[-1]]
    assert outcome.ended >= outcome.arrivals[-1]


def test_with_a_server_no_time_is_before_the_sending(known):
    began, [one] = play(known, [{"at": 0.1, "bodies": [{"model": "steady"}]}])
    check(one, began + one.due, known.sent[0])
    assert one.due == pytest.approx(0.1)
    assert one.error is None and one.status == 200
    assert (one.text, one.pieces, one.tokens, one.prompt_tokens, one.cached_tokens) == ("abcdef", 6, 6, 5, 3)


def at_known_times(monkeypatch, exchange=client.Exchange):
    """The outcome of "steady" with the times of the script, on a clock of its own, and these times."""
    now = [1000.0]
    monkeypatch.setattr(client.time, "perf_counter", lambda: now[0])
    loop = asyncio.new_event_loop()
    try:
        one = exchange(b"request", loop.create_future())
        transport = unittest.mock.create_autospec(asyncio.Transport, instance=True)
        now[0] += 0.5
        one.connection_made(transport)
        transport.write.assert_called_once_with(b"request")
        times = []
        for wait, data in SCRIPTS["steady"]:
            now[0] += wait
            times.append(now[0])
            one.data_received(data)
        now[0] += 0.25
        one.connection_lost(None)
        assert one.ended.done()
        return client.outcome(client.Played(0, 1000.0, now[0], one, None), 990.0), [times[i] - 1000.0 for i in TEXTS]
    finally:
        loop.close()


def test_times_are_exact(monkeypatch):
    found, times = at_known_times(monkeypatch)
    assert found.arrivals == times
    assert (found.due, found.sent, found.ended) == (10.0, 0.5, times[-1] + 0.25)
    assert times[0] == pytest.approx(0.5 + FIRST) and times[3] - times[2] == pytest.approx(LONG)


def test_a_planted_error_of_the_client_is_seen(known, monkeypatch):
    """The checks above refuse a clock that is late or early, and a client that takes every event for a token."""

    class Late(client.Exchange):
        def data_received(self, data):
            self.reads.append((client.time.perf_counter() + 1e-6, data))

    class Early(client.Exchange):
        def data_received(self, data):
            self.reads.append((time.perf_counter() - 10.0, data))

    with monkeypatch.context() as patch:
        found, times = at_known_times(patch, Late)
        assert found.arrivals != times
    with monkeypatch.context() as patch:
        patch.setattr(client, "Exchange", Early)
        began, [one] = play(known, [{"at": 0.0, "bodies": [{"model": "steady"}]}])
    with pytest.raises(AssertionError):
        check(one, began + one.due, known.sent[0])
    with monkeypatch.context() as patch:
        patch.setattr(client, "take", lambda outcome, data: True)
        found, times = at_known_times(patch)
        assert found.arrivals != times


def test_clients_run_beside_each_other_and_one_asks_after_its_answer(known):
    load = [{"at": 0.0, "bodies": [{"model": "steady", "id": 0}, {"model": "steady", "id": 1}]}]
    load += [{"at": 0.05 * number, "bodies": [{"model": "steady", "id": 2 + number}]} for number in range(6)]
    began, outcomes = play(known, load)
    assert len(outcomes) == 8 and all(one.error is None for one in outcomes)
    first, second = outcomes[:2]
    assert second.due == pytest.approx(first.due + first.ended, abs=1e-6)
    assert [round(one.due, 2) for one in outcomes[2:]] == [0.0, 0.05, 0.1, 0.15, 0.2, 0.25]
    for number, one in enumerate(outcomes):
        check(one, began + one.due, known.sent[number])


def test_clients_do_not_wait_for_each_other(known):
    known.meeting = asyncio.Barrier(5)  # the server answers none before all are there
    _, outcomes = play(known, [{"at": 0.0, "bodies": [{"model": "meet", "id": number}]} for number in range(5)])
    assert [one.text for one in outcomes] == ["a"] * 5


def test_a_late_client_makes_its_own_numbers_worse(known, monkeypatch):
    """Times count from the moment at which a request was due (no coordinated omission)."""
    encoded = client.encoded

    def slow(job, body):
        time.sleep(0.1)  # before the start: costs nothing
        return encoded(job, body)

    monkeypatch.setattr(client, "encoded", slow)
    made = client.Exchange.connection_made

    def blocked(self, transport):
        time.sleep(0.2)
        made(self, transport)

    monkeypatch.setattr(client.Exchange, "connection_made", blocked)
    _, [one] = play(known, [{"at": 0.0, "bodies": [{"model": "steady"}]}])
    assert one.sent >= 0.2 and one.arrivals[0] >= 0.2 + FIRST


@pytest.mark.parametrize(
    ("script", "error"),
    [
        ("cut", "RemoteProtocolError"),
        ("status", "status 429"),
        ("event", "error event.*planted"),
        ("no end", "cut after 1 reads"),
        ("garbage", "RemoteProtocolError"),
        ("not json", "JSONDecodeError"),
    ],
)
def test_what_is_no_whole_answer_is_an_error(known, script, error):
    import re

    _, [one] = play(known, [{"at": 0.0, "bodies": [{"model": script}]}])
    assert one.error and re.search(error, one.error)


def test_a_server_that_is_not_there_is_an_error(known):
    job = {"host": "127.0.0.1", "port": 1, "path": "/", "clients": [{"at": 0.0, "bodies": [{"model": "a"}]}]}
    began, [played] = asyncio.run(client.play(job))
    assert "Connect" in client.outcome(played, began).error


def test_as_a_process_with_its_own_cpu(known, tmp_path):
    job = {
        "host": "127.0.0.1",
        "port": known.port,
        "path": "/",
        "clients": [{"at": 0, "bodies": [{"model": "steady"}]}],
    }
    (tmp_path / "job.json").write_text(json.dumps(job))
    command = [sys.executable, "-m", "bench.serving.client", str(tmp_path / "job.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    found = json.loads(done.stdout)
    assert found["outcomes"][0]["tokens"] == 6
    assert 0 < found["cpu"] < found["seconds"] and found["setup_cpu"] > 0


# ------------------------------------------------------------------------------------------------ what a run amounts to


def outcome(arrivals, **more):
    found = {"arrivals": arrivals, "due": 0.0, "sent": 0.0, "ended": arrivals[-1] if arrivals else 0.0, "error": None}
    return found | {"tokens": 4} | more


def played(*outcomes):
    return {"outcomes": outcomes, "client_cores": 0.01, "server_cores": 1.9}


def test_amounts_of_known_times():
    found = amounts(played(outcome([1.0, 1.1, 1.3, 2.0]), outcome([0.5, 0.6, 0.7, 0.8], due=1.0)), 4)
    assert found["rate"] == pytest.approx(8 / 2.0)
    assert (found["first_p50"], found["first_p95"]) == (0.5, 1.0)
    assert found["gap_p50"] == pytest.approx(0.1) and found["gap_max"] == found["gap_p99"] == pytest.approx(0.7)
    assert found["errors"] == 0


def test_the_longest_gap_is_of_each_answer():
    """98 answers with gaps of 0.1 s, two with one of 3 s: one gap of 1,000, but one answer of 50."""
    often = [outcome([0.1 * n for n in range(1, 22)], tokens=21)] * 98
    found = amounts(played(*often, *[outcome([0.1, 0.2, 3.2, 3.3])] * 2), None)
    assert found["gap_p99"] == pytest.approx(0.1)
    assert found["gap_longest_p99"] == found["gap_max"] == pytest.approx(3.0)


@pytest.mark.parametrize("wrong", [{"error": "cut"}, {"tokens": 3}, {"arrivals": []}])
def test_answers_that_are_not_whole_are_errors_and_their_tokens_do_not_count(wrong):
    found = amounts(played(outcome([1.0, 2.0]), outcome([1.0, 2.0]) | wrong), 4)
    assert found["errors"] == 1 and found["rate"] == pytest.approx(2.0)
    with pytest.raises(RuntimeError, match="no request"):
        amounts(played(outcome([1.0, 2.0]) | wrong), 4)


def test_an_answer_in_one_piece_is_no_stream_and_has_no_gaps():
    found = amounts(played(outcome([1.0], tokens=40), outcome([1.0, 1.001], tokens=40)), 40)
    assert not any(name.startswith("gap") for name in found)
    assert "gap_p99" in amounts(played(outcome([1.0, 1.1, 1.2, 1.3], tokens=40)), 40)


def test_pairs_of_reads_are_the_gaps():
    arrivals = [0.1, 0.4, 0.45]
    found = amounts(played(outcome(arrivals)), 4)
    assert found["gap_max"] == pytest.approx(max(b - a for a, b in pairwise(arrivals)))
