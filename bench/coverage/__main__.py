"""Which of transformers' causal language models can be exported and run: `python -m bench.coverage`.

Each architecture is built from its config class, tiny and with random weights, exported in float and with the default
options, run from the bundles on every engine, and compared with logits and greedy tokens of transformers. Each model
has a subprocess with a time limit. Results are saved in docs/coverage.json after each model, so that an interrupted run
continues. docs/coverage.md is written last.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from bench.coverage.models import names
from bench.coverage.page import page
from bench.coverage.sweep import PAGE, RESULTS, fine, sweep


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="model types; all by default")
    parser.add_argument("--limit", type=float, default=300, help="seconds for one model")
    parser.add_argument(
        "--redo", choices=("none", "failed", "old", "all"), default="none",
        help="examine these again; old: rows of another commit or transformers version",
    )  # fmt: skip
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    rows = sweep(options.names or names(), options.results, options.limit, options.redo)
    if options.results == RESULTS:
        PAGE.write_text(page(rows), encoding="utf-8")
    for name in options.names:
        print(name, json.dumps({k: v for k, v in rows[name].items() if k != "trace"}, indent=1))
    works = sum(row["status"] == "works" for row in rows.values())
    print(f"{works} of {len(rows)} work, in {sum(map(fine, rows.values()))} all is right")


if __name__ == "__main__":
    main()
