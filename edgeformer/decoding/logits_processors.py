"""Logits processors: pure functions (ids so far, scores) -> scores, one list for every model and every beam.

`logits_processors` makes the list, in transformers' order, from a GenerationConfig. `ids` is int64 [length], `scores`
float [vocab]; no argument is changed, and where nothing changes the scores themselves come back. A token that may not
follow has the score -inf. Formulas: transformers' `generation/logits_process.py`, with which the tests compare.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from edgeformer.bundle.signature import Array
from edgeformer.decoding import sampling
from edgeformer.decoding.generation_config import GenerationConfig

Processor = Callable[[Array, Array], Array]
_LARGEST = float(np.finfo(np.float32).max)


def logits_processors(
    config: GenerationConfig, prompt_length: int, max_new_tokens: int, source: Sequence[int] | Array | None
) -> tuple[Processor, ...]:
    """What changes the logits of an answer to a prompt of `prompt_length` tokens; empty where nothing does.

    `source` is what the encoder read, or a decoder's prompt; None where that is not made of tokens.
    """
    eos, made = list(config.eos_token_id), list[Processor]()
    given = None if source is None else np.asarray(source, np.int64)
    if config.sequence_bias:
        made.append(SequenceBias.of(config.sequence_bias))
    if config.encoder_repetition_penalty != 1 and given is not None:
        made.append(partial(encoder_repetition_penalty, given, config.encoder_repetition_penalty))
    if config.repetition_penalty != 1:
        made.append(partial(repetition_penalty, config.repetition_penalty))
    if config.no_repeat_ngram_size:
        made.append(partial(no_repeat_ngram, config.no_repeat_ngram_size))
    if config.encoder_no_repeat_ngram_size and given is not None:
        made.append(partial(encoder_no_repeat_ngram, given, config.encoder_no_repeat_ngram_size))
    words = [(word, -np.inf) for word in config.bad_words_ids if len(word) > 1 or word[0] not in eos]
    if words:
        made.append(SequenceBias.of(words))
    shortest = max(config.min_length, prompt_length + config.min_new_tokens if config.min_new_tokens else 0)
    if shortest > prompt_length and eos:
        made.append(partial(_before, shortest, partial(forbid, eos)))
    if config.forced_bos_token_id is not None and prompt_length == 1:
        made.append(partial(_at, 1, partial(force, [config.forced_bos_token_id])))
    if config.forced_eos_token_id:
        last = prompt_length + max_new_tokens - 1
        made.append(partial(_at, last, partial(force, list(config.forced_eos_token_id))))
    if config.remove_invalid_values:
        made.append(remove_invalid)
    if config.exponential_decay_length_penalty is not None and eos:
        start, factor = config.exponential_decay_length_penalty
        made.append(partial(exponential_decay, eos, prompt_length + start, factor))
    if config.suppress_tokens:
        made.append(partial(forbid, list(config.suppress_tokens)))
    if config.begin_suppress_tokens:
        begin = prompt_length + (config.forced_bos_token_id is not None and prompt_length == 1)
        made.append(partial(_at, begin, partial(forbid, list(config.begin_suppress_tokens))))
    if config.do_sample:
        # One token that ends nothing must stay for a beam to go on with.
        least = max(2, len(eos) + 1) if config.num_beams > 1 else 1
        made.append(_some_left)
        made += [partial(_without_ids, mask) for mask in sampling.filters(config, least)]
    if config.renormalize_logits:
        made.append(lambda _, scores: log_softmax(scores))
    return tuple(made)


def process(processors: Iterable[Processor], ids: Array, scores: Array) -> Array:
    """`scores` after all processors, in their order."""
    for processor in processors:
        scores = processor(ids, scores)
    return scores


def _some_left(_: Array, scores: Array) -> Array:
    """
    Raises:
        EdgeformerError: there is nothing to draw from.
    """
    sampling.choose(scores, None)
    return scores


def _without_ids(mask: sampling.Filter, _: Array, scores: Array) -> Array:
    return mask(scores)


def _at(length: int, processor: Processor, ids: Array, scores: Array) -> Array:
    return processor(ids, scores) if len(ids) == length else scores


def _before(length: int, processor: Processor, ids: Array, scores: Array) -> Array:
    return processor(ids, scores) if len(ids) < length else scores


# ---------------------------------------------------------------------------------------------------- forbid and force


def forbid(tokens: Sequence[int] | Array, _: Array, scores: Array) -> Array:
    """No token of `tokens` may follow."""
    changed = scores.copy()
    changed[tokens] = -np.inf
    return changed


def force(tokens: Sequence[int], _: Array, scores: Array) -> Array:
    """Only `tokens` may follow, all alike."""
    changed = np.full_like(scores, -np.inf)
    changed[tokens] = 0.0
    return changed


def no_repeat_ngram(size: int, ids: Array, scores: Array) -> Array:
    """No token may follow that would end an n-gram of `size` which stands in `ids`."""
    return encoder_no_repeat_ngram(ids, size, ids, scores)


def encoder_no_repeat_ngram(source: Array, size: int, ids: Array, scores: Array) -> Array:
    """No token may follow that would end an n-gram of `size` which stands in `source`."""
    places = len(source) - size + 1
    if places <= 0 or len(ids) < size - 1:
        return scores
    same = np.ones(places, bool)
    for offset, token in enumerate(ids[len(ids) - size + 1 :]):
        same &= source[offset : offset + places] == token
    last = source[size - 1 :][same]
    return forbid(last[last < len(scores)], ids, scores) if len(last) else scores


# --------------------------------------------------------------------------------------------------- raise and lower


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
        changed = scores.copy()
        changed[self.tokens] += self.biases
        for before, last, biases in self.longer:
            length = before.shape[1]
            if length <= len(ids):
                said = (before == ids[-length:]).all(1)
                np.add.at(changed, last[said], biases[said])
        return changed


def repetition_penalty(penalty: float, ids: Array, scores: Array) -> Array:
    """Scores of the tokens in `ids` divided by `penalty` where positive, multiplied where negative (CTRL, 2019)."""
    known = ids if not len(ids) or ids.max() < len(scores) else ids[ids < len(scores)]
    changed, old = scores.copy(), scores[known]
    changed[known] = np.where(old < 0, old * penalty, old / penalty)  # a token said twice is set twice, to the same
    return changed


def encoder_repetition_penalty(source: Array, penalty: float, _: Array, scores: Array) -> Array:
    """The inverse, for the tokens of the source: above 1 they become likelier."""
    return repetition_penalty(1 / penalty, source, scores)


def exponential_decay(eos: Sequence[int], start: int, factor: float, ids: Array, scores: Array) -> Array:
    """The ends' scores grow by |score| (factor ** n - 1) once n tokens more than `start` were said."""
    beyond = len(ids) - start
    if beyond <= 0:
        return scores
    changed, old = scores.copy(), scores[eos]
    finite = np.isfinite(old)
    with np.errstate(over="ignore"):
        changed[eos] = old + np.abs(np.where(finite, old, 0)) * (factor**beyond - 1)
    return changed


def remove_invalid(_: Array, scores: Array) -> Array:
    """NaN becomes 0, infinities the largest and smallest float32."""
    return np.nan_to_num(scores, nan=0.0, posinf=_LARGEST, neginf=-_LARGEST)


def log_softmax(scores: Array) -> Array:
    """log(exp(scores) / sum(exp(scores))) along the last axis."""
    shifted = scores - scores.max(-1, keepdims=True)
    table: Array = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return table
