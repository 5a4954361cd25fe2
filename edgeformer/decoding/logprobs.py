"""Log probabilities of tokens, as OpenAI's API reports them: the token's own, and those of the likeliest.

They are those of the model: log softmax of the raw logits, before logits processors, temperature and constraints, as
OpenAI has them and vLLM's default (`raw_logprobs`). So the token that was drawn need not be among the likeliest, and
one that a constraint forced may have a very low one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from edgeformer.bundle.signature import Array
from edgeformer.decoding.sampling import weights
from edgeformer.decoding.selection import largest
from edgeformer.errors import InputError
from edgeformer.processing.token_texts import TokenTexts

MOST = 20  # `top_logprobs` of OpenAI's API


class TopToken(NamedTuple):
    """One of the likeliest tokens at a place. `text` and `bytes` are None where the bundle has no tokenizer."""

    id: int
    text: str | None
    bytes: bytes | None
    logprob: float


@dataclass(frozen=True)
class TokenLogprob:
    """A token at its place, and the likeliest there.

    `text` is what the token's bytes are as UTF-8: a part of a character becomes U+FFFD, so join the bytes of several
    tokens, not their texts. `logprob` is the natural logarithm; None for the first token of a prompt, which nothing
    precedes.
    """

    id: int
    text: str | None
    bytes: bytes | None
    logprob: float | None
    top: tuple[TopToken, ...] = ()  # the likeliest first


class RowLogprobs(NamedTuple):
    """Numbers of rows: what `TokenLogprob` shows, without texts."""

    own: Array  # float64 [rows]
    top: tuple[tuple[Array, Array], ...]  # of each row: ids int64 [count], log probabilities float64 [count]


def check_count(count: int | None, name: str = "logprobs") -> None:
    """
    Raises:
        InputError: `count` is no number of likeliest tokens: None (no log probabilities), or 0 to 20.
    """
    if count is not None and (isinstance(count, bool) or not isinstance(count, int) or not 0 <= count <= MOST):
        raise InputError(
            f"{name} is {count!r}, expected None, or the number of likeliest tokens to report: 0 (none but the "
            f"chosen one) to {MOST}."
        )


def row_logprobs(logits: Array, chosen: Sequence[int] | Array, count: int) -> RowLogprobs:
    """Log probabilities of the token `chosen` [rows] after each row of raw `logits` [rows, vocab], and of the `count`
    likeliest.

    The exponentials and the sums of each 256 are float32, as the logits are; other sums and differences are float64.
    One row at a time, so that the memory needed is that of one row.
    """
    own, top = np.empty(len(logits)), []
    for row, (scores, token) in enumerate(zip(logits, chosen, strict=True)):
        best = scores.max()
        shift = float(best) + math.log(weights(scores.astype(np.float32, copy=False), best).total)
        own[row] = float(scores[token]) - shift
        ids = largest(scores, count)
        top.append((ids, scores[ids].astype(np.float64) - shift))
    return RowLogprobs(own, tuple(top))


def token_logprobs(
    logits: Array, chosen: Sequence[int] | Array, count: int, texts: TokenTexts | None
) -> list[TokenLogprob]:
    """One `TokenLogprob` for each row of raw `logits` [rows, vocab] and the token `chosen` [rows] after it."""
    found = row_logprobs(logits, chosen, count)
    made = []
    for token, own, (ids, values) in zip(chosen, found.own.tolist(), found.top, strict=True):
        top = tuple(
            TopToken(each, *_shown(each, texts), value)
            for each, value in zip(ids.tolist(), values.tolist(), strict=True)
        )
        made.append(TokenLogprob(int(token), *_shown(int(token), texts), own, top))
    return made


def prompt_logprobs(
    logits: Array, ids: Sequence[int] | Array, count: int, texts: TokenTexts | None
) -> list[TokenLogprob]:
    """One `TokenLogprob` for each token of a prompt; the first has no log probability.

    `logits` [len(ids) - 1 or more, vocab]: row i is what follows ids[:i + 1].
    """
    first = TokenLogprob(int(ids[0]), *_shown(int(ids[0]), texts), None)
    return [first, *token_logprobs(logits[: len(ids) - 1], ids[1:], count, texts)]


def _shown(token: int, texts: TokenTexts | None) -> tuple[str | None, bytes | None]:
    data = None if texts is None else texts.of(token)
    return (None, None) if data is None else (data.decode("utf-8", errors="replace"), data)
