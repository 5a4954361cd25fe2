"""Times in transcripts: the rules of timestamp tokens while decoding, and the segments that they mark.

A model that writes times has one token for each step from 0 s to the length of its window, in order, after
`no_timestamps_token_id` of generation_config.json. Radford et al. 2022, https://arxiv.org/abs/2212.04356, section 2.3.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgeformer.bundle.signature import Array
from edgeformer.decoding.logits_processors import log_softmax


@dataclass(frozen=True)
class TimeTokens:
    """The timestamp tokens of a model.

    first: the token of 0 s; all from it on are times. step: seconds between two of them. eos: tokens that end an
    answer. latest_first: how many steps after 0 s the first time may be, at most; None allows all.
    """

    first: int
    step: float
    eos: frozenset[int]
    latest_first: int | None = None

    @classmethod
    def of(
        cls, settings: Mapping[str, Any], positions: int | None, window: float, eos: frozenset[int]
    ) -> TimeTokens | None:
        """Those of a generation_config.json; None where the model writes no times.

        positions: states of the encoder for a window of `window` seconds; there is one time for each.
        """
        silent = settings.get("no_timestamps_token_id")
        if type(silent) is not int or not positions:
            return None
        latest = settings.get("max_initial_timestamp_index")
        return cls(silent + 1, window / positions, eos, latest if type(latest) is int else None)

    def rules(self, prompt_length: int) -> TimeRules:
        """What the answer to a prompt of `prompt_length` tokens must obey."""
        return TimeRules(self, prompt_length)

    def is_time(self, token: int) -> bool:
        """Whether the token is a time."""
        return token >= self.first

    def seconds(self, token: int) -> float:
        """Seconds after the beginning of the window."""
        return (token - self.first) * self.step


@dataclass(frozen=True)
class TimeRules:
    """A logits processor: an answer begins with a time, times come in pairs (the end of a segment, the beginning of
    the next) and never go back; and where all times together are likelier than the likeliest text, a time follows.

    As transformers' WhisperTimeStampLogitsProcessor, except that after the end of a segment no token but a time or an
    end token may follow, whatever its number.
    """

    times: TimeTokens
    prompt_length: int

    def __call__(self, ids: Array, scores: Array) -> Array:
        """`scores` [vocab] of what follows `ids` [length]; written into."""
        first, eos = self.times.first, list(self.times.eos)
        scores[first - 1] = -np.inf  # the token that says that there are no times
        said = ids[self.prompt_length :]
        ends = len(said) >= 1 and said[-1] >= first
        if ends and (len(said) < 2 or said[-2] >= first):
            scores[first:] = -np.inf  # a pair is whole
        elif ends:
            kept = scores[eos]
            scores[:first] = -np.inf
            scores[eos] = kept
        spoken = said[said >= first]
        if len(spoken):
            # A segment may be of no length only where it ends what the last time began.
            earliest = spoken[-1] if ends and not (len(said) < 2 or said[-2] >= first) else spoken[-1] + 1
            scores[first:earliest] = -np.inf
        if not len(said):
            scores[:first] = -np.inf
            if self.times.latest_first is not None:
                scores[first + self.times.latest_first + 1 :] = -np.inf
        return self._likelier(scores)

    def _likelier(self, scores: Array) -> Array:
        """Only times, where their probabilities add up to more than that of the likeliest other token."""
        first = self.times.first
        if not np.isfinite(scores).any():
            return scores
        table = log_softmax(scores)
        times = table[first:]
        with np.errstate(divide="ignore"):
            together = np.log(np.exp(times).sum())
        if together > table[:first].max():
            scores[:first] = -np.inf
        return scores


@dataclass(frozen=True)
class Span:
    """Tokens that were said between two times, in seconds after the beginning of the window."""

    start: float
    end: float
    places: list[int]  # of the tokens in the answer


def spans(ids: Sequence[int], times: TimeTokens | None, length: float) -> list[Span]:
    """The segments of a window's answer. `length`: seconds of sound in the window, which no time exceeds.

    Text after the last time ends with the window. Without times a window is one segment.
    """
    found: list[Span] = []
    start, places = 0.0, list[int]()
    for place, token in enumerate(ids):
        if times is None or not times.is_time(token):
            places.append(place)
            continue
        now = min(times.seconds(token), length)
        if places:
            found.append(Span(start, max(start, now), places))
            places = []
        start = now
    if places:
        found.append(Span(start, max(start, length), places))
    return found
