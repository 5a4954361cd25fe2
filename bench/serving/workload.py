"""What the clients ask: chats with prompts of 32 to 1,024 tokens; half of them begin with one system prompt.

The texts are pieces of the Python language reference (bench.decoding.setting.Prompts), so no two begin alike but for
the system prompt. Lengths are spread evenly on a logarithmic scale.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SHORTEST, LONGEST, SHARED = 32, 1024, 256  # tokens; SHARED of the system prompt
NEW = 128  # tokens of an answer
SEED = 16


@dataclass(frozen=True)
class Ask:
    """One request: the conversation, and its tokens without the template's own."""

    messages: list[dict[str, str]]
    tokens: int

    def body(self, model: str, new: int, extra: dict[str, Any]) -> dict[str, Any]:
        """Its JSON: greedy, streamed, with the numbers of tokens at the end; end tokens do not end it."""
        return {
            "model": model,
            "messages": self.messages,
            "max_tokens": new,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            "ignore_eos": True,
        } | extra


class Workload:
    """Requests in a fixed order for a seed. `encode` and `decode` are those of the model's tokenizer."""

    def __init__(
        self, encode: Callable[[str], list[int]], decode: Callable[[list[int]], str], seed: int = SEED
    ) -> None:
        from pydoc_data.topics import topics

        text = "\n\n".join(topics[name] for name in sorted(topics))
        self._ids, self._decode = encode(text[:600_000]), decode
        self._random = random.Random(seed)
        self._place = 0
        self._system = self._decode(self._ids[:SHARED])

    @classmethod
    def of(cls, bundle: Path, seed: int = SEED) -> Workload:
        """With the tokenizer of a bundle."""
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(bundle / "tokenizer.json"))
        return cls(
            lambda text: list(tokenizer.encode(text, add_special_tokens=False).ids),
            lambda ids: str(tokenizer.decode(ids)),
            seed,
        )

    def take(self, count: int) -> list[Ask]:
        """The next `count` requests: every second one has the system prompt; the order of lengths is mixed."""
        asks = []
        for number, length in enumerate(self._lengths(count)):
            has_system = number % 2 == 1
            own = max(SHORTEST, length - SHARED) if has_system else length
            user = {"role": "user", "content": self._piece(own)}
            system = [{"role": "system", "content": self._system}] if has_system else []
            asks.append(Ask([*system, user], own + SHARED * has_system))
        return asks

    def short(self, count: int, length: int) -> list[Ask]:
        """`count` requests of `length` tokens that share nothing."""
        return [Ask([{"role": "user", "content": self._piece(length)}], length) for _ in range(count)]

    def _lengths(self, count: int) -> list[int]:
        ratio = LONGEST / SHORTEST
        found = [round(SHORTEST * ratio ** ((i + 0.5) / count)) for i in range(count)]
        self._random.shuffle(found)
        return found

    def _piece(self, length: int) -> str:
        end = len(self._ids) - length - SHARED
        self._place = (self._place + 577) % end
        return self._decode(self._ids[SHARED + self._place : SHARED + self._place + length])


def clients(
    asks: Sequence[Ask], count: int, make: Callable[[Ask], dict[str, Any]], spread: float
) -> list[dict[str, Any]]:
    """`count` clients that share the requests in turn, and begin at random moments of the first `spread` seconds."""
    starts = random.Random(SEED).sample(range(1000), count)
    return [
        {"at": spread * start / 1000, "bodies": [make(ask) for ask in asks[number::count]]}
        for number, start in enumerate(starts)
    ]


def arrivals(asks: Sequence[Ask], rate: float, make: Callable[[Ask], dict[str, Any]]) -> list[dict[str, Any]]:
    """An open loop: each request comes at a moment of its own, `rate` a second in the mean (a Poisson process)."""
    moment, draw, found = 0.0, random.Random(SEED), []
    for ask in asks:
        found.append({"at": moment, "bodies": [make(ask)]})
        moment += draw.expovariate(rate)
    return found
