"""The pictures of docs/serving.md, each from one saved results file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.decoding.plots import _figure, _save, _title
from bench.peers.plots import COLORS, OTHER

OURS = "edgeformer"
PROJECTS = {"llama-server": "llama.cpp", "onnx-genai-server": "onnxruntime-genai"}  # names in bench.peers


def color(project: str) -> str:
    return COLORS.get(PROJECTS.get(project, project), OTHER)


def load(saved: dict[str, Any], path: Path) -> Path:
    """Three panes against the number of clients: tokens a second, first token p95, longest gap p99."""
    figure, panes = _figure(12, 4.2, 3)
    shown = (
        ("rate", "tokens a second", 1.0),
        ("first_p95", "time to the first token, p95, s", 1.0),
        ("gap_longest_p99", "longest gap of an answer, p99, ms", 1e3),
    )
    for pane, (name, label, scale) in zip(panes, shown, strict=True):
        for key, found in saved["measured"].items():
            points = [
                (int(case.split()[0]), one[name]["median"] * scale)
                for case, one in found.items()
                if "clients" in case and name in one
            ]
            if points:
                dash = "--" if "no drafts" in key else "-"
                pane.plot(*zip(*points, strict=True), color=color(saved["projects"][key]), linestyle=dash, marker="o",
                          markersize=4, label=key)  # fmt: skip
        pane.set_xscale("log", base=2)
        pane.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        pane.set_xlabel("clients")
        pane.set_ylabel(label)
        if name == "rate":
            pane.set_ylim(bottom=0)
        elif pane.lines:
            pane.set_yscale("log")
            pane.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    panes[0].legend(fontsize=7, frameon=False)
    _title(figure, saved, f"SmolLM2-135M over HTTP, prompts of 32 to 1,024 tokens, answers of {saved['new']}")
    return _save(figure, path)


def memory(saved: dict[str, Any], path: Path) -> Path:
    """Memory of the server's first process against time."""
    figure, pane = _figure(8, 3.0)
    if saved["samples"]:
        seconds, mib, _ = zip(*saved["samples"], strict=True)
        pane.plot(seconds, mib, color=COLORS[OURS])
        pane.axvline(saved["warm_seconds"], color="black", linewidth=1, linestyle=":")
    pane.axhline(saved["warm_mib"], color="black", linewidth=1, linestyle=":")
    pane.set_ylim(bottom=0)
    pane.set_xlabel("seconds; dotted: the end of the warm-up, and the memory then")
    pane.set_ylabel("memory of the process, MiB")
    _title(figure, saved, f"Mixed load, {saved['minutes']:g} minutes")
    return _save(figure, path)
