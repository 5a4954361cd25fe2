"""edgeformer against its peers, in one run on one machine.

python -m bench.peers                 sets everything up, measures, writes bench/results/peers.json and the pages
python -m bench.peers --quick         one round, disturbed or not, short tests; writes out/peers/quick-STUDY.json only
python -m bench.peers --write-only    the pages and plots again, from bench/results/peers.json
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from bench.peers import models, pages, quality, sizes, sizes_page, studies
from bench.peers.contestants import ALL, ALTERNATIVES, Contestant
from bench.peers.environments import SetupFailed
from bench.peers.field import Plan, set_up, take_rounds
from bench.peers.rounds import TurnFailed, say
from bench.report import compact, put, runs, save

SCORED = 8192  # tokens of text; the second half of each window counts
PROMPTS = 16384  # tokens of text that prompts are cut from


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.peers", description=__doc__.split("\n")[0])
    parser.add_argument("--peers", nargs="*", help="only those whose project and name contain one of these words")
    parser.add_argument("--study", choices=sorted(studies.ALL), default="main")
    parser.add_argument("--sizes", default=sizes.DEFAULT, help="for --study sizes: which models, of 0.5B, 1B and 3B")
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
    parser.add_argument("--only-prepare", action="store_true", help="environments and files, no measurement")
    parser.add_argument("--write-only", action="store_true", help="write the pages again from the saved numbers")
    options = parser.parse_args()
    study = studies.ALL[options.study]
    if options.write_only:
        for name in studies.ALL:
            write_study(studies.ALL[name])
        return
    words = [word.lower() for word in options.peers or [""]]
    rows = (*ALL, *ALTERNATIVES) if options.alternatives else ALL
    if study is studies.SIZES:
        rows = sizes.chosen(options.sizes)
    chosen = [c for c in rows if any(word in c.key.lower() for word in words)]
    if not chosen:
        raise SystemExit(f"no peer matches; there are {', '.join(c.key for c in rows)}")
    files, absent = set_up(chosen)
    if options.only_prepare:
        return
    chosen = [c for c in chosen if c.key in files]
    threads = [int(count) for count in options.threads.split(",")]
    wanted = 1 if options.quick else options.rounds
    keep = options.quick or options.keep_disturbed
    ids = quality.token_ids(PROMPTS)

    def job(number: int) -> dict[str, Any]:
        return {"context": study.context, "tests": study.of_round(ids, number, options.quick)}

    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        scores = study is studies.MAIN and not (options.quick or options.alternatives)
        qualities = measure_quality(chosen, absent, work) if scores else {}
        attempts = wanted if keep else options.attempts or 3 * wanted
        plan = Plan(threads, job, work, wanted, attempts, keep, study.busy)
        result = take_rounds(chosen, files, absent, plan)
    for contestant in chosen:
        result["contestants"][contestant.key] |= models.describe(files[contestant.key])
    result["quality"] = qualities
    if options.quick or options.alternatives:
        path = models.OUT / f"{'quick' if options.quick else 'alternatives'}-{study.name}.json"
        path.write_text(compact(result))
        print(pages.plain(result))
        return
    if not result["rounds"]["used"]:
        raise SystemExit(
            f"all {result['rounds']['taken']} rounds were disturbed; nothing is written. Try again on a quiet machine."
        )
    save(study.file, result)
    write_study(study)


def measure_quality(chosen: list[Contestant], absent: dict[str, str], work: Path) -> dict[str, Any]:
    """Quality by contestant, without the row of the public loop, which has its engine's quality."""
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


def write_study(study: studies.Study) -> None:
    """Writes the pages of a study from its saved results, if there are any."""
    measured = runs(study.file)
    if not measured:
        return
    saved = measured[0]
    if study is studies.MAIN:
        pages.write(saved)
    elif study is studies.SIZES:
        put(pages.PAGE, study.file, sizes_page.text(saved, pages.IMAGES))
    else:
        put(pages.PAGE, study.file, pages.curve(saved, study))


if __name__ == "__main__":
    main()
