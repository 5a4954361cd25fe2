"""Speculation by task, as `bench.decoding.speculation` measures it: a table and a plot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.decoding.setting import Options, by_threads, note, threads_text, undisturbed, verdict
from bench.report import table

WIN, LOSS = 2.0, 0.98  # times as fast: where the answer repeats the prompt, and elsewhere
FREE = ("story",)  # kinds whose answers repeat nothing


def measure(options: Options) -> dict[str, Any]:
    """threads -> kind -> {times, lowest, accepted, plain tokens/s, tokens/s}."""
    import edgeformer
    from bench.decoding import speculation

    measured, most = {}, 0.0
    for threads in options.threads:
        model = edgeformer.load(options.bundle, "native", threads=threads)
        answers, others = undisturbed(lambda m=model: speculation.measure(m, "lookup", options.rounds), 1)  # type: ignore[misc]
        measured[str(threads)] = speculation.by_kind(answers)
        most = max(most, others)
    return {"others": most, "measured": measured}


def text(saved: dict[str, Any], images: Path) -> str:
    """The table and the plot."""
    from bench.decoding import plots

    path = plots.tasks(saved, images / "decoding-speculation.png", FREE, WIN)
    return "\n\n".join(
        [
            "One sequence, greedy, prompt lookup against none, in pairs; the tokens are equal.",
            times(saved),
            f"![Speculation by task](images/{path.name})",
            note(saved),
        ]
    )


def brief(saved: dict[str, Any]) -> str:
    """The table, and where and when."""
    return f"{times(saved)}\n\n{note(saved)}"


def times(saved: dict[str, Any]) -> str:
    """How many times as fast answers are with drafts, by task."""
    rows = []
    for threads in by_threads(saved):
        for kind, value in saved["measured"][str(threads)].items():
            bar = LOSS if kind in FREE else WIN
            rows.append(
                [
                    f"{kind}, {threads_text(threads)}",
                    f"{value['plain tokens/s']:.0f}",
                    f"{value['tokens/s']:.0f}",
                    f"x {value['times']:.2f}, {verdict(value['times'], bar, least=True)} ({bar})",
                    f"x {value['lowest']:.2f}",
                    f"{value['accepted']:.0%}",
                ]
            )
    heads = ["", "tokens/s without drafts", "with drafts", "times (at least)", "slowest answer", "drafts accepted"]
    return table(heads, rows)
