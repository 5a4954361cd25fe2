"""What a model's generation_config forbids or forces at each step, as a function of logits and the tokens so far.

The keys and their meaning are transformers': forced_bos_token_id, forced_eos_token_id, suppress_tokens,
begin_suppress_tokens, bad_words_ids (single tokens), no_repeat_ngram_size, min_length, min_new_tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Rules:
    """For one generation; `prompt` tokens stood there before its first new one."""

    prompt: int
    max_new_tokens: int
    eos: frozenset[int] = frozenset()
    forced_first: int | None = None
    forced_last: int | None = None
    never: tuple[int, ...] = ()
    not_first: tuple[int, ...] = ()
    no_repeat_ngram: int = 0
    min_length: int = 0  # tokens, the prompt's included
    min_new_tokens: int = 0

    @classmethod
    def of(cls, settings: Mapping[str, Any], prompt: int, max_new_tokens: int, eos: frozenset[int]) -> Rules:
        """The rules in a generation_config."""

        def number(name: str) -> int | None:
            value = settings.get(name)
            value = value[0] if isinstance(value, list) and len(value) == 1 else value
            return value if type(value) is int else None

        def numbers(name: str) -> tuple[int, ...]:
            return tuple(value for value in settings.get(name) or () if type(value) is int)

        bad = tuple(words[0] for words in settings.get("bad_words_ids") or () if len(words) == 1)
        return cls(
            prompt=prompt,
            max_new_tokens=max_new_tokens,
            eos=eos,
            # transformers forces it at length 1: after decoder_start_token_id alone.
            forced_first=number("forced_bos_token_id") if prompt == 1 else None,
            forced_last=number("forced_eos_token_id"),
            never=numbers("suppress_tokens") + tuple(word for word in bad if type(word) is int and word not in eos),
            not_first=numbers("begin_suppress_tokens"),
            no_repeat_ngram=number("no_repeat_ngram_size") or 0,
            min_length=number("min_length") or 0,
            min_new_tokens=number("min_new_tokens") or 0,
        )

    def __call__(self, scores: Array, ids: Sequence[int]) -> Array:
        """`scores` [vocab] with minus infinity for every token that may not follow `ids`; the array itself is kept."""
        new = len(ids) - self.prompt
        if self.forced_first is not None and new == 0:
            return _only(scores, self.forced_first)
        if self.forced_last is not None and new == self.max_new_tokens - 1:
            return _only(scores, self.forced_last)
        forbidden = [*self.never, *(self.not_first if new == 0 else ())]
        if len(ids) < self.min_length or new < self.min_new_tokens:
            forbidden += self.eos
        if self.no_repeat_ngram:
            forbidden += _would_repeat(ids, self.no_repeat_ngram)
        if not forbidden:
            return scores
        changed = scores.copy()
        changed[forbidden] = -np.inf
        return changed


def _only(scores: Array, id: int) -> Array:
    changed = np.full_like(scores, -np.inf)
    changed[id] = 0.0
    return changed


def _would_repeat(ids: Sequence[int], size: int) -> list[int]:
    """Tokens that would end an n-gram of `size` that stands in `ids` already."""
    last = tuple(ids[len(ids) - size + 1 :]) if size > 1 else ()
    places = range(len(ids) - size + 1)
    return [ids[place + size - 1] for place in places if tuple(ids[place : place + size - 1]) == last]
