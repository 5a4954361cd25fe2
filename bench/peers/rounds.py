"""Interleaved rounds of fresh processes; disturbed rounds are rejected.

A turn is one process: one contestant, one number of threads, all tests. A round is a turn of each. A turn in which
other processes (or the hypervisor) used more of the CPUs than `LIMIT` is taken again, up to `TRIES` times in all; if it
is still disturbed, the round is rejected as a whole, so that the turns of a round belong to the same minutes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.peers.contestants import Contestant
from bench.peers.runners.measure import Others

RUNNERS = Path(__file__).resolve().parent / "runners"
LIMIT = 0.05  # cores that others may use during a test, on average
TRIES = 6
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


class TurnFailed(Exception):
    """A worker process ended without its line of JSON; the message has the end of its stderr."""


@dataclass(frozen=True)
class Turn:
    """What one worker process measured."""

    contestant: str
    threads: int
    result: dict[str, Any]
    busy: int = 0  # processes that were meant to run beside it

    @property
    def others(self) -> float:
        """The most cores that other processes used, without the `busy` ones: over the whole process or in one test."""
        tests = [test.get("others") for test in self.result.get("tests", {}).values()]
        return max(0.0, max([self.result["others"], *(cores for cores in tests if cores is not None)]) - self.busy)

    @property
    def disturbed(self) -> bool:
        return self.others > LIMIT


@dataclass
class Round:
    """One turn of each contestant at each number of threads."""

    turns: list[Turn] = field(default_factory=list)
    memory: dict[int, dict[str, float]] = field(default_factory=dict)  # threads -> GB/s of a plain read, and others

    @property
    def disturbed(self) -> list[str]:
        """A line for each disturbed turn; empty for a round that counts."""
        return [
            f"{turn.contestant}, {turn.threads} threads: others used {turn.others:.2f} cores"
            for turn in self.turns
            if turn.disturbed
        ]


def worker(contestant: Contestant, job: dict[str, Any], work: Path) -> dict[str, Any]:
    """Runs one job in a fresh process of the contestant's environment and returns its JSON.

    Raises:
        TurnFailed: the process failed.
    """
    path = work / "job.json"
    path.write_text(json.dumps(job))
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "OPENBLAS_", "MKL_"))}
    if "reference" in job:  # numpy's own threads; in a measurement there is no matrix product in numpy
        environment |= dict.fromkeys(THREADS, str(job["threads"]))
    command = [str(contestant.environment.python), str(RUNNERS / "measure.py"), contestant.runner, str(path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=3600)
    return parse(done.stdout, done.stderr, done.returncode)


def parse(stdout: str, stderr: str, code: int) -> dict[str, Any]:
    """The worker's one line of JSON.

    Raises:
        TurnFailed: there is none, or the process ended with another code than 0.
    """
    lines = stdout.strip().splitlines()
    if code or len(lines) != 1:
        said = " | ".join(stderr.strip().splitlines()[-3:])
        raise TurnFailed(f"exit code {code}, {len(lines)} lines: {said[-500:]}")
    try:
        found = json.loads(lines[0])
    except ValueError as error:
        raise TurnFailed(f"no JSON came back: {lines[0][:200]}") from error
    if not isinstance(found, dict):
        raise TurnFailed(f"a {type(found).__name__} came back, expected an object")
    return found


def take_turn(
    measure: Callable[[], dict[str, Any]],
    contestant: str,
    threads: int,
    tries: int = TRIES,
    busy: int = 0,
    ready: Callable[[], object] = lambda: None,
) -> Turn:
    """The first undisturbed of `tries` turns, else the least disturbed one; `ready` is called before each."""
    turns: list[Turn] = []
    while len(turns) < tries and (not turns or turns[-1].disturbed):
        ready()
        with burning(busy):
            turns.append(Turn(contestant, threads, measure(), busy))
    return min(turns, key=lambda turn: turn.others)


@contextmanager
def burning(count: int) -> Iterator[None]:
    """Runs `count` busy processes inside the block."""
    started = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in started:
            process.kill()
            process.wait()


def settle(patience: float) -> bool:
    """Whether the machine was quiet for half a second, waiting at most `patience` seconds."""
    end = time.monotonic() + patience
    while True:
        others = Others()
        time.sleep(0.5)
        if others.cores() <= LIMIT:
            return True
        if time.monotonic() > end:
            return False


def quiet(rounds: Iterable[Round]) -> list[Round]:
    """The rounds without a disturbed turn."""
    return [one for one in rounds if not one.disturbed]


def values(rounds: Iterable[Round], contestant: str, threads: int, test: str) -> list[float]:
    """A test's numbers over the rounds; `test` may also be load_s, peak_mib or cores."""
    found = []
    for one in rounds:
        for turn in one.turns:
            if (turn.contestant, turn.threads) == (contestant, threads):
                value = turn.result["tests"].get(test, {}).get("value", turn.result.get(test))
                if value is not None:
                    found.append(float(value))
    return found


def say(text: str) -> None:
    """Prints progress to stderr."""
    print(text, file=sys.stderr, flush=True)
