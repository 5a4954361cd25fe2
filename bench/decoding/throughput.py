"""Tokens a second of all answers, and the wait for the first token, against the number of sequences.

All requests of a wave are added to `model.scheduler(max_sequences=count)` at once; the time runs from the first `add`
to the last token, so the prompts are in it.
"""

from __future__ import annotations

import time
from pathlib import Path
from statistics import fmean
from typing import Any

from bench.decoding.setting import (
    NEW,
    Options,
    Prompts,
    by_threads,
    note,
    order_text,
    percentile,
    summaries,
    undisturbed,
)
from bench.peers.results import both
from bench.report import table

COUNTS = (1, 2, 4, 8, 16, 32, 64)
LEAST = 8  # sequences of a round: few at once run in several waves
WAYS = {"off": "no drafts", "auto": "with drafts", "list": "generate(list)"}


def wave(model: Any, prompts: list[list[int]], way: str, new: int = NEW) -> dict[str, float]:
    """One wave of requests: {rate: new tokens a second, first, first_p90: seconds}. `way`: see WAYS."""
    arguments = {"max_new_tokens": new, "ignore_eos": True, "temperature": 0}
    began = time.perf_counter()
    if way == "list":
        results = [one.answers()[0] for one in model.generate_each(
            prompts, max_sequences=len(prompts), speculation="off", **arguments)]  # fmt: skip
    else:
        with model.scheduler(max_sequences=len(prompts)) as scheduler:
            answers = [scheduler.add(ids, speculation=way, **arguments) for ids in prompts]
            results = [answer.result() for answer in answers]
    seconds = time.perf_counter() - began
    waits = [one.timings.queue_seconds + one.timings.first_token_seconds for one in results]
    if any(one.timings.new_tokens != new for one in results):
        raise RuntimeError(f"an answer has another number of tokens than {new}")
    return {"rate": new * len(prompts) / seconds, "first": fmean(waits), "first_p90": percentile(waits, 0.9)}


def round_of(model: Any, texts: Prompts, count: int, way: str, new: int = NEW) -> dict[str, float]:
    """The means over as many waves as give `LEAST` answers."""
    waves = [wave(model, texts.mixed(count), way, new) for _ in range(max(1, LEAST // count))]
    return {name: fmean(one[name] for one in waves) for name in waves[0]}


def measure(options: Options) -> dict[str, Any]:
    """threads -> way -> count -> summaries of rate, first and first_p90."""
    import edgeformer

    counts = (1, 2) if options.tiny else COUNTS
    new = 4 if options.tiny else NEW
    ways = ("off", "auto") if options.quick else tuple(WAYS)
    measured: dict[str, Any] = {}
    most = 0.0
    for threads in options.threads:
        model = edgeformer.load(options.bundle, "native", threads=threads, prefix_cache=False)
        texts = Prompts.of(model)
        wave(model, texts.mixed(2), "off", new)  # warms up
        for way in ways:
            for count in counts:
                rounds = []
                for _ in range(options.rounds):
                    found, others = undisturbed(
                        lambda m=model, t=texts, c=count, w=way: round_of(m, t, c, w, new),  # type: ignore[misc]
                        1 if options.quick else 3,
                    )
                    rounds.append(found)
                    most = max(most, others)
                measured.setdefault(str(threads), {}).setdefault(way, {})[str(count)] = summaries(rounds)
    return {"counts": counts, "new": new, "others": most, "measured": measured}


def value(saved: dict[str, Any], threads: int, way: str, count: int, name: str) -> float | None:
    """A median, or None."""
    found: float | None = (
        saved["measured"].get(str(threads), {}).get(way, {}).get(str(count), {}).get(name, {}).get("median")
    )
    return found


def text(saved: dict[str, Any], images: Path) -> str:
    """The table and the plot."""
    from bench.decoding import plots

    order = list(by_threads(saved))
    ways = [way for way in WAYS if way in saved["measured"][str(order[0])]]
    heads = ["sequences", *(f"tokens/s, {WAYS[way]}" for way in ways), "first token, mean, s", "90 % within, s"]
    rows = []
    for count in saved["counts"]:
        cells = [both([value(saved, t, way, count, "rate") for t in order], 0) for way in ways]
        cells += [both([value(saved, t, "off", count, name) for t in order], 3) for name in ("first", "first_p90")]
        rows.append([str(count), *cells])
    path = plots.throughput(saved, images / "decoding-throughput.png")
    gains = []
    for threads in order:
        one, many = (value(saved, threads, "off", n, "rate") for n in (saved["counts"][0], saved["counts"][-1]))
        if one and many:
            gains.append(f"x {many / one:.1f} with {threads} thread{'s' * (threads > 1)}")
    return "\n\n".join(
        [
            f"{order_text(saved)}; {saved['new']} new tokens each.",
            table(heads, rows),
            f"{saved['counts'][-1]} sequences together over one alone: {', '.join(gains)}.",
            f"![Throughput and first token](images/{path.name})",
            note(saved),
        ]
    )
