"""The soak of bench.serving, for a few seconds on a tiny bundle; and faults that it must see."""

from __future__ import annotations

import asyncio
import itertools
import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest

from bench.serving import soak
from bench.serving.servers import MODEL, Setting, edgeformer
from bench.serving.soak_requests import CHAT, Lost, Requests, Work, typed

WORDS = ["hello", "the quick brown fox", "one two three", "a b c d e f g"]
NEW = 12


NUMBERS = itertools.count()


def fresh():
    return [{"role": "user", "content": f"number {next(NUMBERS)}"}]


def longest():
    return [{"role": "user", "content": f"number {next(NUMBERS)} " + "abc " * 60}]


POOL = [[{"role": "user", "content": words}] for words in WORDS]


def test_nothing_is_lost_leaks_or_changes(served, tmp_path):
    def command(port):
        return edgeformer(Setting(served["lm"], port, 4, 1))

    found = soak.Soak(command, Work(POOL, fresh, longest, NEW), 5.0, tmp_path / "server.log", warm=60).run()
    assert soak.problems(found) == []
    assert found["restarts"] >= 1 and set(found["exit_codes"]) == {0}
    assert found["ways"]["complete"] > 20 and found["ways"]["refused"] > 0
    assert found["warm_mib"] > 0 and 60 <= found["warm_requests"] < found["end_requests"]
    # Memory is compared after so many requests, and the time that is asked for begins then.
    ended = {seconds: requests for seconds, _, requests in found["samples"]}
    assert ended[found["warm_seconds"]] == found["warm_requests"]
    assert max(ended) >= found["warm_seconds"] + 5.0 * (1 - soak.RESTARTS)
    saved = found | {"minutes": 0.1, "threads": 1, "rounds": 1, "others": 0.0}
    saved["machine"] = {"cpu": "a", "system": "b", "versions": {"numpy": "1"}, "date": "c"}
    page = soak.text(saved, tmp_path)
    assert "| the same |" in page and "| free |" in page and (tmp_path / "serving-soak.png").stat().st_size > 1000


GOOD = {
    "lost": [], "left_over": [], "same_bits": True, "exit_codes": [0], "warm_threads": 5, "end_threads": 5,
    "ways": {"complete": 1, "left": 1, "typed": 1},
}  # fmt: skip


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ({"lost": ["stream: cut"]}, "lost"),
        ({"left_over": ["slot 0"]}, "not free"),
        ({"same_bits": False}, "not those of the start"),
        ({"exit_codes": [0, 143]}, "ended with"),
        ({"end_threads": 6 + soak.POOL}, "threads"),
        ({"ways": {"complete": 9, "typed": 1}}, "never happened"),
    ],
)
def test_problems_are_named(fault, said):
    assert soak.problems(GOOD) == []
    assert said in soak.problems(GOOD | fault)[0]


@pytest.mark.parametrize("data", [b"", b"Internal Server Error", b'{"error": "text"}', b'{"error": {"message": ""}}'])
def test_a_status_without_an_error_object_is_a_lost_answer(data):
    assert typed(429, b'{"error": {"message": "full", "type": "rate_limit"}}') == "typed"
    with pytest.raises(Lost):
        typed(500, data)
    with pytest.raises(Lost):
        typed(200, b'{"error": {"message": "full", "type": "rate_limit"}}')


class Faulty(BaseHTTPRequestHandler):
    """A server whose streams are as `lines` says; each `{n}` is the number of the request."""

    lines: tuple[str, ...] = ()
    count = 0

    def do_POST(self):
        type(self).count += 1
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        for line in self.lines:
            self.wfile.write(line.replace("{n}", str(self.count)).encode() + b"\n\n")

    def log_message(self, *arguments):
        pass


def text(content):
    return "data: " + json.dumps({"choices": [{"delta": {"content": content}}]})


USAGE = "data: " + json.dumps({"choices": [], "usage": {"completion_tokens": NEW}})
DONE = "data: [DONE]"


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ((text("a"), USAGE), "done: False"),
        ((text("a"), USAGE.replace(str(NEW), "3"), DONE), "ended with"),
        ((text("a{n}"), USAGE, DONE), "another answer than before"),
        (('data: {"error": {"message": ""}}',), "without an error object"),
    ],
)
def test_a_faulty_stream_is_a_lost_answer(lines, said):
    handler = type("Server", (Faulty,), {"lines": lines})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()

        async def ask():
            async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{server.server_port}") as client:
                requests = Requests(client, Work(POOL, fresh, longest, NEW), lambda: False, 0)
                requests._kinds = {"stream": requests._stream}
                requests._random.choice = lambda values: values[0]
                for _ in range(2):
                    await requests.one()
                return requests.tally

        tally = asyncio.run(ask())
        server.shutdown()
    assert said in tally.lost[-1] and tally.ways["lost"] >= 1


def test_a_refusal_is_lost_unless_the_server_restarts():
    async def ask(is_restarting):
        async with httpx.AsyncClient(base_url="http://127.0.0.1:1") as client:
            requests = Requests(client, Work(POOL, fresh, longest, NEW), lambda: is_restarting, 0)
            requests._kinds = {"whole": requests._whole}
            await requests.one()
            return dict(requests.tally.ways)

    assert asyncio.run(ask(True)) == {"refused": 1}
    assert asyncio.run(ask(False)) == {"lost": 1}


def test_the_command_is_the_one_a_user_types(served):
    command = edgeformer(Setting(served["lm"], 8080, 4, 1))
    assert command[:4] == [sys.executable, "-m", "edgeformer", "serve"] and command[4].startswith(f"{MODEL}=")
    assert CHAT.startswith("/v1/")
