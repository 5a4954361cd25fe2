"""The load client: a process that streams answers and notes when their tokens come.

    python -m bench.serving.client JOB.json     prints one line of JSON: what became of each request, and its own CPU

It shares the cores with the server, so it does as little as it can while the load runs: it notes the time and the bytes
of each read, and nothing else. HTTP (h11), events and JSON are read after the last answer has ended.

A job is {host, port, path, clients: [{at, bodies}]}: a client begins `at` seconds after the start and sends its
bodies one after the other, each on a connection of its own. Clients with one body each are an open loop: nobody waits
for an answer to ask. Times count from the moment at which a request was due, so a client that is late makes its own
numbers worse and not better.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import h11

TIMEOUT = 600.0  # seconds for one answer


@dataclass
class Outcome:
    """What became of one request. Times are seconds after `due`, when it should have been sent."""

    client: int
    due: float  # after the start of the load
    sent: float
    ended: float = 0.0
    status: int = 0
    error: str | None = None
    arrivals: list[float] = field(default_factory=list)  # of new text: one for each read that brought some
    pieces: int = 0  # events with text
    tokens: int = 0  # as the server counts them; of one that does not, pieces
    prompt_tokens: int = 0
    cached_tokens: int = 0
    text: str = ""


class Exchange(asyncio.Protocol):
    """One request on one connection: sends it, keeps what comes with its time."""

    def __init__(self, request: bytes, ended: asyncio.Future[None]) -> None:
        self._request, self.ended = request, ended
        self.sent = 0.0
        self.reads: list[tuple[float, bytes]] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.WriteTransport)
        transport.write(self._request)
        self.sent = time.perf_counter()

    def data_received(self, data: bytes) -> None:
        self.reads.append((time.perf_counter(), data))

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 (asyncio's)
        if not self.ended.done():
            self.ended.set_result(None)


def encoded(job: dict[str, Any], body: dict[str, Any]) -> bytes:
    """The bytes of a request; the server closes the connection after its answer."""
    data = json.dumps(body).encode()
    head = (
        f"POST {job['path']} HTTP/1.1\r\nHost: {job['host']}:{job['port']}\r\nContent-Type: application/json\r\n"
        f"Accept: text/event-stream\r\nConnection: close\r\nContent-Length: {len(data)}\r\n\r\n"
    )
    return head.encode() + data


@dataclass(frozen=True)
class Played:
    """One request after its end, before its bytes are read. Times are those of time.perf_counter()."""

    client: int
    due: float
    ended: float
    exchange: Exchange
    error: str | None


async def play(job: dict[str, Any]) -> tuple[float, list[Played]]:
    """(the start, all requests of a job: those of a client in their order)."""
    loop = asyncio.get_running_loop()
    requests = [[encoded(job, body) for body in client["bodies"]] for client in job["clients"]]
    began = time.perf_counter() + 0.05

    async def run(number: int) -> list[Played]:
        due = began + job["clients"][number]["at"]
        await asyncio.sleep(due - time.perf_counter())
        found: list[Played] = []
        for request in requests[number]:
            exchange = Exchange(request, loop.create_future())
            error = None
            try:
                async with asyncio.timeout(TIMEOUT):
                    transport, _ = await loop.create_connection(lambda e=exchange: e, job["host"], job["port"])  # type: ignore[misc]
                    try:
                        await exchange.ended
                    finally:
                        transport.abort()
            except (OSError, TimeoutError) as failure:
                error = f"{type(failure).__name__}: {failure}"
            now = time.perf_counter()
            found.append(Played(number, due, now, exchange, error))
            due = now  # the next one is due when this has ended
        return found

    kept = await asyncio.gather(*(run(number) for number in range(len(requests))))
    return began, [one for found in kept for one in found]


def outcome(played: Played, began: float) -> Outcome:
    """What became of it."""
    due, exchange = played.due, played.exchange
    sent = max(0.0, exchange.sent - due) if exchange.sent else 0.0
    found = Outcome(played.client, due - began, sent, played.ended - due, error=played.error)
    if found.error is None:
        read(found, exchange, due)
    return found


def read(outcome: Outcome, exchange: Exchange, due: float) -> None:
    """Fills in what the bytes say: status, error, the times at which text came, tokens."""
    connection = h11.Connection(h11.CLIENT)
    connection.send(h11.Request(method="POST", target="/", headers=[("Host", "h"), ("Content-Length", "0")]))
    connection.send(h11.EndOfMessage())
    events, body, is_done = Events(), b"", False
    try:
        for moment, data in [*exchange.reads, (0.0, b"")]:
            connection.receive_data(data)
            has_text = False
            while (found := connection.next_event()) not in (h11.NEED_DATA, h11.PAUSED):
                if isinstance(found, h11.Response):
                    outcome.status = found.status_code
                elif isinstance(found, h11.Data):
                    body += bytes(found.data)[:2000] if outcome.status != 200 else b""
                    for line in events.push(bytes(found.data)):
                        has_text |= take(outcome, line)
                elif isinstance(found, h11.EndOfMessage):
                    is_done = True
                elif isinstance(found, h11.ConnectionClosed):
                    break
            if has_text:
                outcome.arrivals.append(moment - due)
    except (h11.ProtocolError, ValueError, KeyError, TypeError, IndexError) as error:
        outcome.error = outcome.error or f"{type(error).__name__}: {error}"
    outcome.tokens = outcome.tokens or outcome.pieces
    if outcome.error is None and outcome.status != 200:
        outcome.error = f"status {outcome.status}: {body.decode(errors='replace')[:300]}"
    if outcome.error is None and not (is_done and events.has_ended):
        outcome.error = f"the stream was cut after {len(outcome.arrivals)} reads with text"


class Events:
    """Server-sent events: the `data` of each, as its last byte comes."""

    def __init__(self) -> None:
        self._rest = b""
        self.has_ended = False  # "[DONE]" came

    def push(self, data: bytes) -> list[bytes]:
        """The events that `data` completes."""
        *whole, self._rest = (self._rest + data.replace(b"\r\n", b"\n")).split(b"\n\n")
        found = []
        for event in whole:
            lines = [line[5:].strip() for line in event.split(b"\n") if line.startswith(b"data:")]
            value = b"\n".join(lines)
            if value == b"[DONE]":
                self.has_ended = True
            elif value:
                found.append(value)
        return found


def take(outcome: Outcome, data: bytes) -> bool:
    """Takes one event in; whether it brought text."""
    value = json.loads(data)
    if value.get("error"):
        outcome.error = f"error event: {json.dumps(value['error'])[:300]}"
        return False
    if usage := value.get("usage"):
        outcome.tokens, outcome.prompt_tokens = usage["completion_tokens"], usage["prompt_tokens"]
        outcome.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    choices = value.get("choices") or []
    text = "".join((one.get("delta") or {}).get("content") or one.get("text") or "" for one in choices)
    outcome.text += text
    outcome.pieces += bool(text)
    return bool(text)


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    setup, wall = time.process_time(), time.perf_counter()
    began, played = asyncio.run(play(job))
    cpu, wall = time.process_time() - setup, time.perf_counter() - wall
    outcomes = [asdict(outcome(one, began)) for one in played]
    rest = time.process_time() - cpu  # before and after the load: the process's start, reading what came
    print(json.dumps({"outcomes": outcomes, "cpu": cpu, "setup_cpu": rest, "seconds": wall}))


if __name__ == "__main__":
    main()
