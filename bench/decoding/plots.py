"""The plots of the decoding studies, each from one saved results file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.decoding.setting import LIMIT, by_threads, threads_text
from bench.peers.plots import COLORS, OTHER
from bench.peers.results import OURS, measured

WITHOUT, WITH = "#5d6d7e", COLORS[OURS]  # drafts


def throughput(saved: dict[str, Any], path: Path) -> Path:
    """Left: tokens a second against the number of sequences. Right: mean wait for the first token, and 90 %."""
    figure, (left, right) = _figure(10, 4.2, 2)
    for threads in by_threads(saved):
        dash = "-" if threads == max(saved["threads"]) else "--"
        for way, color in (("off", WITHOUT), ("auto", WITH)):
            found = saved["measured"][str(threads)].get(way, {})
            points = [(int(count), one["rate"]["median"]) for count, one in found.items()]
            name = f"{'with' if way == 'auto' else 'no'} drafts, {threads_text(threads)}"
            if points:
                left.plot(*zip(*points, strict=True), color=color, linestyle=dash, marker="o", markersize=4, label=name)
        found = saved["measured"][str(threads)]["off"]
        counts = [int(count) for count in found]
        mean, most = ([one[name]["median"] for one in found.values()] for name in ("first", "first_p90"))
        right.plot(counts, mean, color=WITHOUT, linestyle=dash, marker="o", markersize=4, label=threads_text(threads))
        right.fill_between(counts, mean, most, color=WITHOUT, alpha=0.15, linewidth=0)
    left.set_ylabel("tokens a second, all sequences")
    left.set_ylim(bottom=0)
    right.set_ylabel("first token, s: mean, up to the 90th percentile")
    right.set_ylim(bottom=0)
    for pane in (left, right):
        pane.set_xscale("log", base=2)
        pane.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        pane.set_xlabel("sequences that arrive together")
        pane.legend(fontsize=8, frameon=False)
    _title(figure, saved, "SmolLM2-135M, prompts of 16 to 512 tokens")
    return _save(figure, path)


def gap(saved: dict[str, Any], path: Path) -> Path:
    """Gaps between the tokens of sequences that decode, before, while and after a long prompt runs beside them."""
    names = list(saved["timelines"])
    figure, panes = _figure(10, 2.2 * len(names) + 0.6, 1, len(names))
    for pane, name in zip([panes] if len(names) == 1 else panes, names, strict=True):
        threads, way = name.split()
        found = saved["measured"][threads][way]
        usual, answered = found["median_before"]["median"] * 1e3, found["first"]["median"]
        points = saved["timelines"][name]
        pane.vlines([at for at, _ in points], 0, [high for _, high in points], color=WITH if way == "auto" else WITHOUT)
        pane.axvspan(0, answered, color="black", alpha=0.06, linewidth=0)
        pane.axhline(usual, color="black", linewidth=1)
        pane.axhline(3 * usual, color="black", linewidth=1, linestyle=":")
        after = [high for at, high in points if at > 0]
        pane.set_ylim(0, 1.05 * max([3 * usual, *after]))  # the prompts of the seven came together, long before
        pane.set_ylabel("gap, ms")
        pane.set_title(f"{threads_text(int(threads))}, {'with' if way == 'auto' else 'no'} drafts", fontsize=9)
    pane.set_xlabel("seconds after the prompt came; grey: until its first token; lines: median before, 3 times that")
    _title(figure, saved, f"A prompt of {saved['long']:,} tokens beside seven sequences")
    return _save(figure, path)


def tasks(saved: dict[str, Any], path: Path, free: tuple[str, ...], bar: float) -> Path:
    """Times as fast with drafts, by task."""
    most = str(max(saved["threads"]))
    kinds = sorted(saved["measured"][most], key=lambda kind: saved["measured"][most][kind]["times"])
    figure, pane = _figure(8, 0.5 * len(kinds) + 1.2)
    for place, kind in enumerate(kinds):
        value = saved["measured"][most][kind]["times"]
        pane.barh(place, value, color=WITHOUT if kind in free else WITH, height=0.6)
        pane.text(value, place, f" {value:.2f}", va="center", fontsize=8)
    pane.axvline(1.0, color="black", linewidth=1)
    pane.axvline(bar, color="black", linewidth=1, linestyle=":")
    pane.set_yticks(range(len(kinds)), kinds)
    pane.set_xlabel(f"times as fast as without drafts, {threads_text(int(most))}; dotted: the target for red bars")
    _title(figure, saved, "Prompt lookup, one sequence, greedy")
    return _save(figure, path)


def peers(saved: dict[str, Any], path: Path) -> Path:
    """Tokens a second of each file, a pane for each number of requests; most threads."""
    threads = max(saved["threads"])
    figure, panes = _figure(11, 0.4 * len(saved["measured"]) + 1.4, len(saved["counts"]))
    for pane, count in zip([panes] if len(saved["counts"]) == 1 else panes, saved["counts"], strict=True):
        found = [(key, measured(saved, key, threads, f"{count} requests")) for key in saved["measured"]]
        rows = sorted(((key, value) for key, value in found if value), key=lambda row: row[1])
        for place, (key, value) in enumerate(rows):
            pane.barh(place, value, color=COLORS.get(saved["contestants"][key]["project"], OTHER), height=0.7)
            pane.text(value, place, f" {value:,.0f}", va="center", fontsize=8)
        pane.set_yticks(range(len(rows)), [key for key, _ in rows], fontsize=7)
        pane.set_xlabel(f"tokens a second, {count} requests, {threads_text(threads)}")
        pane.margins(x=0.12)
    _title(figure, saved, "SmolLM2-135M, prompts of 16 to 512 tokens and 64 new ones each")
    return _save(figure, path)


def _figure(width: float, height: float, columns: int = 1, rows: int = 1) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as pyplot

    figure, panes = pyplot.subplots(rows, columns, figsize=(width, height), dpi=110)
    for pane in figure.axes:
        pane.spines[["top", "right"]].set_visible(False)
    return figure, panes


def _title(figure: Any, saved: dict[str, Any], text: str) -> None:
    disturbed = saved.get("others", 0.0) > LIMIT or not saved.get("undisturbed", True)
    figure.suptitle(f"{text} (DISTURBED)" if disturbed else text, fontsize=10)


def _save(figure: Any, path: Path) -> Path:
    import matplotlib.pyplot as pyplot

    path.parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)
    return path
