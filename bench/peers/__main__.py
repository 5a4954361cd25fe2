"""edgeformer against its peers, in one run on one machine.

python -m bench.peers                 sets everything up, measures, writes bench/results/peers.json and the pages
python -m bench.peers --quick         one round, disturbed or not, short tests; writes out/peers/quick-STUDY.json only
python -m bench.peers --write-only    the pages and plots again, from bench/results/peers.json
"""

from __future__ import annotations

import argparse
import functools
import json
import tempfile
from pathlib import Path
from typing import Any

from bench.peers import models, pages, quality, studies
from bench.peers.contestants import ALL, ALTERNATIVES, Contestant
from bench.peers.environments import SetupFailed
from bench.peers.rounds import LIMIT, TRIES, Round, TurnFailed, quiet, say, settle, take_turn, worker
from bench.report import save

SCORED = 8192  # tokens of text; the second half of each window counts
PATIENCE = 600.0  # seconds to wait for a quiet moment before a turn
PROMPTS = 16384  # tokens of text that prompts are cut from


def read_speed(threads: int) -> dict[str, float]:
    """GB/s of a plain read of 256 MiB, more than the caches of one socket's share hold; the best of five."""
    from bench.peers.runners.measure import Others
    from edgeformer import _native  # type: ignore[attr-defined]

    others = Others()
    size = 1 << 28
    best = max(size / _native.testing.memory_read(threads, size) / 1e9 for _ in range(5))
    return {"gb_s": best, "others": others.cores()}


def warm(path: Path) -> None:
    """Reads a model's files once, so that loads come from the page cache for everybody."""
    for file in [path] if path.is_file() else path.rglob("*"):
        if file.is_file():
            file.read_bytes()


def set_up(chosen: list[Contestant]) -> tuple[dict[str, Path], dict[str, str]]:
    """Makes environments and files; (files by contestant, why by contestant that cannot take part)."""
    files, absent = {}, {}
    for contestant in chosen:
        try:
            for environment in (contestant.environment, *contestant.needs):
                environment.make(models.LOGS / f"pip-{environment.name}.log")
            files[contestant.key] = contestant.file()
        except SetupFailed as error:
            absent[contestant.key] = str(error)
            say(f"{contestant.key}: {error}")
    return files, absent


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.peers", description=__doc__.split("\n")[0])
    parser.add_argument("--peers", nargs="*", help="only those whose project and name contain one of these words")
    parser.add_argument("--study", choices=sorted(studies.ALL), default="main")
    parser.add_argument("--rounds", type=int, default=5, help="undisturbed rounds to take")
    parser.add_argument("--attempts", type=int, default=0, help="rounds to try for that; default: three times as many")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--quick", action="store_true", help="one short round; nothing but out/peers is written")
    parser.add_argument(
        "--keep-disturbed", action="store_true", help="use disturbed rounds too, and say so in the page"
    )
    parser.add_argument(
        "--alternatives", action="store_true", help="with other settings of the peers, not for the pages"
    )
    parser.add_argument("--write-only", action="store_true", help="write the pages again from the saved numbers")
    options = parser.parse_args()
    study = studies.ALL[options.study]
    if options.write_only:
        for name in studies.ALL:
            pages.write_study(studies.ALL[name])
        return
    words = [word.lower() for word in options.peers or [""]]
    rows = (*ALL, *ALTERNATIVES) if options.alternatives else ALL
    chosen = [c for c in rows if any(word in c.key.lower() for word in words)]
    if not chosen:
        raise SystemExit(f"no peer matches; there are {', '.join(c.key for c in rows)}")
    files, absent = set_up(chosen)
    chosen = [c for c in chosen if c.key in files]
    threads = [int(count) for count in options.threads.split(",")]
    wanted, rounds = (1 if options.quick else options.rounds), []
    keep = options.quick or options.keep_disturbed
    ids = quality.token_ids(PROMPTS)

    def job(number: int) -> dict[str, Any]:
        return {"context": study.context, "tests": study.of_round(ids, number, options.quick)}

    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        scores = study is studies.MAIN and not (options.quick or options.alternatives)
        qualities = measure_quality(chosen, absent, work) if scores else {}
        attempts = wanted if keep else options.attempts or 3 * wanted
        while len(rounds) < attempts and len(rounds if keep else quiet(rounds)) < wanted:
            rounds.append(take_round(chosen, files, absent, threads, job(len(rounds)), work, keep, study.busy))
            for line in rounds[-1].disturbed:
                say(f"round {len(rounds)}: {line} (the limit is {LIMIT})")
    used = rounds if keep else quiet(rounds)
    result = {
        "threads": threads,
        "rounds": {"taken": len(rounds), "used": len(used), "disturbed": [one.disturbed for one in rounds]},
        "undisturbed": not any(one.disturbed for one in used) and bool(used),
        "limit_cores_of_others": LIMIT,
        "contestants": {c.key: facts(c, files[c.key]) for c in chosen if c.key in files},
        "absent": absent,
        "quality": qualities,
        "memory": {str(n): [one.memory[n] for one in used] for n in threads},
        "measured": pages.collect(used, chosen, threads),
    }
    if options.quick or options.alternatives:
        path = models.OUT / f"{'quick' if options.quick else 'alternatives'}-{study.name}.json"
        path.write_text(json.dumps(result, indent=1))
        print(pages.plain(result))
        return
    if not used:
        raise SystemExit(f"all {len(rounds)} rounds were disturbed; nothing is written. Try again on a quiet machine.")
    save(study.file, result)
    pages.write_study(study)


