"""How long sequences that decode wait for their next token while a long prompt runs beside them.

Seven answers are read in one event loop; once each has had some tokens, a prompt of 2,048 tokens is added. A delivery
is what one step brings to one answer: several tokens where drafts were right. Gaps are those between deliveries.
"""

from __future__ import annotations

import asyncio
import time
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from bench.decoding.setting import Options, Prompts, by_threads, note, summaries, threads_text, undisturbed, verdict
from bench.report import table

SEQUENCES, LONG = 7, 2048
BEFORE = 64  # tokens of each answer before the prompt arrives
TARGET = 3.0  # times the median gap before
SAME_STEP = 3e-4  # seconds: pieces of one step reach the loop together
Arrivals = list[list[float]]


def deliveries(times: list[float]) -> list[float]:
    """The times at which something came, without the further tokens of the same step."""
    found: list[float] = []
    for moment in times:
        if not found or moment - found[-1] > SAME_STEP:
            found.append(moment)
    return found


def gaps(arrivals: Arrivals, asked: float, answered: float) -> dict[str, float]:
    """{median_before, longest_before, longest, ratio}: seconds between deliveries before `asked`, and of those gaps
    that overlap the time from `asked` to `answered`, the first token of the long prompt.

    Raises:
        ValueError: no gap lies before `asked`, or none overlaps the time after it.
    """
    pairs = [pair for times in arrivals for pair in _pairs(deliveries(times))]
    before = [end - start for start, end in pairs if end <= asked]
    during = [end - start for start, end in pairs if end > asked and start < answered]
    if not before or not during:
        raise ValueError(f"{len(before)} gaps before the prompt, {len(during)} while it ran: there must be both")
    usual = median(before)
    return {
        "median_before": usual,
        "longest_before": max(before),
        "median": median(during),
        "longest": max(during),
        "ratio": max(during) / usual,
    }


def _pairs(times: list[float]) -> list[tuple[float, float]]:
    return list(pairwise(times))


def timeline(arrivals: Arrivals, asked: float, answered: float) -> list[tuple[float, float]]:
    """(seconds after `asked`, longest gap that ended then, ms) of each step, from a while before to a while after."""
    span = answered - asked
    low, high = asked - min(0.5 * span, 1.0), answered + min(0.5 * span, 1.0)
    ended: dict[int, float] = {}
    for times in arrivals:
        for start, end in _pairs(deliveries(times)):
            if low <= end <= high:
                place = round(end / SAME_STEP)
                ended[place] = max(ended.get(place, 0.0), end - start)
    return [(round(place * SAME_STEP - asked, 4), round(gap * 1e3, 3)) for place, gap in sorted(ended.items())]


async def play(model: Any, texts: Prompts, long: int, before: int, speculation: str) -> tuple[Arrivals, float, float]:
    """(arrival times of each of the seven, when the long prompt was added, when its first token came)."""
    arrivals: Arrivals = [[] for _ in range(SEQUENCES)]
    ready, over = asyncio.Event(), asyncio.Event()
    arguments = {"ignore_eos": True, "temperature": 0, "speculation": speculation}
    with model.scheduler(max_sequences=SEQUENCES + 1) as scheduler:

        async def read(place: int, answer: Any) -> None:
            async for _ in answer:
                arrivals[place].append(time.perf_counter())
                if min(map(len, arrivals)) >= before:
                    ready.set()
                if over.is_set():
                    return  # cancels the answer

        readers = [
            asyncio.create_task(read(i, scheduler.stream(texts.take(64), max_new_tokens=4000, **arguments)))
            for i in range(SEQUENCES)
        ]
        await ready.wait()
        asked = time.perf_counter()
        stream = scheduler.stream(texts.take(long), max_new_tokens=16, **arguments)
        first = 0.0
        async for _ in stream:
            first = first or time.perf_counter()
        over.set()
        await asyncio.gather(*readers)
    return arrivals, asked, first


def measure(options: Options) -> dict[str, Any]:
    """threads -> way of speculation -> summaries of gaps and of the long prompt's first token; one timeline each."""
    import edgeformer

    long, before = (256, 8) if options.tiny else (LONG, BEFORE)
    measured: dict[str, Any] = {}
    lines: dict[str, Any] = {}
    most = 0.0
    for threads in options.threads:
        model = edgeformer.load(options.bundle, "native", threads=threads, prefix_cache=False)
        texts = Prompts.of(model)
        model.generate(texts.take(long), max_new_tokens=1, speculation="off")  # warms up
        for way in ("off", "auto"):
            rounds = []
            for number in range(options.rounds + 1):
                began = time.perf_counter()
                model.generate(texts.take(long), max_new_tokens=1, ignore_eos=True, speculation="off")
                alone = time.perf_counter() - began
                (arrivals, asked, first), others = undisturbed(
                    lambda m=model, t=texts, w=way: asyncio.run(play(m, t, long, before, w)),  # type: ignore[misc]
                    1 if options.quick else 3,
                )
                if number == 0 and not options.tiny:
                    continue  # warms up
                rounds.append(gaps(arrivals, asked, first) | {"first": first - asked, "first_alone": alone})
                most = max(most, others)
                lines[f"{threads} {way}"] = timeline(arrivals, asked, first)
            measured.setdefault(str(threads), {})[way] = summaries(rounds)
    return {"long": long, "others": most, "measured": measured, "timelines": lines}


def text(saved: dict[str, Any], images: Path) -> str:
    """The table and the plot."""
    from bench.decoding import plots

    path = plots.gap(saved, images / "decoding-gap.png")
    return "\n\n".join(
        [
            f"{SEQUENCES} sequences decode, then a prompt of {saved['long']:,} tokens arrives. The longest gap between "
            f"tokens of the {SEQUENCES} shall be at most {TARGET:.0f} times the median gap before:",
            waits(saved),
            f"![Gaps between tokens](images/{path.name})",
            note(saved),
        ]
    )


def brief(saved: dict[str, Any]) -> str:
    """The table, and where and when."""
    return f"{waits(saved)}\n\n{note(saved)}"


def waits(saved: dict[str, Any]) -> str:
    """The gaps before the prompt and while it runs, and its own first token."""
    rows = []
    for threads in by_threads(saved):
        for way, found in saved["measured"][str(threads)].items():
            value = {name: one["median"] for name, one in found.items()}
            name = "with drafts" if way == "auto" else "no drafts"
            rows.append(
                [
                    f"{threads_text(threads)}, {name}",
                    f"{value['median_before'] * 1e3:.1f}",
                    f"{value['longest_before'] * 1e3:.1f}",
                    f"{value['median'] * 1e3:.1f}",
                    f"{value['longest'] * 1e3:.1f}",
                    f"x {value['ratio']:.2f}, {verdict(value['ratio'], TARGET, least=False)}",
                    f"{value['first']:.2f}",
                    f"{value['first_alone']:.2f}",
                ]
            )
    heads = ["", "median gap before, ms", "longest before", "median while it runs", "longest while it runs"]
    heads += ["longest over median before", "its first token, s", "alone, s"]
    return table(heads, rows)
