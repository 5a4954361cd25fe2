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

from bench.decoding import constraints, gap, peers, prefix, tasks, throughput
from bench.decoding.setting import Options
from bench.peers import pages
from bench.studies import Studies, Study, bundle_of

STUDIES = Studies(
    "decoding",
    pages.PAGE,
    pages.IMAGES,
    {
        "throughput": Study(throughput.measure, throughput.text),
        "gap": Study(gap.measure, gap.text, gap.brief, plotted=("timelines",)),
        "constraints": Study(constraints.measure, constraints.text),
        "prefix": Study(prefix.measure, prefix.text),
        "speculation": Study(tasks.measure, tasks.text, tasks.brief),
        "peers": Study(peers.measure, peers.text, peers.brief),
    },
)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.decoding", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    STUDIES.add_arguments(parser)
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--rounds", type=int, default=0, help="default: 5, with --quick 1")
    given = parser.parse_args()
    names = STUDIES.chosen(given)
    if given.write_only:
        for name in names:
            STUDIES.write(name)
        return
    quick = given.quick or given.tiny
    rounds = given.rounds or (1 if quick else 5)
    threads = tuple(int(count) for count in given.threads.split(","))
    options = Options(bundle_of(given), threads, rounds, quick, tuple(given.peers or ()), given.tiny)
    STUDIES.take(names, options, {"threads": list(threads), "rounds": rounds}, tiny=given.tiny)


if __name__ == "__main__":
    main()
