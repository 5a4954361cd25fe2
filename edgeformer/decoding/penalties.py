"""Processors that raise and lower the scores of some tokens. They change `scores` [vocab] in place and return it.

Formulas: transformers' `generation/logits_process.py`; for the frequency and presence penalty OpenAI's API reference.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from edgeformer.bundle.signature import Array


@dataclass(frozen=True)
class SequenceBias:
    """A bias for the last token of a sequence whose other tokens have just been said."""

    tokens: Array  # int64 [n]: sequences of one token
    biases: Array  # float32 [n]
    longer: tuple[tuple[Array, Array, Array], ...]  # of each length: the tokens before [m, length], the last, the bias

    @classmethod
    def of(cls, sequences: Iterable[tuple[tuple[int, ...], float]]) -> SequenceBias:
        """The processor that adds each bias to the last token of its sequence, after the ones before it."""
        lengths: dict[int, list[tuple[tuple[int, ...], float]]] = {}
        for ids, bias in sequences:
            lengths.setdefault(len(ids) - 1, []).append((ids, bias))
        single = lengths.pop(0, [])
        longer = tuple(
            (
                np.array([ids[:-1] for ids, _ in group], np.int64),
                np.array([ids[-1] for ids, _ in group], np.int64),
                np.array([bias for _, bias in group], np.float32),
            )
            for group in lengths.values()
        )
        tokens = np.array([ids[0] for ids, _ in single], np.int64)
        return cls(tokens, np.array([bias for _, bias in single], np.float32), longer)

    def __call__(self, ids: Array, scores: Array) -> Array:
        """The scores [vocab] with the biases that fit the end of `ids` added."""
        scores[self.tokens] += self.biases
        for before, last, biases in self.longer:
            length = before.shape[1]
            if length <= len(ids):
                said = (before == ids[-length:]).all(1)
                np.add.at(scores, last[said], biases[said])
        return scores


def repetition_penalty(penalty: float, ids: Array, scores: Array) -> Array:
    """Scores of the tokens in `ids` divided by `penalty` where positive, multiplied where negative (CTRL, 2019)."""
    known = _known(ids, scores)
    old = scores[known]
    scores[known] = np.where(old < 0, old * penalty, old / penalty)  # a token said twice is set twice, to the same
    return scores


def encoder_repetition_penalty(source: Array, penalty: float, _: Array, scores: Array) -> Array:
    """The inverse, for the tokens of the source: above 1 they become likelier."""
    return repetition_penalty(1 / penalty, source, scores)


def frequency_and_presence_penalty(
    frequency: float, presence: float, prompt_length: int, ids: Array, scores: Array
) -> Array:
    """Scores - count * frequency - (count > 0) * presence, where `count` is how often the answer holds the token.

    OpenAI's definition, which vLLM follows too: the prompt's tokens do not count. llama.cpp counts the last 64 tokens,
    the prompt's among them.
    """
    answer = ids[prompt_length:]
    if len(answer):
        counts = np.empty(len(scores), scores.dtype)  # zeros of a large vocabulary would take as long as the rest
        counts[answer] = 0
        np.add.at(counts, answer, counts.dtype.type(1))  # several times as fast as numpy.unique for 4,000 tokens
        scores[answer] = scores[answer] - (counts[answer] * frequency + presence)
    return scores


def exponential_decay(eos: Sequence[int], start: int, factor: float, ids: Array, scores: Array) -> Array:
    """The ends' scores grow by |score| (factor ** n - 1) once n tokens more than `start` were said."""
    beyond = len(ids) - start
    if beyond <= 0:
        return scores
    old = scores[eos]
    finite = np.isfinite(old)
    with np.errstate(over="ignore"):
        scores[eos] = old + np.abs(np.where(finite, old, 0)) * (factor**beyond - 1)
    return scores


def _known(ids: Array, scores: Array) -> Array:
    """Those of `ids` that have a score: a prompt may hold more tokens than the model can say."""
    return ids if not len(ids) or ids.max() < len(scores) else ids[ids < len(scores)]
