"""Logits processors: one list for every model and every beam, built from a GenerationConfig.

`logits_processors` makes the list. First come functions (ids so far, scores of the whole vocabulary) -> scores, then,
where an answer is sampled, a `Step` on the candidates: the filters. `next_token` gives the token that `process` and a
draw would give, and faster: what follows a filter works on the tokens that it left. Neither changes its arguments.

`ids` is int64 [length], prompt and answer; `scores` float [vocab]; a token that may not follow has the score -inf.
Formulas: transformers' `generation/logits_process.py`, with which the tests compare. Each processor is a pure function;
the one that needs chance (XTC) takes the random generator of the answer, as the draw does: the seed says it all.

| order | setting | transformers | llama.cpp |
|---|---|---|---|
| 1 | logit_bias | - (SequenceBias of one token) | logit_bias, first too |
| 2 | sequence_bias | 1 | - |
| 3 | encoder_repetition_penalty, repetition_penalty | 2, 3 | penalties: repeat (last 64 tokens) |
| 4 | frequency_penalty, presence_penalty | - | penalties: after repeat, of the last 64 tokens |
| 5 | dry_* | - | dry, after the penalties |
| 6 | no_repeat_ngram_size, encoder_no_repeat_ngram_size, bad_words_ids | 4, 5, 6 | - |
| 7 | min_length, min_new_tokens | 7, 8 | - |
| 8 | forced_bos_token_id, forced_eos_token_id | 9, 10 | - |
| 9 | remove_invalid_values, exponential_decay_length_penalty | 11, 12 | - |
| 10 | suppress_tokens, begin_suppress_tokens | 13, 14 | ignore_eos is a bias of -inf |
| 11 | forced_tokens | the former forced_decoder_ids: here too | - |
| 12 | temperature | 15 | last |
| 13 | top_h, top_k, top_p, min_p, typical_p | in this order | top_k, typ_p, top_p, min_p |
| 14 | epsilon_cutoff, eta_cutoff | in this order | - |
| 15 | xtc_* | - (text-generation-webui: last) | after min_p, before temperature |
| 16 | renormalize_logits | last | - |

The rules of a task (times in a transcript) stand between 11 and 12. 12 to 15 apply only where an answer is sampled.
vLLM has 1 before 3 and 4 as here, then temperature, min_p, and top_k with top_p at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from edgeformer.bundle.signature import Array
from edgeformer.decoding import penalties, sampling
from edgeformer.decoding.dry import Dry, by_first_token
from edgeformer.decoding.filters import Filter, checked_filters
from edgeformer.decoding.generation_config import GenerationConfig
from edgeformer.decoding.sampling import Candidates, Random

Change = Callable[[Array, Array], Array]  # may write into the scores that it is given
_LARGEST = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class Step:
    """A processor of the tokens that are left, whatever was said before: a filter, or what follows the filters."""

    apply: Filter


Processor = Change | Step


def logits_processors(
    config: GenerationConfig, prompt_length: int, max_new_tokens: int, source: Sequence[int] | Array | None
) -> tuple[Processor, ...]:
    """What changes the logits of an answer to a prompt of `prompt_length` tokens; empty where nothing does.

    `source` is what the encoder read, or a decoder's prompt; None where that is not made of tokens.
    """
    given = None if source is None else np.asarray(source, np.int64)
    made: list[Processor] = [
        *_raised_and_lowered(config, prompt_length, given),
        *_forbidden_and_forced(config, prompt_length, max_new_tokens, given),
    ]
    if config.do_sample:
        # One token that ends nothing must stay for a beam to go on with.
        least = max(2, len(config.eos_token_id) + 1) if config.num_beams > 1 else 1
        made += [Step(each) for each in checked_filters(config, least)]
    if config.renormalize_logits:
        made.append(Step(_renormalized))
    return tuple(made)


def with_changes(processors: Sequence[Processor], changes: Sequence[Change]) -> tuple[Processor, ...]:
    """The processors with more changes, which belong to a task: after all others, and before a token is drawn."""
    place = next((i for i, each in enumerate(processors) if isinstance(each, Step)), len(processors))
    return (*processors[:place], *changes, *processors[place:])


def _raised_and_lowered(config: GenerationConfig, prompt_length: int, source: Array | None) -> Iterable[Change]:
    if config.logit_bias:
        yield penalties.SequenceBias.of(((token,), bias) for token, bias in config.logit_bias)
    if config.sequence_bias:
        yield penalties.SequenceBias.of(config.sequence_bias)
    if config.encoder_repetition_penalty != 1 and source is not None:
        yield partial(penalties.encoder_repetition_penalty, source, config.encoder_repetition_penalty)
    if config.repetition_penalty != 1:
        yield partial(penalties.repetition_penalty, config.repetition_penalty)
    frequency, presence = config.frequency_penalty, config.presence_penalty
    if frequency or presence:
        yield partial(penalties.frequency_and_presence_penalty, frequency, presence, prompt_length)
    if config.dry_multiplier and config.dry_penalty_last_n:
        strength, breakers = (config.dry_multiplier, config.dry_base), by_first_token(config.dry_breaker_ids)
        yield Dry(*strength, config.dry_allowed_length, config.dry_penalty_last_n, breakers)


def _forbidden_and_forced(
    config: GenerationConfig, prompt_length: int, max_new_tokens: int, source: Array | None
) -> Iterable[Change]:
    eos = list(config.eos_token_id)
    if config.no_repeat_ngram_size:
        yield partial(no_repeat_ngram, config.no_repeat_ngram_size)
    if config.encoder_no_repeat_ngram_size and source is not None:
        yield partial(encoder_no_repeat_ngram, source, config.encoder_no_repeat_ngram_size)
    words = [(word, -np.inf) for word in config.bad_words_ids if len(word) > 1 or word[0] not in eos]
    if words:
        yield penalties.SequenceBias.of(words)
    shortest = max(config.min_length, prompt_length + config.min_new_tokens if config.min_new_tokens else 0)
    if shortest > prompt_length and eos:
        yield partial(_before, shortest, partial(forbid, eos))
    if config.forced_bos_token_id is not None and prompt_length == 1:
        yield partial(_at, 1, partial(force, [config.forced_bos_token_id]))
    if config.forced_eos_token_id:
        last = prompt_length + max_new_tokens - 1
        yield partial(_at, last, partial(force, list(config.forced_eos_token_id)))
    if config.remove_invalid_values:
        yield remove_invalid
    if config.exponential_decay_length_penalty is not None and eos:
        start, factor = config.exponential_decay_length_penalty
        yield partial(penalties.exponential_decay, eos, prompt_length + start, factor)
    if config.suppress_tokens:
        yield partial(forbid, list(config.suppress_tokens))
    if config.begin_suppress_tokens:
        begin = prompt_length + (config.forced_bos_token_id is not None and prompt_length == 1)
        yield partial(_at, begin, partial(forbid, list(config.begin_suppress_tokens)))
    if config.forced_tokens:
        yield partial(_forced_at, {prompt_length + place: token for place, token in config.forced_tokens})


# ------------------------------------------------------------------------------------------------------------- running


def process(processors: Sequence[Processor], ids: Array, scores: Array, rng: Random | None = None) -> Array:
    """`scores` [vocab] after all processors, in their order. `rng` is that of a sampled answer; XTC takes a number."""
    return filtered(processors, Candidates(changed(processors, ids, scores)), rng).spread(len(scores))


def next_token(
    processors: Sequence[Processor], ids: Array, scores: Array, rng: Random | None, largest: Any = None
) -> int:
    """The token that follows `ids`: a draw of what `process` leaves with `rng`, the most likely without. `largest` is
    that of the scores, where it is known.

    Raises:
        EdgeformerError: no token is left.
    """
    after = changed(processors, ids, scores)
    return sampling.choose(
        filtered(processors, Candidates(after, None, largest if after is scores else None), rng), rng
    )


def changed(processors: Sequence[Processor], ids: Array, scores: Array) -> Array:
    """`scores` [vocab] after all processors that are no steps; a new array where there is one."""
    changes = [processor for processor in processors if not isinstance(processor, Step)]
    scores = scores.copy() if changes else scores
    for change in changes:
        scores = change(ids, scores)
    return scores


def filtered(processors: Sequence[Processor], candidates: Candidates, rng: Random | None) -> Candidates:
    """What the steps among the processors leave of the candidates."""
    for processor in processors:
        if isinstance(processor, Step):
            candidates = processor.apply(candidates, rng)
    return candidates


def _renormalized(candidates: Candidates, _: Random | None) -> Candidates:
    return Candidates(log_softmax(candidates.scores), candidates.tokens)


def _at(length: int, change: Change, ids: Array, scores: Array) -> Array:
    return change(ids, scores) if len(ids) == length else scores


def _before(length: int, change: Change, ids: Array, scores: Array) -> Array:
    return change(ids, scores) if len(ids) < length else scores


def _forced_at(tokens: dict[int, int], ids: Array, scores: Array) -> Array:
    token = tokens.get(len(ids))
    return scores if token is None else force([token], ids, scores)


# ---------------------------------------------------------------------------------------------------- forbid and force


def forbid(tokens: Sequence[int] | Array, _: Array, scores: Array) -> Array:
    """No token of `tokens` may follow."""
    scores[tokens] = -np.inf
    return scores


def force(tokens: Sequence[int], _: Array, scores: Array) -> Array:
    """Only `tokens` may follow, all alike."""
    scores[:] = -np.inf
    scores[tokens] = 0.0
    return scores


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


def remove_invalid(_: Array, scores: Array) -> Array:
    """NaN becomes 0, infinities the largest and smallest float32."""
    return np.nan_to_num(scores, nan=0.0, posinf=_LARGEST, neginf=-_LARGEST)


def log_softmax(scores: Array) -> Array:
    """log(exp(scores) / sum(exp(scores))) along the last axis."""
    shifted = scores - scores.max(-1, keepdims=True)
    table: Array = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return table
