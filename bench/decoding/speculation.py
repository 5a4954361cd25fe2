"""Speculation by task: the same answers with and without drafts, in one process.

    python -m bench.decoding.speculation BUNDLE [--threads 1 2] [--rounds 5] [--draft BUNDLE]

Answers with and without drafts alternate, so that other load on the machine affects both; a figure is the median of
the rounds. Tokens must be equal. Lookup sees the prompt and the answer alone: a store of recent answers would hold the
answer of the round before. Nor do answers by schema know the habits of earlier ones: each has a grammar of its own.
Times are those from the first token of an answer to its last.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from statistics import median
from typing import Any

import edgeformer
from bench.decoding.speculation_tasks import SCHEMAS, TASKS
from edgeformer.decoding.speculation.speculation import SpeculationName

NEW = 360


@dataclass(frozen=True)
class Answer:
    """One task on one number of threads: medians of the rounds."""

    kind: str
    tokens: int
    plain: float  # seconds without drafts
    drafted: float
    ratio: float  # of a pair
    proposed: int
    accepted: int


def tasks() -> list[tuple[str, str, dict[str, Any]]]:
    """(kind, message, arguments of `generate`)"""
    found: list[tuple[str, str, dict[str, Any]]] = [
        (kind, message, {}) for kind, messages in TASKS.items() for message in messages
    ]
    by_schema = zip(TASKS["JSON"], SCHEMAS, strict=False)
    return found + [("JSON by schema", message, {"json_schema": schema}) for message, schema in by_schema]


def measure(model: edgeformer.Model, speculation: SpeculationName | edgeformer.Model, rounds: int) -> list[Answer]:
    """Every task `rounds` times in pairs; the order of a pair changes from round to round.

    Raises:
        AssertionError: drafts changed a token.
    """
    found: list[Answer] = []
    for kind, message, arguments in tasks():
        prompt = [{"role": "user", "content": message}]
        pairs = []
        for number in range(rounds):
            pair = {}
            for name in ("off", "on") if number % 2 else ("on", "off"):
                chosen = speculation if name == "on" else "off"
                # Another title makes another grammar.
                own: dict[str, Any] = {
                    key: {**schema, "title": f"{number} {name}"} for key, schema in arguments.items()
                }
                pair[name] = model.generate(prompt, max_new_tokens=NEW, temperature=0, speculation=chosen, **own)
            assert pair["on"].ids == pair["off"].ids, f"drafts changed the answer to {message!r}"
            pairs.append((pair["off"].timings.decode_seconds, pair["on"].timings.decode_seconds))
            drafts = pair["on"].drafts
        plain, drafted = (median(pair[i] for pair in pairs) for i in (0, 1))
        ratio = median(one / other for one, other in pairs)
        found.append(Answer(kind, len(pair["on"].ids), plain, drafted, ratio, drafts.proposed, drafts.accepted))
    return found


def by_kind(answers: list[Answer]) -> dict[str, dict[str, float]]:
    """kind -> how many times as fast, of all its answers together and of the slowest; accepted drafts; tokens/s."""
    table = {}
    for kind in dict.fromkeys(answer.kind for answer in answers):
        those = [answer for answer in answers if answer.kind == kind]
        plain, drafted = sum(one.plain for one in those), sum(one.drafted for one in those)
        tokens = sum(one.tokens - 1 for one in those)
        table[kind] = {
            "times": plain / drafted,
            "lowest": min(one.ratio for one in those),
            "accepted": sum(one.accepted for one in those) / max(1, sum(one.proposed for one in those)),
            "plain tokens/s": tokens / plain,
            "tokens/s": tokens / drafted,
        }
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description="Answers with and without drafts, by task.")
    parser.add_argument("bundle")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--draft", help="a smaller bundle of the same vocabulary; default: prompt lookup")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    results = {}
    for threads in options.threads:
        model = edgeformer.load(options.bundle, threads=threads)
        speculation: SpeculationName | edgeformer.Model = "lookup"
        if options.draft:
            speculation = edgeformer.load(options.draft, threads=threads)
        results[threads] = by_kind(measure(model, speculation, options.rounds))
        if not options.json:
            print(f"{threads} threads".replace("1 threads", "1 thread"))
            for kind, row in results[threads].items():
                print(
                    f"  {kind:15} {row['times']:.2f} x (lowest {row['lowest']:.2f}), {row['plain tokens/s']:.0f} -> "
                    f"{row['tokens/s']:.0f} tokens/s, {row['accepted']:.0%} of drafts right"
                )
    if options.json:
        print(json.dumps(results))


if __name__ == "__main__":
    main()
