"""The plots, each from one saved results file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.peers.results import OURS, limit, measured, ratio, share

COLORS = {
    "edgeformer": "#c0392b",
    "llama.cpp": "#5d6d7e",
    "onnxruntime-genai": "#2e86c1",
    "OpenVINO GenAI": "#7d6608",
    "CTranslate2": "#239b56",
}
OTHER = "#999999"


def draw(saved: dict[str, Any], folder: Path) -> list[tuple[str, Path]]:
    """Writes the plots of `saved` and returns (title, path)."""
    import matplotlib

    matplotlib.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    mark = "" if saved["undisturbed"] else " (DISTURBED)"
    found = [
        (f"Decoding, tokens a second{mark}", _bars(saved, folder / "peers-decode.png", "decode", mark)),
        (f"Prompt, tokens a second{mark}", _bars(saved, folder / "peers-prefill.png", "prefill512", mark)),
        (f"Share of the memory limit against quality{mark}", _share(saved, folder / "peers-limit.png", mark)),
    ]
    return found


def lines(saved: dict[str, Any], path: Path, prefix: str, axis: str, title: str) -> Path:
    """A study: tokens a second of the tests PREFIX<number>, with the most threads, one line a contestant."""
    figure, plot = _figure(9.5, 4.5)  # the legend stands beside the lines
    threads = str(max(saved["threads"]))
    for key, found in saved["measured"].items():
        tests = found.get(threads, {})
        points = sorted(
            (int(name.removeprefix(prefix)), test["median"]) for name, test in tests.items() if name.startswith(prefix)
        )
        if points:
            ours = key.startswith(OURS)
            style = {"color": _color(saved, key), "linewidth": 2.5 if ours else 1.2, "marker": "o", "markersize": 4}
            plot.plot(*zip(*points, strict=True), label=key, linestyle=_dash(saved, key), **style)
    plot.set_xscale("log", base=2)
    plot.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    plot.set_ylim(bottom=0)
    plot.set_xlabel(axis)
    plot.set_ylabel("tokens a second")
    plot.set_title(title if saved["undisturbed"] else f"{title} (DISTURBED)")
    plot.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False)
    return _save(figure, path)


def sizes(saved: dict[str, Any], path: Path, parameters: dict[str, float]) -> Path:
    """Tokens a second against billions of parameters, with the most threads: decoding and a prompt of 512.

    One line a file; `parameters` by the name of the size that contestants have. Black: what the memory allows the file
    of ours with the fewest bytes.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as pyplot
    from matplotlib.ticker import FuncFormatter

    figure, panes = pyplot.subplots(1, 2, figsize=(10, 4.3), dpi=110)
    threads = max(saved["threads"])
    kinds = list(dict.fromkeys((c["project"], c["name"]) for c in saved["contestants"].values()))
    for pane, test, title in zip(panes, ("decode", "prefill512"), ("decoding", "a prompt of 512"), strict=True):
        for project, name in kinds:
            points = []
            for key, about in saved["contestants"].items():
                value = measured(saved, key, threads, test)
                if (about["project"], about["name"]) == (project, name) and value:
                    points.append((parameters[about["size"]], value))
            same = [n for p, n in kinds if p == project]
            style = {"color": COLORS.get(project, OTHER), "linewidth": 2.5 if project == OURS else 1.2}
            dash = ("-", "--", ":", "-.")[same.index(name) % 4]
            if points:
                pane.plot(
                    *zip(*sorted(points), strict=True), marker="o", linestyle=dash, label=f"{project} {name}", **style
                )
        if test == "decode":
            bounds: dict[float, float] = {}
            for key, about in saved["contestants"].items():
                bound = limit(saved, key, threads)
                if about["project"] == OURS and bound:
                    size = parameters[about["size"]]
                    bounds[size] = max(bound, bounds.get(size, 0.0))
            if bounds:
                pane.plot(
                    *zip(*sorted(bounds.items()), strict=True), color="black", linestyle=":", label="memory limit"
                )
        pane.set_xscale("log")
        pane.set_yscale("log")
        pane.set_xticks(list(parameters.values()), list(parameters), minor=False)
        pane.set_xticks([], minor=True)
        plain = FuncFormatter(lambda value, _: f"{value:,.0f}")
        pane.yaxis.set_major_formatter(plain)
        pane.yaxis.set_minor_formatter(plain)
        pane.tick_params(axis="y", which="both", labelsize=8)
        pane.set_ylabel(f"tokens a second, {threads} threads")
        pane.set_title(title if saved["undisturbed"] else f"{title} (DISTURBED)", fontsize=10)
        pane.spines[["top", "right"]].set_visible(False)
    panes[0].legend(fontsize=6)
    return _save(figure, path)


