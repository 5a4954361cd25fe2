"""The saved numbers as tables and plots: docs/performance.md, README.md, docs/images."""

from __future__ import annotations

from typing import Any

from bench.peers import plots
from bench.peers.results import (
    COLUMNS,
    OURS,
    both,
    classes,
    compared,
    measured,
    number,
    ratio,
    share,
    tests_of,
    times_best,
)
from bench.peers.studies import Study
from bench.report import ROOT, elsewhere, put, runs, table

PAGE = ROOT / "docs" / "performance.md"
IMAGES = ROOT / "docs" / "images"


def cell(saved: dict[str, Any], key: str, test: str) -> str:
    """Medians of both thread counts, "2 threads (1 thread)"."""
    order = sorted(saved["threads"], reverse=True)
    if test.endswith("_mib"):
        order = order[:1]
    return both([measured(saved, key, threads, test) for threads in order], COLUMNS[test][1])


def main_table(saved: dict[str, Any]) -> str:
    most = max(saved["threads"])
    header = ["", "perplexity", "KL", "MB a token", *(heading for heading, _ in COLUMNS.values())]
    header.insert(5, "of the memory limit")
    rows = []
    for name, keys in classes(saved).items():
        if keys:
            rows.append([f"**{name}**", *[""] * (len(header) - 1)])
        for key in sorted(keys, key=lambda k: (not k.startswith(OURS), k)):
            lost, quality = ratio(saved, key), saved["quality"].get(key, {})
            reached = share(saved, key, most)
            cells = [cell(saved, key, test) for test in COLUMNS]
            cells.insert(1, f"{reached:.0%}" if reached else "")
            rows.append(
                [
                    f"**{key}**" if key.startswith(OURS) else key,
                    f"x {lost:.3f}" if lost else "not measured",
                    number(quality.get("mean_kl"), 4),
                    number(saved["contestants"][key]["token_bytes"] / 1e6, 0),
                    *cells,
                ]
            )
    return table(header, rows)


def ratio_table(saved: dict[str, Any]) -> str:
    """edgeformer over the best peer of a class, test by test; above 1 is faster or smaller."""
    rows = []
    for key, field in compared(saved):
        for test, (heading, digits) in COLUMNS.items():
            cells = []
            for threads in sorted(saved["threads"], reverse=True):
                found = times_best(saved, key, field, threads, test)
                if found is None:
                    cells.append("")
                    continue
                times, own, best, whose = found
                cells.append(f"**x {times:.2f}** ({number(own, digits)} : {number(best, digits)}, {whose})")
            rows.append([key, heading, *cells])
    heads = [f"{threads} threads" if threads > 1 else "1 thread" for threads in sorted(saved["threads"], reverse=True)]
    return table(["file", "test", *heads], rows)


def times_table(saved: dict[str, Any]) -> str:
    """How many times as fast as the best peer, on each machine that took the study; 2 threads (1 thread)."""
    tests = ("decode", "decode@1024", "prefill512", "batch8", "first")
    rows = []
    for machine in (saved, *runs("peers")[1:]):
        for key, field in compared(machine):
            cells = []
            for test in tests:
                by_threads = (
                    times_best(machine, key, field, n, test) for n in sorted(machine["threads"], reverse=True)
                )
                found = [f"{times[0]:.2f}" for times in by_threads if times is not None]
                cells.append(f"x {found[0]}" + (f" ({found[1]})" if len(found) > 1 else "") if found else "")
            chip = machine["machine"]["cpu"].split(",")[0]
            rows.append([f"{key}; {chip}, {machine['machine']['date']}", *cells])
    return table(["file; machine", *(COLUMNS[test][0].removesuffix(", s") for test in tests)], rows)


def conditions(saved: dict[str, Any]) -> str:
    """Machine, memory, rounds, and whether anything disturbed them."""
    facts = saved["machine"]
    taken, used = saved["rounds"]["taken"], saved["rounds"]["used"]
    speeds = "; ".join(
        f"{count} thread{'s' if int(count) > 1 else ''} {speeds['max']:.1f} GB/s"
        for count, speeds in saved["memory"].items()
    )
    lines = [
        f"*{facts['cpu']}; {facts['system']}; {facts['date']}. A plain read: {speeds}. Medians of {used} rounds of "
        f"fresh processes in turn; {taken - used} more were rejected because other processes used more than "
        f"{saved['limit_cores_of_others']} cores.*"
    ]
    if not saved["undisturbed"]:
        disturbed = saved["rounds"]["disturbed"]
        warning = (
            f"**Disturbed: other work ran on the machine in {disturbed} of {taken} rounds. Ignore these numbers.**"
        )
        lines.insert(0, warning + "\n")
    return "\n".join(lines)


def settings(saved: dict[str, Any]) -> str:
    lines = []
    for key, found in saved["contestants"].items():
        versions = saved["measured"].get(key, {}).get("versions", {})
        shown = ", ".join(f"{name} {value}" for name, value in versions.items() if name != "llama.cpp")
        lines.append(f"- {key}: {found['settings']}. {shown}. {found['file_bytes'] / 1e6:.0f} MB on disk.")
    lines += [f"- {key}: absent. {reason}" for key, reason in saved["absent"].items()]
    return "\n".join(lines)


def greedy_line(saved: dict[str, Any]) -> str:
    """The contestants that used more cores than their threads; empty if there are none."""
    found = []
    for key in saved["measured"]:
        for threads in saved["threads"]:
            cores = measured(saved, key, threads, "cores")
            if cores is not None and cores > threads + 0.1:
                found.append(f"{key} used {cores:.2f} cores with {threads} thread{'s' if threads > 1 else ''}")
    return f"More threads than asked for: {'; '.join(found)}." if found else ""


