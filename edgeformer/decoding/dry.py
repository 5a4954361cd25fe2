"""DRY, "don't repeat yourself": the token that would prolong a repetition becomes the less likely the longer it is.

By p-e-w (text-generation-webui, pull request 5677). A token t that followed an earlier occurrence of the last n tokens
loses multiplier * base ** (n - allowed_length) where n, the longest such, is at least `allowed_length`. A repetition
does not reach across a sequence breaker, and a token that is one itself loses nothing.

A breaker is a text. llama.cpp's reading is followed (`get_overlapping_token_sequences`): every token whose text holds
the breaker is one, and so is a token whose text ends with the beginning of the breaker, followed by the tokens of the
rest. At most 50 tokens of a repetition count, as the author has it: more would overflow.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from edgeformer.bundle.signature import Array

Ids = tuple[int, ...]
_LARGEST = float(np.finfo(np.float32).max)
_LARGEST_LOG = math.log(_LARGEST)
_LONGEST = 50  # tokens of a repetition that count
_AT_ONCE = 256  # places compared in one step
_LONGEST_TAIL = 20  # tokens of a breaker after its first: llama.cpp's limit


@dataclass(frozen=True)
class Dry:
    """The processor: changes `scores` [vocab] in place, after `ids` (the prompt and the answer so far)."""

    multiplier: float
    base: float
    allowed_length: int
    last: int  # tokens to look back at; -1 for all
    breakers: Mapping[int, tuple[Ids, ...]]  # first token -> what must follow; () where it is a breaker by itself

    def __call__(self, ids: Array, scores: Array) -> Array:
        """The scores with the penalties taken off."""
        seen = ids if self.last < 0 else ids[max(0, len(ids) - self.last) :]
        for token, length in self.repetitions(seen):
            exponent = min(length - self.allowed_length, _LARGEST_LOG / math.log(max(self.base, 1.000001)))
            scores[token] -= min(self.multiplier * self.base**exponent, _LARGEST)
        return scores

    def repetitions(self, ids: Array) -> list[tuple[int, int]]:
        """(a token, the length of the longest repetition that it would prolong), of `allowed_length` or more."""
        longest = min(max(_LONGEST, self.allowed_length), self._unbroken(ids), len(ids) - 1)
        if longest < max(self.allowed_length, 1):
            return []
        places = np.flatnonzero(ids[:-1] == ids[-1])  # where an earlier occurrence of the last token stands
        for length in range(1, min(self.allowed_length, 4)):  # few are left
            places = places[places >= length]
            places = places[ids[places - length] == ids[-1 - length]]
        back, found = np.arange(longest), dict[int, int]()
        while len(places):
            some, places = places[-_AT_ONCE:], places[:-_AT_ONCE]
            same = ids[some[:, None] - back] == ids[len(ids) - 1 - back]  # [places, longest]
            same &= some[:, None] >= back  # a place before the beginning
            lengths = np.where(same.all(1), longest, same.argmin(1))
            for token, length in zip(ids[some + 1].tolist(), lengths.tolist(), strict=True):
                found[token] = max(length, found.get(token, 0))
            if len(places):  # one long run of the same tokens: its places have all the same to say
                done = [token for token, length in found.items() if length == longest]
                places = places[~np.isin(ids[places + 1], done)]
        return [
            (token, length)
            for token, length in found.items()
            if length >= self.allowed_length and () not in self.breakers.get(token, ())
        ]

    def _unbroken(self, ids: Array) -> int:
        """The number of tokens after the last breaker in `ids`; those before the 50th from the end may be left out."""
        if not self.breakers:
            return len(ids)
        end = ids[-(_LONGEST + self.allowed_length + _LONGEST_TAIL) :].tolist()
        for first in range(len(end) - 1, -1, -1):
            tails = self.breakers.get(end[first])
            if tails is not None:
                fitting = [len(tail) for tail in tails if tuple(end[first + 1 : first + 1 + len(tail)]) == tail]
                if fitting:
                    return len(end) - 1 - first - max(fitting)
        return len(ids)


def by_first_token(breakers: Iterable[Ids]) -> dict[int, tuple[Ids, ...]]:
    """Sequences of tokens by their first; () stands for a sequence of one token."""
    found: dict[int, dict[Ids, None]] = {}
    for first, *tail in breakers:
        found.setdefault(first, {})[tuple(tail)] = None
    return {first: tuple(tails) for first, tails in found.items()}


def breaker_ids(
    breakers: Iterable[str], texts: Sequence[bytes], encode: Callable[[str], Sequence[int]]
) -> tuple[Ids, ...]:
    """The sequences of tokens that break a repetition, for the texts that do.

    `texts` holds the bytes of each token of the vocabulary, `encode` makes tokens of a text without adding any.
    """
    found: dict[Ids, None] = {}
    for breaker in breakers:
        wanted = breaker.encode()
        begins = [wanted[:length] for length in range(1, len(wanted))]
        tails = {begin: _tail(wanted[len(begin) :], encode) for begin in begins}
        for token, text in enumerate(texts):
            if wanted in text:
                found[(token,)] = None
            elif begins:
                found |= {(token, *tails[begin]): None for begin in begins if tails[begin] and text.endswith(begin)}
    return tuple(found)


def _tail(rest: bytes, encode: Callable[[str], Sequence[int]]) -> Ids:
    """The tokens of the rest of a breaker; none where it begins within a character."""
    try:
        return tuple(encode(rest.decode()))[:_LONGEST_TAIL]
    except UnicodeDecodeError:
        return ()
