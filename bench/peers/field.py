"""The loop of every comparison: environments and files of the contestants, then rounds until enough were quiet."""

from __future__ import annotations

import functools
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.peers import models, results
from bench.peers.contestants import HERE, Contestant
from bench.peers.environments import SetupFailed, run
from bench.peers.rounds import LIMIT, TRIES, Round, TurnFailed, quiet, say, settle, take_turn, worker
from bench.report import summary

PATIENCE = 600.0  # seconds to wait for a quiet moment before a turn


def read_speed(threads: int) -> dict[str, float]:
    """GB/s of a plain read of 256 MiB, more than the CPU's caches; the best of five."""
    from bench.peers.runners.measure import Others
    from edgeformer import _native

    others = Others()
    size = 1 << 28
    best = max(size / _native.testing.memory_read(threads, size) / 1e9 for _ in range(5))
    return {"gb_s": best, "others": others.cores()}


def warm(path: Path) -> None:
    """Reads a model's files once, so that every contestant loads from the page cache."""
    for file in [path] if path.is_file() else path.rglob("*"):
        if file.is_file():
            with file.open("rb") as opened:
                while opened.read(1 << 24):
                    pass


def load_once(path: Path) -> None:
    """Loads a bundle once, to fill the disk cache: the second load is measured.

    Raises:
        SetupFailed: it cannot be loaded.
    """
    code = (
        "import sys, edgeformer; from edgeformer import disk_cache; edgeformer.load(sys.argv[1]); disk_cache.finish()"
    )
    run([sys.executable, "-c", code, str(path)], models.LOGS / "first-load.log", {}, f"load {path.name}")


def set_up(chosen: list[Contestant]) -> tuple[dict[str, Path], dict[str, str]]:
    """Makes environments and files; returns (file by contestant, reason by contestant that cannot take part)."""
    files, absent = {}, {}
    for contestant in chosen:
        try:
            for environment in (contestant.environment, *contestant.needs):
                environment.make(models.LOGS / f"pip-{environment.name}.log")
            files[contestant.key] = contestant.file()
            if contestant.environment == HERE:
                load_once(files[contestant.key])
        except SetupFailed as error:
            absent[contestant.key] = str(error)
            say(f"{contestant.key}: {error}")
    return files, absent


@dataclass(frozen=True)
class Plan:
    """How rounds are taken.

    `job(number)` is the job of every worker in round `number`, beside its own file and options.
    """

    threads: list[int]
    job: Callable[[int], dict[str, Any]]
    work: Path  # a temporary folder
    wanted: int  # undisturbed rounds
    attempts: int  # rounds at most
    keep: bool  # disturbed rounds count too
    busy: int = 0  # processes that only burn time, beside each turn


def take_rounds(chosen: list[Contestant], files: dict[str, Path], absent: dict[str, str], plan: Plan) -> dict[str, Any]:
    """The results of rounds as they are saved, without the descriptions of files.

    Rounds are taken until `plan.wanted` were quiet or `plan.attempts` were made. A contestant that fails is added to
    `absent`.
    """
    rounds: list[Round] = []
    threads = plan.threads
    while len(rounds) < plan.attempts and len(rounds if plan.keep else quiet(rounds)) < plan.wanted:
        number = len(rounds)
        rounds.append(take_round(shuffled(chosen, number), files, absent, plan, number))
        for line in rounds[-1].disturbed:
            say(f"round {len(rounds)}: {line} (the limit is {LIMIT})")
    used = rounds if plan.keep else quiet(rounds)
    return {
        "threads": threads,
        "rounds": {"taken": len(rounds), "used": len(used), "disturbed": sum(bool(one.disturbed) for one in rounds)},
        "undisturbed": not any(one.disturbed for one in used) and bool(used),
        "limit_cores_of_others": LIMIT,
        "contestants": {c.key: facts(c) for c in chosen},
        "absent": absent,
        "memory": {str(n): summary([one.memory[n]["gb_s"] for one in used]) for n in threads if used},  # GB/s
        "measured": results.collect(used, chosen, threads),
        "kept_by_stream": results.kept_by_stream(used, threads),
    }


def shuffled(chosen: list[Contestant], number: int) -> list[Contestant]:
    """The order of round `number`: different for each round, the same in every run.

    The place matters: in a fixed order, after different peers, one file loaded in 0.18 s in one of its rows and in
    0.10 s in the other.
    """
    return random.Random(number).sample(chosen, len(chosen))


def take_round(
    chosen: list[Contestant], files: dict[str, Path], absent: dict[str, str], plan: Plan, number: int
) -> Round:
    """Round `number`: one turn of each contestant at each number of threads.

    A contestant that fails is added to `absent` with the reason.
    """
    what = plan.job(number)
    one = Round(memory={count: read_speed(count) for count in plan.threads})
    for count in plan.threads:
        for contestant in chosen:
            if contestant.key in absent:
                continue
            file = files[contestant.key]
            warm(file)
            job = {"file": str(file), "threads": count, "options": contestant.options, **what}
            measure = functools.partial(worker, contestant, job, plan.work)
            try:
                if plan.keep:
                    turn = take_turn(measure, contestant.key, count, 1, plan.busy)
                else:
                    turn = take_turn(measure, contestant.key, count, TRIES, plan.busy, lambda: settle(PATIENCE))
            except TurnFailed as error:
                absent[contestant.key] = str(error)
                say(f"{contestant.key}: {error}")
                continue
            one.turns.append(turn)
            shown = {name: round(test["value"], 3) for name, test in turn.result["tests"].items() if "value" in test}
            say(f"{contestant.key}, {count} threads: {shown} (others {turn.others:.2f} cores)")
            if turn.disturbed and not plan.keep:
                return one  # it will be rejected: the rest of it is not worth the time
    return one


def facts(contestant: Contestant) -> dict[str, Any]:
    """What a contestant is: its project, file and settings."""
    return {
        "project": contestant.project,
        "name": contestant.name,
        "size": contestant.size,
        "settings": contestant.settings,
        "packages": list(contestant.environment.packages),
        "build": contestant.environment.variables.get("CMAKE_ARGS", ""),
    }
