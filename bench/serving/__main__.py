"""`edgeformer serve` measured: under load beside other servers, what HTTP takes, and an hour of mixed load.

    python -m bench.serving all                 three rounds, hours; the soak takes --minutes (60) of it
    python -m bench.serving all --quick         one round of few requests, a soak of one minute: ten minutes
    python -m bench.serving load share          only these; also soak
    python -m bench.serving all --write-only    the page again, from bench/results

Each study writes bench/results/serving-STUDY.json and its block of docs/serving.md, with a plot in docs/images. The
load client shares the machine's cores with the server: its own CPU is in the tables.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from bench.peers import models
from bench.report import ROOT, put, runs, save
from bench.serving import load, share, soak
from bench.serving.setting import Options

PAGE, IMAGES = ROOT / "docs" / "serving.md", ROOT / "docs" / "images"
STUDIES = {"load": load, "share": share, "soak": soak}  # each has measure(options) and text(saved, images)


def take(name: str, options: Options) -> dict[str, Any]:
    """A study's numbers, as they are saved without the machine."""
    began = time.monotonic()
    result = STUDIES[name].measure(options)
    print(f"{name}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    return {"threads": options.threads, "rounds": options.rounds, **result}


def write(name: str) -> None:
    """The block of a study, from its saved results, if there are any."""
    measured = runs(f"serving-{name}")
    if measured:
        put(PAGE, f"serving-{name}", STUDIES[name].text(measured[0], IMAGES))


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.serving", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("studies", nargs="*", default=["all"], choices=["all", *STUDIES])
    parser.add_argument("--bundle", type=Path, help="SmolLM2's bundle; exported to out/ where none is given")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=0, help="default: 3, with --quick 1")
    parser.add_argument("--minutes", type=float, default=0.0, help="of the soak; default: 60, with --quick 1")
    parser.add_argument("--peers", nargs="*", help="only the servers whose project and name contain one of these words")
    parser.add_argument("--quick", action="store_true", help="one round of few requests")
    parser.add_argument("--tiny", action="store_true", help="the least that runs everything; printed, not saved")
    parser.add_argument("--write-only", action="store_true", help="write the page again from the saved numbers")
    given = parser.parse_args()
    names = list(STUDIES) if "all" in given.studies else given.studies
    if given.write_only:
        for name in names:
            write(name)
        return
    quick = given.quick or given.tiny
    options = Options(
        (given.bundle or models.bundle("keep")).resolve(),
        given.threads,
        given.rounds or (1 if quick else 3),
        quick,
        tuple(given.peers or ()),
        given.tiny,
        given.minutes or (0.2 if given.tiny else 1.0 if quick else 60.0),
    )
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
            save(f"serving-{name}", result)
            write(name)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
