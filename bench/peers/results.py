"""Medians, classes and the best peer of each class, from saved results."""

from __future__ import annotations

from typing import Any

from bench.peers.contestants import Contestant
from bench.peers.rounds import Round, values
from bench.report import summary

OURS = "edgeformer"
ENGINE, STREAM = "keep (the GGUF's blocks)", "keep, model.stream"  # one bundle, without and with the public loop
STRICT = 1.01  # perplexity ratio up to which a file counts as "no more than 1 % lost"
PROCESS = ("load_s", "peak_mib", "cores")
COLUMNS = {  # test -> (heading, digits)
    "decode": ("decode, 32-token prompt", 0),
    "decode@1024": ("at depth 1024", 0),
    "prefill512": ("prefill 512", 0),
    "batch8": ("decode, batch 8", 0),
    "first": ("first token, s", 3),
    "load_s": ("load, s", 2),
    "short_mib": ("peak MiB, short prompt", 0),
    "long_mib": ("peak MiB, depth 1024", 0),
}
LESS = ("first", "load_s", "short_mib", "long_mib")  # tests in which less is better


def collect(rounds: list[Round], chosen: list[Contestant], threads: list[int]) -> dict[str, Any]:
    """contestant -> threads -> test -> {median, min, max, n}, over the rounds given."""
    found: dict[str, Any] = {}
    for contestant in chosen:
        for count in threads:
            turns = [
                turn
                for one in rounds
                for turn in one.turns
                if (turn.contestant, turn.threads) == (contestant.key, count)
            ]
            if not turns:
                continue
            names = [name for name, test in turns[0].result["tests"].items() if "value" in test]
            numbers = {n: values(rounds, contestant.key, count, n) for n in (*names, *PROCESS)}
            for name, test in (("short_mib", "decode"), ("long_mib", "decode@1024")):
                numbers[name] = [t.result["tests"][test]["rss_mib"] for t in turns if test in t.result["tests"]]
            found.setdefault(contestant.key, {})[str(count)] = {
                name: summary(got) for name, got in numbers.items() if got
            }
            cosines = [
                t["least_cosine"] for turn in turns for t in turn.result["tests"].values() if "least_cosine" in t
            ]
            if cosines:  # an encoder's; they depend on neither threads nor rounds but for the order of sums
                found[contestant.key]["cosine"] = min(cosines)
            found[contestant.key]["versions"] = turns[0].result["versions"]
    return found


def kept_by_stream(rounds: list[Round], threads: list[int]) -> dict[str, Any]:
    """threads -> summary of `model.stream`'s share of the engine's decoding speed, round by round."""
    found = {}
    for count in threads:
        loop, engine = (values(rounds, f"{OURS} {name}", count, "decode") for name in (STREAM, ENGINE))
        if loop and len(loop) == len(engine):
            found[str(count)] = summary([a / b for a, b in zip(loop, engine, strict=True)])
    return found


def number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:,.{digits}f}"


def both(values: list[float | None], digits: int) -> str:
    """The numbers of most threads and of fewer, "2 threads (1 thread)"; empty where the first was not measured."""
    most, *rest = [number(value, digits) for value in values]
    return most + (f" ({rest[0]})" if most and rest and rest[0] else "")


def measured(saved: dict[str, Any], key: str, threads: int, test: str) -> float | None:
    """The median of a contestant's test, or None."""
    found: float | None = saved["measured"].get(key, {}).get(str(threads), {}).get(test, {}).get("median")
    return found


def limit(saved: dict[str, Any], key: str, threads: int) -> float | None:
    """Tokens a second if nothing but the weights were read, at the measured speed of a plain read."""
    speeds = saved["memory"].get(str(threads))
    return speeds["max"] * 1e9 / saved["contestants"][key]["token_bytes"] if speeds else None


def share(saved: dict[str, Any], key: str, threads: int) -> float | None:
    """Decoding speed as a share of `limit`."""
    reached, bound = measured(saved, key, threads, "decode"), limit(saved, key, threads)
    return reached / bound if reached and bound else None


def ratio(saved: dict[str, Any], key: str) -> float | None:
    """Perplexity over the float model's."""
    quality = saved["quality"].get(key)
    return quality["perplexity"] / quality["perplexity_float"] if quality else None


def classes(saved: dict[str, Any]) -> dict[str, list[str]]:
    """The contestants by measured loss, without the row of the public loop."""
    keys = [key for key in saved["measured"] if "model.stream" not in key]
    strict = [key for key in keys if (ratio(saved, key) or 9.0) <= STRICT]
    return {"no more than 1 % lost": strict, "more is lost": [key for key in keys if key not in strict]}


def best_peer(saved: dict[str, Any], keys: list[str], threads: int, test: str) -> tuple[str, float] | None:
    """The best number of a test among the peers in `keys`."""
    found = [
        (key, value)
        for key in keys
        if not key.startswith(OURS) and (value := measured(saved, key, threads, test)) is not None
    ]
    if not found:
        return None
    return (min if test in LESS else max)(found, key=lambda pair: pair[1])


def compared(saved: dict[str, Any]) -> list[tuple[str, list[str]]]:
    """(each of our files, the files it is compared with): its class, or all files if it loses more than 1 %."""
    groups = classes(saved)
    strict, everybody = groups["no more than 1 % lost"], [key for keys in groups.values() for key in keys]
    return [(key, strict if key in strict else everybody) for key in everybody if key.startswith(OURS)]


def times_best(
    saved: dict[str, Any], key: str, field: list[str], threads: int, test: str
) -> tuple[float, float, float, str] | None:
    """(ratio to the best of `field`, our number, the best number, its contestant); above 1 is faster or smaller."""
    best = best_peer(saved, field, threads, test)
    own = measured(saved, key, threads, test)
    if best is None or own is None:
        return None
    return (best[1] / own if test in LESS else own / best[1]), own, best[1], best[0]


def tests_of(found: dict[str, Any]) -> list[str]:
    """The names of a contestant's tests, without the numbers of the whole process."""
    whole = (*PROCESS, "short_mib", "long_mib")
    return [name for key, tests in found.items() if key.isdigit() for name in tests if name not in whole]