def _bars(saved: dict[str, Any], path: Path, test: str, mark: str) -> Path:
    most, *rest = sorted(saved["threads"], reverse=True)
    got = [(key, measured(saved, key, most, test)) for key in saved["measured"] if "model.stream" not in key]
    rows = sorted(((key, value) for key, value in got if value), key=lambda row: row[1])
    figure, plot = _figure(8, 0.42 * len(rows) + 1.2)
    for place, (key, value) in enumerate(rows):
        plot.barh(place, value, color=_color(saved, key), height=0.7)
        single = measured(saved, key, rest[0], test) if rest else None
        if single:
            plot.plot([single, single], [place - 0.35, place + 0.35], color="white", linewidth=2)
        bound = limit(saved, key, most)
        if test == "decode" and bound:
            plot.plot([bound, bound], [place - 0.35, place + 0.35], color="black", linewidth=1.5, linestyle=":")
        plot.text(value, place, f" {value:.0f}", va="center", fontsize=8)
    plot.set_yticks(range(len(rows)), [_label(saved, key) for key, _ in rows], fontsize=8)
    what = "decoding after a 32-token prompt" if test == "decode" else "prompt of 512 tokens"
    dotted = "; dotted: the memory limit" if test == "decode" else ""
    plot.set_xlabel(f"tokens a second, {most} threads; white line: 1 thread{dotted}")
    plot.set_title(f"SmolLM2-135M, {what}{mark}", fontsize=10)
    return _save(figure, path)


def _share(saved: dict[str, Any], path: Path, mark: str) -> Path:
    most = max(saved["threads"])
    figure, plot = _figure(8, 4.8)
    points = []
    for key in saved["measured"]:
        reached, quality = share(saved, key, most), saved["quality"].get(key)
        if reached and quality:
            points.append((reached, max(quality["mean_kl"], 1e-4), key))
    named: list[tuple[float, float]] = []
    for height, lost, key in sorted(points):
        plot.scatter(lost, height, color=_color(saved, key), s=45)
        beside = [other / lost for level, other, name in points if name != key and abs(level - height) < 0.055]
        if any(1 < times < 5 for times in beside) and not any(0.2 < times <= 1 for times in beside):
            plot.annotate(key, (lost, height), fontsize=7, xytext=(-6, -2), textcoords="offset points", ha="right")
            continue
        near = [taken + 0.045 for other, taken in named if 0.2 < other / lost < 5 and height < taken + 0.045]
        place = max([height, *near])  # names that would lie on one another go up
        named.append((lost, place))
        plot.annotate(key, (lost, place), fontsize=7, xytext=(6, -2), textcoords="offset points")
    plot.axhline(1.0, color="black", linestyle=":", linewidth=1)
    plot.set_xscale("log")
    losses = [lost for _, lost, _ in points] or [1.0]
    plot.set_xlim(min(losses) / 4, max(losses) * 6)  # room for the names
    plot.set_ylim(0, max(1.0, *(height for height, _, _ in points)) * 1.08 if points else 1.0)
    plot.set_xlabel("mean KL divergence from the float model, nats")
    plot.set_ylabel("decoding, share of the memory limit")
    plot.set_title(f"What is read, and what is lost{mark}", fontsize=10)
    return _save(figure, path)


def _label(saved: dict[str, Any], key: str) -> str:
    lost = ratio(saved, key)
    return f"{key}\nperplexity x {lost:.3f}" if lost else key


def _color(saved: dict[str, Any], key: str) -> str:
    return COLORS.get(saved["contestants"][key]["project"], OTHER)


def _dash(saved: dict[str, Any], key: str) -> str:
    project = saved["contestants"][key]["project"]
    same = [k for k, found in saved["contestants"].items() if found["project"] == project]
    return ("-", "--", ":", "-.")[same.index(key) % 4]


def _figure(width: float, height: float) -> tuple[Any, Any]:
    import matplotlib.pyplot as pyplot

    figure, plot = pyplot.subplots(figsize=(width, height), dpi=110)
    plot.spines[["top", "right"]].set_visible(False)
    return figure, plot


def _save(figure: Any, path: Path) -> Path:
    import matplotlib.pyplot as pyplot

    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)
    return path