def measure_quality(chosen: list[Contestant], absent: dict[str, str], work: Path) -> dict[str, Any]:
    """Quality by contestant; the public loop has its engine's."""
    found = {}
    for contestant in chosen:
        if contestant.options.get("loop") == "stream":
            continue
        try:
            found[contestant.key] = quality.of(contestant, SCORED, work)
        except (TurnFailed, SetupFailed) as error:
            absent[f"{contestant.key}: quality"] = str(error)
            say(f"quality of {contestant.key}: {error}")
    return found


def take_round(
    chosen: list[Contestant],
    files: dict[str, Path],
    absent: dict[str, str],
    threads: list[int],
    what: dict[str, Any],
    work: Path,
    keep: bool,
    busy: int = 0,
) -> Round:
    """One turn of everybody at every number of threads, beside `busy` processes that only burn time.

    Whoever fails is absent from then on, with the reason.
    """
    one = Round(memory={count: read_speed(count) for count in threads})
    for count in threads:
        for contestant in chosen:
            if contestant.key in absent:
                continue
            file = files[contestant.key]
            warm(file)
            job = {"file": str(file), "threads": count, "options": contestant.options, **what}
            measure = functools.partial(worker, contestant, job, work)
            try:
                if keep:
                    turn = take_turn(measure, contestant.key, count, 1, busy)
                else:
                    turn = take_turn(measure, contestant.key, count, TRIES, busy, lambda: settle(PATIENCE))
            except TurnFailed as error:
                absent[contestant.key] = str(error)
                say(f"{contestant.key}: {error}")
                continue
            one.turns.append(turn)
            shown = {name: round(test["value"], 3) for name, test in turn.result["tests"].items() if "value" in test}
            say(f"{contestant.key}, {count} threads: {shown} (others {turn.others:.2f} cores)")
            if turn.disturbed and not keep:
                return one  # it will be rejected: the rest of it is not worth the time
    return one


def facts(contestant: Contestant, file: Path) -> dict[str, Any]:
    """What a contestant is: its project, file and settings."""
    return {
        "project": contestant.project,
        "name": contestant.name,
        "settings": contestant.settings,
        "packages": list(contestant.environment.packages),
        "build": contestant.environment.variables.get("CMAKE_ARGS", ""),
        **models.describe(file),
    }


if __name__ == "__main__":
    main()
