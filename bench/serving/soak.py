"""An hour of mixed load: clients that vanish, bad requests, restarts. Nothing may be lost, leak or change.

Most of the time is one server process, whose memory is compared after a warm-up and at the end. The warm-up ends after
so many requests, however long these take: what fills (the prefix cache, recent answers, pools of threads) fills by
requests and not by time. At its end more of the longest requests come at once than there are slots, which chance alone
would bring about much later: memory that they need stays with the process. Then servers follow one another on the same
port: SIGTERM comes while answers run. Answers of the first minute must come again at the end.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from bench.decoding.setting import verdict
from bench.peers import models
from bench.report import footnote, table
from bench.serving import servers, workload
from bench.serving.servers import Process, Setting
from bench.serving.setting import Options
from bench.serving.soak_requests import Requests, Work
from bench.serving.workload import Workload

CLIENTS, SLOTS = 12, 8  # more clients than slots: some wait
WARM = 1000  # requests after which memory is compared: about 100 of each kind
QUICK_WARM = 100  # of a short soak, whose memory says little
SEEN = 3  # requests of each kind that the warm-up has at least
RESTARTS = 0.25  # of the time goes to restarts
EACH = 20.0  # seconds between two
PATIENCE = 600.0  # seconds for one answer, and a fifth of it for an end: the machine may be busy
GROWTH = 0.02  # the most that memory may grow
POOL = min(32, (os.cpu_count() or 1) + 4)  # threads that an event loop makes as it needs them, and keeps


@dataclass
class Report:
    """What was found. `samples`: (seconds, MiB, requests) of the first server process."""

    samples: list[tuple[float, float, int]] = field(default_factory=list)
    warm_mib: float = 0.0
    warm_seconds: float = 0.0
    warm_requests: int = 0  # that had ended when the warm-up did
    end_requests: int = 0  # that had ended when the first process did
    end_mib: float = 0.0
    warm_threads: int = 0
    end_threads: int = 0
    restarts: int = 0
    exit_codes: list[int] = field(default_factory=list)
    left_over: list[str] = field(default_factory=list)  # slots or counts that are not free at the end
    same_bits: bool = False


class Soak:
    """`command(port)` starts a server; `work` is what is asked for `seconds` after a warm-up of `warm` requests."""

    def __init__(
        self, command: Callable[[int], list[str]], work: Work, seconds: float, log: Path, warm: int = WARM
    ) -> None:
        self._command, self._work, self._seconds, self._log, self._warm = command, work, seconds, log, warm
        self._port = servers.free_port()
        self._is_restarting = False
        self.report = Report()

    def run(self) -> dict[str, Any]:
        """All of it: the report, and how the requests ended.

        Raises:
            SetupFailed: a server does not start.
        """
        return asyncio.run(self._run())

    async def _run(self) -> dict[str, Any]:
        server = await self._start()
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=CLIENTS)
        try:
            async with httpx.AsyncClient(
                base_url=f"http://127.0.0.1:{self._port}", timeout=PATIENCE, limits=limits
            ) as client:
                requests = Requests(client, self._work, lambda: self._is_restarting, seed=1)
                for messages in self._work.pool:  # alone: what all later answers are compared with
                    await requests.streamed(requests._body(messages, logprobs=True, top_logprobs=2))
                stop = asyncio.Event()
                loads = [asyncio.create_task(self._load(requests, stop)) for _ in range(CLIENTS)]
                try:
                    await self._watch(server, requests, self._seconds * (1 - RESTARTS))
                    server = await self._restart_often(server, self._seconds * RESTARTS)
                finally:
                    stop.set()
                    await asyncio.gather(*loads)
                await self._at_end(client)
                before = len(requests.tally.lost)
                for messages in self._work.pool:
                    await requests.streamed(requests._body(messages, logprobs=True, top_logprobs=2))
                self.report.same_bits = len(requests.tally.lost) == before
        finally:
            server.end()
        tally = requests.tally
        return vars(self.report) | {"ways": dict(tally.ways), "kinds": dict(tally.kinds), "lost": tally.lost[:20],
                                    "lost_count": len(tally.lost), "seconds": self._seconds}  # fmt: skip

    async def _start(self) -> Process:
        server = Process(self._command(self._port), self._port, self._log)
        await asyncio.to_thread(server.wait_ready, "/ready")
        return server

    @staticmethod
    async def _load(requests: Requests, stop: asyncio.Event) -> None:
        while not stop.is_set():
            await requests.one()

    async def _watch(self, server: Process, requests: Requests, seconds: float) -> None:
        """Samples the memory of a server under load, until `seconds` after the warm-up."""
        report, began = self.report, time.monotonic()
        while not report.warm_mib or time.monotonic() - began < report.warm_seconds + seconds:
            await asyncio.sleep(min(5.0, seconds / 40))
            passed, mib, ended = time.monotonic() - began, server.rss() / 2**20, requests.tally.ended
            report.samples.append((round(passed, 1), round(mib, 1), ended))
            if not report.warm_mib and ended >= self._warm and requests.least >= SEEN:
                await requests.at_most(CLIENTS)
                mib, ended, passed = server.rss() / 2**20, requests.tally.ended, time.monotonic() - began
                report.samples.append((round(passed, 1), round(mib, 1), ended))
                report.warm_mib, report.warm_threads = mib, server.threads()
                report.warm_seconds, report.warm_requests = round(passed, 1), ended
        report.end_mib, report.end_threads = server.rss() / 2**20, server.threads()
        report.end_requests = requests.tally.ended

    async def _restart_often(self, server: Process, seconds: float) -> Process:
        """SIGTERM while answers run, and another server on the same port, until the time is over; at least once."""
        end = time.monotonic() + seconds
        while True:
            self._is_restarting = True
            self.report.exit_codes.append(await asyncio.to_thread(server.end, PATIENCE / 5))
            server = await self._start()
            await asyncio.sleep(0.5)  # clients that were refused come back
            self._is_restarting = False
            self.report.restarts += 1
            left = end - time.monotonic()
            await asyncio.sleep(max(0.0, min(EACH, left)))
            if left <= EACH:
                return server

    async def _at_end(self, client: httpx.AsyncClient) -> None:
        """Nothing runs any more: every slot is free, nothing waits, and no memory of caches is reserved."""
        report = self.report
        for _ in range(50):
            slots = (await client.get("/slots")).json()
            metrics = (await client.get("/metrics")).text.splitlines()
            report.left_over = [f"slot {one['id']}" for one in slots if one["is_processing"]]
            names = ("vllm:num_requests_running{", "vllm:num_requests_waiting{", "vllm:kv_cache_usage_perc{")
            report.left_over += [line for line in metrics if line.startswith(names) and float(line.split()[-1]) != 0]
            if not report.left_over:
                return
            await asyncio.sleep(0.1)


def measure(options: Options) -> dict[str, Any]:
    """A soak of `options.minutes` on SmolLM2."""
    work = Workload.of(options.bundle)
    new = 8 if options.tiny else 48

    def command(port: int) -> list[str]:
        return servers.edgeformer(Setting(options.bundle, port, SLOTS, options.threads))

    longest = workload.LONGEST
    asked = Work(
        [ask.messages for ask in work.take(12)],
        lambda: work.take(1)[0].messages,
        lambda: work.short(1, longest)[0].messages,
        new,
    )
    warm = QUICK_WARM if options.tiny or options.quick else WARM
    result = Soak(command, asked, options.minutes * 60, models.LOGS / "serving-soak.log", warm).run()
    print(f"soak: {problems(result) or 'no problem'}", file=sys.stderr, flush=True)
    return {"minutes": options.minutes, **result}


def problems(found: dict[str, Any]) -> list[str]:
    """What went wrong; empty if all is as it must be. Memory is judged by the page: a short soak cannot."""
    wrong = [f"lost: {line}" for line in found["lost"]]
    wrong += [f"not free at the end: {line}" for line in found["left_over"]]
    if not found["same_bits"]:
        wrong.append("the answers at the end are not those of the start")
    if any(found["exit_codes"]):
        wrong.append(f"servers ended with {found['exit_codes']}")
    if found["end_threads"] > found["warm_threads"] + POOL:
        wrong.append(f"{found['warm_threads']} threads after the warm-up, {found['end_threads']} at the end")
    if not found["ways"].get("complete") or not found["ways"].get("left") or not found["ways"].get("typed"):
        wrong.append(f"some kind of request never happened: {found['ways']}")
    return wrong


def growth(saved: dict[str, Any]) -> float:
    """How much the memory of the first process grew after its warm-up, a share."""
    return float(saved["end_mib"] / saved["warm_mib"] - 1)


def text(saved: dict[str, Any], images: Path) -> str:
    """The table and the plot."""
    from bench.serving import plots

    grown, ways, lost = growth(saved), saved["ways"], saved["lost_count"]
    kinds = ", ".join(f"{kind} {count:,}" for kind, count in sorted(saved["kinds"].items()))
    between = f"after {saved['warm_requests']:,} requests and at the end, after {saved['end_requests']:,}"
    memory = f"{saved['warm_mib']:,.0f} MiB, {saved['end_mib']:,.0f} MiB: {grown:+.1%}, "
    rows = [
        ["requests: complete", f"{ways.get('complete', 0):,}"],
        ["clients that left early", f"{ways.get('left', 0):,}"],
        ["typed errors (bad requests, 429)", f"{ways.get('typed', 0):,}"],
        ["refused while a server restarted", f"{ways.get('refused', 0):,}"],
        ["**lost or changed answers**", f"{lost}, {verdict(lost, 0, least=False)} (none)"],
        ["restarts by SIGTERM under load", f"{saved['restarts']}, exit codes {sorted(set(saved['exit_codes']))}"],
        [
            f"memory of one process, {between}",
            memory + f"{verdict(grown, GROWTH, least=False)} (at most {GROWTH:.0%})",
        ],
        ["its threads", f"{saved['warm_threads']}, {saved['end_threads']}"],
        ["text and log probabilities of the start, at the end", "the same" if saved["same_bits"] else "**others**"],
        ["slots, queue and cache at the end", ", ".join(saved["left_over"]) or "free"],
    ]
    path = plots.memory(saved, images / "serving-soak.png")
    parts = [
        f"{saved['minutes']:g} minutes after the warm-up, {CLIENTS} clients on {SLOTS} slots.",
        f"Kinds of requests: {kinds}.",
        table(["", ""], rows),
        f"![Memory](images/{path.name})",
        f"{saved['threads']} threads. {footnote(saved['machine'])}",
    ]
    return "\n\n".join(parts)
