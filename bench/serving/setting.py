"""What the studies of serving share: options, one run of the load client, what it amounts to."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from bench.decoding.setting import LIMIT, percentile
from bench.peers.runners.measure import busy_ticks
from bench.report import ROOT, summary
from bench.serving.servers import Process
from bench.serving.workload import NEW

STREAM = 0.1  # reads a token, at least, of what counts as a stream
ROUTE = "/v1/chat/completions"


@dataclass(frozen=True)
class Options:
    """How a study is taken."""

    bundle: Path  # SmolLM2-135M-Instruct with its GGUF's blocks
    threads: int = 2
    rounds: int = 3
    quick: bool = False  # fewer requests
    peers: tuple[str, ...] = ()  # words: only the servers whose project and name contain one
    tiny: bool = False  # the least that runs everything: not for numbers
    minutes: float = 60.0  # of the soak

    @property
    def new(self) -> int:
        """Tokens of an answer."""
        return 8 if self.tiny else NEW


class Clock:
    """Wall time, and how many cores processes beside a server, its client and this one used. `begin` it first."""

    def __init__(self, server: Process) -> None:
        self._server = server
        self._began = self._now()

    def _now(self) -> tuple[float, float, float, float]:
        busy = busy_ticks(Path("/proc/stat").read_text()) / os.sysconf("SC_CLK_TCK")
        return time.perf_counter(), busy, self._server.cpu(), time.process_time()

    def cores(self, client: float) -> tuple[float, float]:
        """(cores of the server, of others); `client`: CPU seconds of the load client."""
        wall, busy, server, own = (after - before for after, before in zip(self._now(), self._began, strict=True))
        return server / wall, max(0.0, (busy - server - own - client) / wall)


def play(server: Process, clients: list[dict[str, Any]]) -> dict[str, Any]:
    """One run of the load client, a process of its own: what it prints, server_cores, client_cores and others."""
    job = {"host": "127.0.0.1", "port": server.port, "path": ROUTE, "clients": clients}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "job.json"
        path.write_text(json.dumps(job))
        clock = Clock(server)
        command = [sys.executable, "-m", "bench.serving.client", str(path)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the load client failed: {done.stderr.strip()[-500:]}")
    found: dict[str, Any] = json.loads(done.stdout)
    server_cores, others = clock.cores(found["cpu"] + found["setup_cpu"])
    return found | {
        "server_cores": server_cores,
        "client_cores": found["cpu"] / found["seconds"],
        "others": others,
    }


def gaps(outcome: dict[str, Any]) -> list[float]:
    """Seconds between two reads that brought text."""
    return [after - before for before, after in pairwise(outcome["arrivals"])]


def amounts(played: dict[str, Any], new: int | None) -> dict[str, float]:
    """What a run amounts to: new tokens a second from the first request to the last token, seconds to the first token,
    seconds between reads with text (of all gaps, and of the longest of each answer), errors and cores. `new`: the
    tokens that each answer must have. Answers that come in a few reads are no streams, and have no gaps.

    Raises:
        RuntimeError: no request was answered.
    """
    outcomes = played["outcomes"]
    wrong = [one for one in outcomes if one["error"] or not one["arrivals"] or new not in (None, one["tokens"])]
    good = [one for one in outcomes if one not in wrong]
    if not good:
        raise RuntimeError(f"no request was answered: {wrong[0]['error'] or wrong[0]['tokens']}")
    first = [one["arrivals"][0] for one in good]
    by_answer = [found for one in good if (found := gaps(one))]
    between = [gap for found in by_answer for gap in found]
    is_stream = sum(len(one["arrivals"]) for one in good) >= STREAM * sum(one["tokens"] for one in good)
    waits: dict[str, float] = {}
    if is_stream and between:
        waits = {"gap_p50": percentile(between, 0.5), "gap_p99": percentile(between, 0.99)}
        waits |= {"gap_longest_p99": percentile([max(found) for found in by_answer], 0.99), "gap_max": max(between)}
    begin, end = min(one["due"] for one in outcomes), max(one["due"] + one["ended"] for one in outcomes)
    return {
        "rate": sum(one["tokens"] for one in good) / (end - begin),
        "first_p50": percentile(first, 0.5),
        "first_p95": percentile(first, 0.95),
        **waits,
        "late": max(one["sent"] for one in outcomes),
        "errors": float(len(wrong)),
        "client_cores": played["client_cores"],
        "server_cores": played["server_cores"],
    }


def is_quiet(others: float) -> bool:
    return others <= LIMIT


def merged(rounds: Sequence[dict[str, float]]) -> dict[str, dict[str, float]]:
    """name -> summary over the rounds, of what all of them have."""
    shared = [name for name in rounds[0] if all(name in one for one in rounds)]
    return {name: summary([one[name] for one in rounds]) for name in shared}
