"""Generation settings that are texts, as token ids of a bundle's tokenizer: DRY's breakers, the newline of XTC."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from weakref import WeakKeyDictionary

from edgeformer.decoding.dry import Ids, breaker_ids
from edgeformer.decoding.generation_config import GenerationConfig
from edgeformer.errors import InputError
from edgeformer.processing.tokenizer import Tokenizer

# Reading a vocabulary takes 0.1 s for 49,152 tokens, so the breakers of each tokenizer are kept as long as it lives.
_BREAKERS: WeakKeyDictionary[Tokenizer, dict[tuple[str, ...], tuple[Ids, ...]]] = WeakKeyDictionary()
_KEPT = 16  # sets of breakers of one tokenizer


def with_token_ids(config: GenerationConfig, tokenizer: Tokenizer | None) -> GenerationConfig:
    """The config with `dry_breaker_ids` and `xtc_kept_ids` completed by what its texts are in the vocabulary.

    Raises:
        InputError: DRY has breakers that are texts, and there is no tokenizer.
    """
    if config.dry_multiplier and config.dry_sequence_breakers:
        if tokenizer is None:
            raise InputError(
                "dry_sequence_breakers are texts, and this bundle has no tokenizer; pass dry_sequence_breakers=[], "
                "and the breakers as token ids in dry_breaker_ids."
            )
        found = _breakers(config.dry_sequence_breakers, tokenizer)
        config = replace(config, dry_breaker_ids=(*config.dry_breaker_ids, *found), dry_sequence_breakers=())
    if config.xtc_probability and tokenizer is not None:
        # The last token of a newline, as the author has it: SentencePiece puts a space before.
        newline = tokenizer.encode("\n", add_special_tokens=False)[-1:]
        config = replace(config, xtc_kept_ids=(*config.xtc_kept_ids, *newline))
    return config


def _breakers(breakers: tuple[str, ...], tokenizer: Tokenizer) -> tuple[Ids, ...]:
    kept = _BREAKERS.setdefault(tokenizer, {})
    if breakers not in kept:
        texts = [tokenizer.token_texts.of(token) or b"" for token in range(tokenizer.size)]
        if len(kept) >= _KEPT:
            kept.clear()
        kept[breakers] = breaker_ids(breakers, texts, partial(_inside, tokenizer))
    return kept[breakers]


def _inside(tokenizer: Tokenizer, text: str) -> list[int]:
    """Token ids of a text that follows another: SentencePiece puts a space before the first word of a whole text."""
    newline = tokenizer.encode("\n", add_special_tokens=False)
    ids = tokenizer.encode("\n" + text, add_special_tokens=False)
    told = ids[: len(newline)] == newline
    return ids[len(newline) :] if told else tokenizer.encode(text, add_special_tokens=False)