def stream_line(saved: dict[str, Any]) -> str:
    """How much of the engine's speed the public Python loop keeps: the median over the rounds."""
    parts = []
    for threads in sorted(saved["threads"], reverse=True):
        kept = saved["kept_by_stream"].get(str(threads))
        if kept:
            parts.append(f"{kept['median']:.1%} with {threads} thread{'s' if threads > 1 else ''}")
    return f"`model.stream`, end to end in Python, keeps {' and '.join(parts)} of the engine's speed." if parts else ""


def loss_line(saved: dict[str, Any]) -> str:
    """Names each file of ours that loses more than the best peer's of its class; empty if there is none."""
    groups, parts = classes(saved), []
    for name, keys in groups.items():
        losses = {key: saved["quality"][key]["mean_kl"] for key in keys if key in saved["quality"]}
        peers = {key: kl for key, kl in losses.items() if not key.startswith(OURS)}
        if not peers:
            continue
        best = min(peers, key=lambda key: peers[key])
        for key, kl in losses.items():
            if key.startswith(OURS) and kl > peers[best]:
                worse = sum(kl > other for other in peers.values())
                parts.append(
                    f"{key} loses more than {worse} of the {len(peers)} peers' files in its class ({name}): "
                    f"KL {kl:.4f}, the best is {best} with {peers[best]:.4f}."
                )
    return " ".join(parts)


def readme_table(saved: dict[str, Any]) -> str:
    """For each class: ours, and each project's file that decodes fastest; the columns that fit a README."""
    tests = ("decode", "decode@1024", "prefill512", "first")
    header = ["", "perplexity", *(COLUMNS[test][0] for test in tests)]
    rows = []
    for name, keys in classes(saved).items():
        projects: dict[str, str] = {}
        for key in keys:
            project = saved["contestants"][key]["project"]
            speed = {
                k: saved["measured"][k].get(str(max(saved["threads"])), {}) for k in (key, projects.get(project, key))
            }
            fastest = max(speed, key=lambda k: speed[k].get("decode", {}).get("median") or 0.0)
            projects[project] = fastest
        if projects:
            rows.append([f"**{name}**", *[""] * (len(header) - 1)])
        for project, key in sorted(projects.items(), key=lambda pair: pair[0] != OURS):
            lost = ratio(saved, key)
            cells = [cell(saved, key, test) for test in tests]
            shown = f"**{key}**" if project == OURS else key
            rows.append([shown, f"x {lost:.3f}" if lost else "not measured", *cells])
    return table(header, rows)


def curve(saved: dict[str, Any], study: Study) -> str:
    """A study's block: conditions, one column a test, and the plot if the tests have an axis."""
    names = list(dict.fromkeys(n for found in saved["measured"].values() for n in tests_of(found)))
    order, rows = sorted(saved["threads"], reverse=True), []
    for key in saved["measured"]:
        cells = []
        for name in names:
            cells.append(both([measured(saved, key, threads, name) for threads in order], 0))
        rows.append([f"**{key}**" if key.startswith(OURS) else key, *cells])
    parts = [conditions(saved), "Tokens a second; 2 threads (1 thread).", table(["", *names], rows)]
    if study.axis:
        IMAGES.mkdir(parents=True, exist_ok=True)
        path = plots.lines(saved, IMAGES / f"{study.file}.png", f"{study.name} ", study.axis, study.title)
        parts.append(f"![{study.title}](images/{path.name})")
    parts += [f"{key} is absent: {reason}" for key, reason in saved["absent"].items()]
    return "\n\n".join(parts)


def write(saved: dict[str, Any]) -> None:
    """The main study: both pages and the plots."""
    images = plots.draw(saved, IMAGES)
    shown = "\n\n".join(f"![{title}](images/{path.name})" for title, path in images)
    text = [
        conditions(saved),
        "Tokens a second unless said otherwise; 2 threads (1 thread).",
        main_table(saved),
        loss_line(saved),
        "### edgeformer over the best peer",
        "Times the best peer of its class (a file that loses more than 1 %: the best of all), on each machine:",
        times_table(saved),
        "### The same, test by test",
        ratio_table(saved),
        stream_line(saved),
        greedy_line(saved),
        shown,
        "### Settings",
        settings(saved),
    ]
    text += elsewhere(runs("peers")[1:], lambda other: f"{conditions(other)}\n\n{ratio_table(other)}")
    put(PAGE, "peers", "\n\n".join(part for part in text if part))
    lines = [
        "SmolLM2-135M-Instruct, tokens/s with 2 threads (1 thread); each project's fastest file of a class, perplexity "
        "over the float model's:",
        readme_table(saved),
        loss_line(saved),
        conditions(saved),
        "All files, tests, settings and machines: [docs/performance.md](docs/performance.md). `python -m bench.peers` "
        "measures this again.",
    ]
    put(ROOT / "README.md", "speed", "\n\n".join(line for line in lines if line))


def plain(saved: dict[str, Any]) -> str:
    """A short table for a terminal."""
    lines = []
    for key, found in saved["measured"].items():
        for threads in saved["threads"]:
            tests = found.get(str(threads), {})
            shown = "  ".join(f"{name} {test['median']:.3f}" for name, test in tests.items())
            lines.append(f"{key}, {threads} threads: {shown}")
    if not saved["undisturbed"]:
        lines.append(f"DISTURBED: {saved['rounds']['disturbed']} of {saved['rounds']['taken']} rounds")
    return "\n".join(lines)
