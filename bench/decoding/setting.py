"""What the studies of the decoding core share: options, prompts, the clock for other processes, the block of a page."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from bench.peers.runners.measure import Others
from bench.report import footnote, summary

LIMIT = 0.05  # cores that other processes may use during a measurement, as in bench.peers
SHORTEST, LONGEST = 16, 512  # tokens of mixed prompts
NEW = 64  # tokens of each answer

Found = TypeVar("Found")


@dataclass(frozen=True)
class Options:
    """How a study is taken."""

    bundle: Path  # SmolLM2-135M-Instruct with its GGUF's blocks
    threads: tuple[int, ...] = (1, 2)
    rounds: int = 5
    quick: bool = False  # fewer cases, beside fewer rounds
    peers: tuple[str, ...] = ()  # words: only the peers whose project and name contain one
    tiny: bool = False  # the least that runs everything: not for numbers


def mixed_lengths(count: int, seed: int = 0) -> list[int]:
    """`count` prompt lengths from 16 to 512 tokens, evenly spaced on a logarithmic scale, in a fixed random order.

    So every `count` has the same mixture: many short prompts, few long ones, 143 tokens in the mean of many.
    """
    ratio = LONGEST / SHORTEST
    lengths = [round(SHORTEST * ratio ** ((i + 0.5) / count)) for i in range(count)]
    random.Random(seed).shuffle(lengths)
    return lengths


class Prompts:
    """Pieces of one text (the Python language reference). No two of the first thousand begin alike."""

    def __init__(self, ids: list[int]) -> None:
        self._ids = ids
        self._place = 0

    @classmethod
    def of(cls, model: Any, count: int = 40_000) -> Prompts:
        """From the first `count` tokens of the text."""
        from pydoc_data.topics import topics

        text = "\n\n".join(topics[name] for name in sorted(topics))
        return cls(model.encode_prompt(text[: 6 * count])[:count])

    def take(self, length: int) -> list[int]:
        """The next one, of `length` tokens."""
        end = len(self._ids) - length
        if end < 0:
            raise ValueError(f"the text has {len(self._ids)} tokens, a prompt of {length} was asked for")
        self._place = (self._place + 577) % (end + 1)
        return self._ids[self._place : self._place + length]

    def mixed(self, count: int) -> list[list[int]]:
        """`count` prompts of mixed lengths."""
        return [self.take(length) for length in mixed_lengths(count)]


def undisturbed(run: Callable[[], Found], tries: int = 3) -> tuple[Found, float]:
    """(what `run` gave, cores that others used meanwhile): the first quiet one of `tries`, else the quietest."""
    taken: list[tuple[Found, float]] = []
    while len(taken) < tries and (not taken or taken[-1][1] > LIMIT):
        others = Others()
        found = run()
        taken.append((found, others.cores()))
    return min(taken, key=lambda pair: pair[1])


def percentile(values: list[float], share: float) -> float:
    """The smallest value with at least `share` of all at or below it (nearest rank)."""
    ordered = sorted(values)
    rank = max(1, -(-len(ordered) * round(share * 1000) // 1000))
    return ordered[rank - 1]


def summaries(rounds: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    """name -> summary over the rounds."""
    return {name: summary([one[name] for one in rounds]) for name in rounds[0]}


def by_threads(saved: dict[str, Any]) -> Iterator[int]:
    """The numbers of threads that were measured, the most first."""
    yield from sorted(saved["threads"], reverse=True)


def threads_text(count: int) -> str:
    return f"{count} thread{'s' if count > 1 else ''}"


def order_text(saved: dict[str, Any]) -> str:
    """What a cell "200 (100)" holds: "2 threads (1 thread)"."""
    most, *rest = [threads_text(count) for count in by_threads(saved)]
    return most + "".join(f" ({one})" for one in rest[:1])


def note(saved: dict[str, Any]) -> str:
    """Where and when; first, whether other work ran."""
    others = saved.get("others", 0.0)
    disturbed = "" if others <= LIMIT else f"**Disturbed: other processes used up to {others:.2f} cores.** "
    rounds = saved.get("rounds")
    taken = f"Medians of {rounds} rounds. " if rounds and rounds > 1 else "One round. " if rounds else ""
    return f"{disturbed}{taken}{footnote(saved['machine'])}"


def verdict(reached: float, bar: float, *, least: bool) -> str:
    """ "reached" or "missed": `least` where the bar is the smallest good value, else it is the largest."""
    good = reached >= bar if least else reached <= bar
    return "reached" if good else "missed"
