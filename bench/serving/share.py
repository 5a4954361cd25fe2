"""What HTTP, JSON and events take of the engine's throughput: one load through `model.scheduler`, and over HTTP.

    python -m bench.serving.share BUNDLE THREADS     the other side: reads lists of conversations, prints seconds

Both sides stay loaded and take turns, wave by wave, with prompts that neither has seen; no drafts. The time of a wave
runs from its first request to its last token. Over HTTP each answer is streamed to a client of its own, and the load
client's CPU time, on the same cores, counts as HTTP's.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

from bench.decoding.setting import LIMIT, summaries, threads_text, verdict
from bench.report import ROOT, table
from bench.serving import servers
from bench.serving.setting import Options, amounts, play
from bench.serving.workload import Ask, Workload, clients

COUNTS = {8: 0.10, 1: 0.05}  # streams -> the most that HTTP may take
PROMPT = 64  # tokens: short, so that decoding is what counts
WAVES = 7  # of each side in a round


def inside(bundle: str, threads: int) -> None:
    """Waves through `model.scheduler`; a line of JSON each."""
    import edgeformer

    model = edgeformer.load(bundle, threads=threads)
    arguments: dict[str, Any] = {"temperature": 0, "ignore_eos": True, "speculation": "off"}
    with model.scheduler(max_sequences=max(COUNTS)) as scheduler:
        for line in sys.stdin:
            job = json.loads(line)
            began = time.perf_counter()
            answers = [scheduler.add(one, max_new_tokens=job["new"], **arguments) for one in job["asked"]]
            tokens = sum(answer.result().timings.new_tokens for answer in answers)
            print(json.dumps({"rate": tokens / (time.perf_counter() - began)}), flush=True)


class Inside:
    """The process of `inside`."""

    def __init__(self, bundle: Path, threads: int) -> None:
        command = [sys.executable, "-m", "bench.serving.share", str(bundle), str(threads)]
        self._process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def wave(self, asks: list[Ask], new: int) -> float:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps({"asked": [ask.messages for ask in asks], "new": new}) + "\n")
        self._process.stdin.flush()
        return float(json.loads(self._process.stdout.readline())["rate"])

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def pairs(options: Options, threads: int, count: int) -> dict[str, float]:
    """A round: the median rates of both sides, what HTTP took in the median pair, and the client's cores."""
    work = Workload.of(options.bundle, seed=count)
    ours = next(one for one in servers.contestants(options.bundle) if one.key == servers.PLAIN)
    waves = 1 if options.tiny else 3 if options.quick else WAVES
    new = options.new * (1 if count > 1 else 2)
    inner = Inside(options.bundle, threads)
    kept: list[dict[str, float]] = []
    try:
        with servers.running(ours, ours.file(), max(COUNTS), threads) as server:
            for number in range(waves + 1):
                alone = inner.wave(work.short(count, PROMPT), new)
                load = clients(
                    work.short(count, PROMPT), count, lambda ask: ask.body(servers.MODEL, new, ours.extra), 0.0
                )
                played = play(server, load)
                over = amounts(played, new)
                if over["errors"]:
                    raise RuntimeError(f"{over['errors']:.0f} requests failed")
                if number:  # the first one warms up
                    kept.append({"inside": alone, "http": over["rate"], "took": 1 - over["rate"] / alone,
                                 "client_cores": over["client_cores"], "others": played["others"]})  # fmt: skip
    finally:
        inner.close()
    return {name: median(one[name] for one in kept) for name in kept[0]}


def measure(options: Options) -> dict[str, Any]:
    """threads -> streams -> summaries of inside, http (tokens a second), took (a share) and client_cores."""
    measured: dict[str, Any] = {}
    most = 0.0
    for threads in sorted({1, options.threads}):
        for count in COUNTS:
            rounds = []
            for _ in range(options.rounds):
                tried = [pairs(options, threads, count)]
                while len(tried) < (1 if options.quick or options.tiny else 3) and tried[-1]["others"] > LIMIT:
                    tried.append(pairs(options, threads, count))
                found = min(tried, key=lambda one: one["others"])
                most = max(most, found.pop("others"))
                rounds.append(found)
            measured.setdefault(str(threads), {})[str(count)] = summaries(rounds)
            shown = {name: round(one["median"], 3) for name, one in measured[str(threads)][str(count)].items()}
            print(f"share, {threads} threads, {count} streams: {shown}", file=sys.stderr, flush=True)
    return {"others": most, "measured": measured}


def text(saved: dict[str, Any], _: Path) -> str:
    """The table."""
    from bench.serving.load import note

    rows = []
    for threads in sorted(saved["measured"], key=int, reverse=True):
        for count, bar in COUNTS.items():
            found = {name: one["median"] for name, one in saved["measured"][threads][str(count)].items()}
            rows.append(
                [
                    f"{count} stream{'s' * (count > 1)}, {threads_text(int(threads))}",
                    f"{found['inside']:,.0f}",
                    f"{found['http']:,.0f}",
                    f"{found['took']:.1%}, {verdict(found['took'], bar, least=False)} (at most {bar:.0%})",
                    f"{found['client_cores']:.3f}",
                ]
            )
    heads = ["", "tokens/s through `model.scheduler`", "over HTTP", "HTTP takes", "load client's cores"]
    return "\n\n".join([table(heads, rows), note(saved)])


if __name__ == "__main__":
    inside(sys.argv[1], int(sys.argv[2]))
