"""The decoding core measured: many sequences, long prompts beside them, constraints, cached beginnings, drafts, peers.

    python -m bench.decoding all                 every study: five rounds each, most of an hour
    python -m bench.decoding all --quick         one round of fewer cases: eight minutes; the pages say so
    python -m bench.decoding gap prefix          only these; also throughput, constraints, speculation, peers
    python -m bench.decoding all --write-only    the pages again, from bench/results

Each study writes bench/results/decoding-STUDY.json and its block of docs/performance.md, with a plot in docs/images.
`python -m bench.decoding.sampling` is beside them: what the choice of a token costs.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.decoding import constraints, gap, peers, prefix, tasks, throughput
from bench.decoding.setting import Options
from bench.peers import models, pages
from bench.report import put, runs, save


@dataclass(frozen=True)
class Study:
    """`measure` gives what is saved; `text` the block of the page, with its plots in the folder given."""

    measure: Callable[[Options], dict[str, Any]]
    text: Callable[[dict[str, Any], Path], str]


STUDIES = {
    "throughput": Study(throughput.measure, throughput.text),
    "gap": Study(gap.measure, gap.text),
    "constraints": Study(constraints.measure, constraints.text),
    "prefix": Study(prefix.measure, prefix.text),
    "speculation": Study(tasks.measure, tasks.text),
    "peers": Study(peers.measure, peers.text),
}


def take(name: str, options: Options) -> dict[str, Any]:
    """A study's numbers, as they are saved without the machine."""
    began = time.monotonic()
    result = STUDIES[name].measure(options)
    print(f"{name}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    return {"threads": list(options.threads), "rounds": options.rounds, **result}


def write(name: str) -> None:
    """The block of a study, from its saved results, if there are any."""
    measured = runs(f"decoding-{name}")
    if measured:
        put(pages.PAGE, f"decoding-{name}", STUDIES[name].text(measured[0], pages.IMAGES))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.decoding", description=__doc__.split("\n")[0])
    parser.add_argument("studies", nargs="+", choices=["all", *STUDIES])
    parser.add_argument("--bundle", type=Path, help="SmolLM2's bundle; exported to out/ where none is given")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--rounds", type=int, default=0, help="default: 5, with --quick 1")
    parser.add_argument("--peers", nargs="*", help="only those whose project and name contain one of these words")
    parser.add_argument("--quick", action="store_true", help="one round of fewer cases")
    parser.add_argument("--tiny", action="store_true", help="the least that runs everything; printed, not saved")
    parser.add_argument("--write-only", action="store_true", help="write the page again from the saved numbers")
    given = parser.parse_args()
    names = list(STUDIES) if "all" in given.studies else given.studies
    if given.write_only:
        for name in names:
            write(name)
        return
    quick = given.quick or given.tiny
    threads = tuple(int(count) for count in given.threads.split(","))
    bundle = (given.bundle or models.bundle("keep")).resolve()
    options = Options(bundle, threads, given.rounds or (1 if quick else 5), quick, tuple(given.peers or ()), given.tiny)
    failed = []
    for name in names:
        try:
            result = take(name, options)
        except (Exception, SystemExit) as error:  # the other studies go on
            if len(names) == 1:
                raise
            print(f"{name} failed: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            failed.append(name)
            continue
        if given.tiny:
            facts = {"cpu": "tiny", "system": "", "versions": {}, "date": ""}
            print(STUDIES[name].text({"machine": facts, **result}, models.OUT / "tiny-images"), flush=True)
        else:
            save(f"decoding-{name}", result)
            write(name)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
