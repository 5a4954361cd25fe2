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

from bench.report import ROOT
from bench.serving import load, share, soak
from bench.serving.setting import Options
from bench.studies import Studies, Study, bundle_of

STUDIES = Studies(
    "serving",
    ROOT / "docs" / "serving.md",
    ROOT / "docs" / "images",
    {
        "load": Study(load.measure, load.text, load.brief),
        "share": Study(share.measure, share.text),
        "soak": Study(soak.measure, soak.text),
    },
)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.serving", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    STUDIES.add_arguments(parser)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=0, help="default: 3, with --quick 1")
    parser.add_argument("--minutes", type=float, default=0.0, help="of the soak; default: 60, with --quick 1")
    given = parser.parse_args()
    names = STUDIES.chosen(given)
    if given.write_only:
        for name in names:
            STUDIES.write(name)
        return
    quick = given.quick or given.tiny
    rounds = given.rounds or (1 if quick else 3)
    minutes = given.minutes or (0.2 if given.tiny else 1.0 if quick else 60.0)
    options = Options(bundle_of(given), given.threads, rounds, quick, tuple(given.peers or ()), given.tiny, minutes)
    STUDIES.take(names, options, {"threads": given.threads, "rounds": rounds}, tiny=given.tiny)


if __name__ == "__main__":
    main()
