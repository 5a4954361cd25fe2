"""The study of sizes as a block of docs/performance.md, with its plot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.peers import plots
from bench.peers.pages import conditions
from bench.peers.results import OURS, both, measured, number, share, times_best
from bench.peers.sizes import SIZES
from bench.report import table

TESTS = {"decode": "decode", "prefill128": "prefill 128", "prefill512": "prefill 512", "first": "first token, s"}
TARGET = 0.85  # share of the memory limit that decoding should reach from 1B on


def peers_of(saved: dict[str, Any], size: str) -> list[str]:
    return [key for key, c in saved["contestants"].items() if c["size"] == size and c["project"] != OURS]


def size_table(saved: dict[str, Any], size: str) -> str:
    order = sorted(saved["threads"], reverse=True)
    rows = []
    for key, about in saved["contestants"].items():
        if about["size"] != size or key not in saved["measured"]:
            continue
        cells = [both([measured(saved, key, t, test) for t in order], 2 if test == "first" else 0) for test in TESTS]
        shares = [f"{found:.0%}" for t in order if (found := share(saved, key, t)) is not None]
        cells.insert(1, shares[0] + (f" ({shares[1]})" if len(shares) > 1 else "") if shares else "")
        cells += [number(measured(saved, key, order[0], name), digits) for name, digits in _PROCESS]
        shown = f"{about['project']} {about['name']}"
        shown = f"**{shown}**" if about["project"] == OURS else shown
        rows.append([shown, number(about["token_bytes"] / 1e6, 0), *cells])
    heads = list(TESTS.values())
    return table(["", "MB a token", heads[0], "of the memory limit", *heads[1:], "load, s", "peak MiB"], rows)


_PROCESS = (("load_s", 1), ("peak_mib", 0))


def ratio_table(saved: dict[str, Any], sizes: list[str]) -> str:
    """edgeformer's files over the fastest peer, each test and number of threads."""
    order, rows = sorted(saved["threads"], reverse=True), []
    for key, about in saved["contestants"].items():
        if about["project"] != OURS or about["size"] not in sizes or key not in saved["measured"]:
            continue
        cells = []
        for test in TESTS:
            parts = []
            for threads in order:
                found = times_best(saved, key, peers_of(saved, about["size"]), threads, test)
                if found is not None:
                    parts.append(f"x {found[0]:.2f}")
            cells.append(parts[0] + (f" ({parts[1]})" if len(parts) > 1 else "") if parts else "")
        rows.append([key, *cells])
    return table(["over the fastest peer", *TESTS.values()], rows)


def text(saved: dict[str, Any], images: Path) -> str:
    """The block of docs/performance.md; draws the plot into `images`."""
    sizes = list(dict.fromkeys(about["size"] for about in saved["contestants"].values()))
    parts = [conditions(saved), "Tokens a second; 2 threads (1 thread)."]
    for size in sizes:
        shape = SIZES[size]
        parts += [f"### {size}: {shape.parameters:.2f}B parameters, the shape of {shape.of}", size_table(saved, size)]
    reached = [
        f"{key} {found:.0%}"
        for key, about in saved["contestants"].items()
        if about["project"] == OURS and SIZES[about["size"]].parameters >= 1
        if (found := share(saved, key, max(saved["threads"])))
    ]
    if reached:
        parts.append(f"Of the memory limit from 1B on (target: {TARGET:.0%}): {', '.join(reached)}.")
    images.mkdir(parents=True, exist_ok=True)
    path = plots.sizes(saved, images / "peers-sizes.png", {name: SIZES[name].parameters for name in sizes})
    parts += [ratio_table(saved, sizes), f"![Speed against model size](images/{path.name})"]
    parts += [f"{key} is absent: {reason}" for key, reason in saved["absent"].items()]
    return "\n\n".join(parts)
