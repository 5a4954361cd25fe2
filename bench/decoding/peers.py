"""The same requests of mixed lengths on edgeformer and its peers, 8 and 16 at once, in rounds of fresh processes.

Runners, environments, files and rounds are those of bench.peers; see there. Each runner has `answer`: all requests are
handed over together, the project's own scheduler does the rest, and each new token's time is noted. The rate is that of
all new tokens over the time from the first request to the last token, prompts included.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.decoding.setting import NEW, Options, by_threads, mixed_lengths, order_text, threads_text
from bench.peers import models, pages, quality, results
from bench.peers.contestants import ALL, Contestant
from bench.peers.field import Plan, set_up, take_rounds
from bench.report import runs, table

COUNTS = (8, 16)
TARGET = 2.5  # times the fastest peer of the class
CONTEXT = 1 << 10  # tokens of the longest prompt and its answer, rounded up
DRAFTS = "keep, with drafts"
QUICK = ("keep (the GGUF's blocks)", DRAFTS, "Q8_0", "int8")  # names of the files that --quick takes


def contestants(quick: bool) -> list[Contestant]:
    """Those of bench.peers that serve several requests, and ours with drafts as its default has them."""
    found = []
    for one in ALL:
        if one.options.get("loop") == "stream":
            drafts = {"loop": "scheduler", "speculation": "auto"}
            found.append(replace(one, name=DRAFTS, options=drafts, settings="the same with the default: prompt lookup"))
        elif one.project == results.OURS:
            settings = f"{one.settings}; model.scheduler(stretch=None), as generate() runs a list; no drafts"
            found.append(replace(one, options={"loop": "scheduler", "speculation": "off"}, settings=settings))
        elif one.quality_file is not None:  # onnxruntime-genai: its Engine needs all logits
            settings = f"{one.settings.replace(', last-token head', '')}; its Engine, static batching, all logits"
            found.append(replace(one, file=one.quality_file, options={"batch": max(COUNTS)}, settings=settings))
        elif one.project != "CTranslate2":  # its generate_batch takes no request while it runs, and is the slowest
            found.append(one)
    return [one for one in found if not quick or one.name in QUICK]


def tests(ids: list[int], number: int, options: Options) -> list[dict[str, Any]]:
    """The requests of round `number`; no two prompts of a process begin alike."""
    places = _places(ids, number)
    new = 4 if options.tiny else NEW
    repeated = 1 if options.quick else 3

    def prompts(count: int) -> list[list[int]]:
        found = []
        for length in mixed_lengths(count):
            place = next(places)
            found.append(ids[place : place + length])
        return found

    return [
        {"name": f"{count} requests", "kind": "requests", "runs": [prompts(count) for _ in range(repeated)], "new": new}
        for count in ((2, 3) if options.tiny else COUNTS)
    ]


def _places(ids: list[int], number: int) -> Iterator[int]:
    end = len(ids) - CONTEXT
    for i in range(end):
        yield (number * 37 + i * 577) % end


def measure(options: Options) -> dict[str, Any]:
    """As `bench.peers` saves it; tests are "8 requests" (tokens a second) and "8 requests, first" (mean seconds)."""
    words = [word.lower() for word in options.peers or ("",)]
    chosen = [one for one in contestants(options.quick) if any(word in one.key.lower() for word in words)]
    files, absent = set_up(chosen)
    chosen = [one for one in chosen if one.key in files]
    ids = quality.token_ids(16384)

    def job(number: int) -> dict[str, Any]:
        return {"context": CONTEXT, "tests": tests(ids, number, options)}

    with tempfile.TemporaryDirectory() as folder:
        attempts = options.rounds if options.quick else 3 * options.rounds
        plan = Plan(list(options.threads), job, Path(folder), options.rounds, attempts, options.quick)
        result = take_rounds(chosen, files, absent, plan)
    if not result["rounds"]["used"]:
        raise SystemExit("all rounds were disturbed; nothing is written. Try again on a quiet machine.")
    for one in chosen:
        result["contestants"][one.key]["file_bytes"] = models.file_bytes(files[one.key])
    saved = runs("peers")
    result["quality"] = saved[0]["quality"] if saved else {}
    ours = next((key for key in result["quality"] if key == f"{results.OURS} {results.ENGINE}"), None)
    if ours is not None:
        result["quality"][f"{results.OURS} {DRAFTS}"] = result["quality"][ours]  # drafts change no token
    result["counts"] = list((2, 3) if options.tiny else COUNTS)
    return result


def text(saved: dict[str, Any], images: Path) -> str:
    """The tables and the plot."""
    from bench.decoding import plots

    order = list(by_threads(saved))
    names = [f"{count} requests" for count in saved["counts"]]
    heads = ["", *(f"{name}, tokens/s" for name in names), *(f"{name}, first token, s" for name in names)]
    rows = []
    for group, keys in results.classes(saved).items():
        if keys:
            rows.append([f"**{group}**", *[""] * (len(heads) - 1)])
        for key in sorted(keys, key=lambda k: (not k.startswith(results.OURS), k)):
            shown = f"**{key}**" if key.startswith(results.OURS) else key
            cells = []
            for digits, tests_shown in ((0, names), (2, [f"{name}, first" for name in names])):
                for test in tests_shown:
                    cells.append(results.both([results.measured(saved, key, t, test) for t in order], digits))
            rows.append([shown, *cells])
    path = plots.peers(saved, images / "decoding-peers.png")
    parts = [
        pages.conditions(saved),
        f"Tokens a second of all requests together, prompts of 16 to 512 tokens included; {order_text(saved)}.",
        table(heads, rows),
        f"Over the fastest peer of the class, target {TARGET} (a file that loses more than 1 %: of all):",
        ratios(saved),
        f"![Requests of mixed lengths](images/{path.name})",
        pages.settings(saved),
    ]
    return "\n\n".join(part for part in parts if part)


def brief(saved: dict[str, Any]) -> str:
    """The ratios, and where and when."""
    return f"{pages.conditions(saved)}\n\n{ratios(saved)}"


def ratios(saved: dict[str, Any]) -> str:
    """How many times as fast as the fastest peer: a row for each of our files and number of requests."""
    rows = []
    for key, field in results.compared(saved):
        for count in saved["counts"]:
            cells = []
            for threads in by_threads(saved):
                found = results.times_best(saved, key, field, threads, f"{count} requests")
                if found is None:
                    cells.append("")
                    continue
                times, own, best, whose = found
                less = "" if times >= TARGET else " (less)"
                cells.append(f"**x {times:.2f}**{less} ({own:,.0f} : {best:,.0f}, {whose})")
            rows.append([key, str(count), *cells])
    return table(["file", "requests", *map(threads_text, by_threads(saved))], rows)
