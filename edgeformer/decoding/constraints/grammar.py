"""A compiled grammar, and the position of one answer in it: llguidance's matcher over the trie of a tokenizer."""

from __future__ import annotations

import os
import threading
from collections.abc import Collection, Sequence
from contextlib import suppress
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeformer.bundle.signature import Array
from edgeformer.decoding.constraints.habits import Habits
from edgeformer.decoding.constraints.token_trie import TokenTrie
from edgeformer.decoding.sampling import Candidates
from edgeformer.errors import GrammarError, InputError, StateError, first_line
from edgeformer.threads import BEGIN, Beside

if TYPE_CHECKING:
    from concurrent.futures import Future, ThreadPoolExecutor

_FEW = 64  # words of 32 tokens: up to here, gathering the allowed scores is faster than choosing among all


class Grammar:
    """What an answer may be. Immutable but for the habits of its answers; threads may share it."""

    def __init__(self, trie: TokenTrie, matcher: Any, eos: Collection[int], vocab_size: int) -> None:
        """`matcher` stands at the beginning; `vocab_size` is the length of the logits, `eos` the ids of end tokens."""
        self.trie, self.vocab_size = trie, vocab_size
        self.eos = frozenset(int(number) for number in eos if 0 <= number < vocab_size)
        self.followers = Habits()  # token -> the next one, where few may follow
        self.replacements = Habits()  # token -> what answers have in its place; see `Constraint.replacements`
        self._matcher = matcher
        self._lock = threading.Lock()

    def start(self, *, learns: bool = True) -> GrammarConstraint:
        """The constraint of a new answer. `learns`: whether the habits of its tokens are noted, for drafts."""
        with self._lock:
            return GrammarConstraint(self, self._matcher.deep_copy(), 0, learns)


class GrammarConstraint:
    """The position of one answer in a grammar; see `Constraint`."""

    def __init__(self, grammar: Grammar, matcher: Any, length: int, learns: bool) -> None:
        self._grammar, self._idle_matcher = grammar, matcher
        self._computing: Future[object] | None = None  # a mask that another thread computes now
        self._is_computed = False  # whether the buffer holds the mask of this position
        self._length = length  # tokens accepted; -1 after an end token
        self._last = -1  # the last of them
        self._framed = 0
        self._learns = learns
        self._forced: list[int] = []  # a beginning of the tokens that must follow, where it is known
        self._limit = min(grammar.trie.size, grammar.vocab_size)  # of the ids that are tokens of both
        self._buffer = np.zeros(grammar.trie.words, np.int32)

    # ------------------------------------------------------------------------------------------------------- Constraint

    def apply(self, scores: Array) -> Candidates:
        """As `Constraint.apply`."""
        if scores.shape != (self._grammar.vocab_size,):
            raise InputError(f"The scores have shape {scores.shape}, expected ({self._grammar.vocab_size},).")
        mask = self._mask()
        filled = np.flatnonzero(mask)
        if len(filled) > _FEW:
            return Candidates(np.minimum(scores, _limits(mask, scores.dtype)[: len(scores)]))
        ids = np.flatnonzero(_bits(mask[filled]))
        ids = filled[ids >> 5] * 32 + (ids & 31)
        return Candidates(scores[ids], ids)

    def accept(self, token: int) -> None:
        """As `Constraint.accept`."""
        self._check_open()
        if not self._advance(token):
            raise InputError(f"The token {token} may not follow in the constraint; choose one that `apply` leaves.")

    def allows(self, tokens: Sequence[int]) -> list[bool]:
        """As `Constraint.allows`."""
        self._check_open()
        ask, end, limit = self._matcher.validate_tokens, self._grammar.trie.end, self._limit
        if not self._aliased and limit > max(tokens) and min(tokens) >= 0 and self._grammar.eos.isdisjoint(tokens):
            return [ask([token]) == 1 for token in tokens]
        asked = (self._inside(token) for token in tokens)
        return [False if inside is None else self.may_end if inside == end else ask([inside]) == 1 for inside in asked]

    def only(self) -> int | None:
        """As `Constraint.only`."""
        if self._aliased or self.ended:
            return None
        if not self._forced:
            self._forced = self._matcher.compute_ff_tokens()
        forced = self._forced
        # A single byte that is no token, or an end token, is no choice: the mask says what that means.
        return forced[0] if forced and self._inside(forced[0]) == forced[0] else None

    def _advance(self, token: int) -> bool:
        """By the token if it may follow; whether it may."""
        inside, matcher = self._inside(token), self._matcher
        if inside is None:
            return False
        if inside == self._grammar.trie.end:
            if matcher.is_accepting():
                self._length = -1
            return self._length < 0
        is_framed = self._learns and not any(
            matcher.validate_tokens([word]) for word in self._grammar.trie.words_of_text
        )
        if matcher.try_consume_tokens([inside]) != 1:
            self._check_matcher()
            return False
        self._length += 1
        self._is_computed = False
        self._forced = self._forced[1:] if self._forced[:1] == [inside] else []
        if self._learns:
            self._grammar.followers.learn(self._last, token if is_framed else None)
            self._framed = self._framed + 1 if is_framed else 0
        self._last = token
        return True

    def forced(self, limit: int) -> list[int]:
        """As `Constraint.forced`: the text that must follow, in the tokenizer's own tokens."""
        if limit < 1 or self.ended:
            return []
        ids = self._forced_at_beginning() if self._aliased else self._matcher.compute_ff_tokens()
        return list(ids[: self.valid(ids[:limit])])

    def likely(self, limit: int) -> list[int]:
        """As `Constraint.likely`: unlike `forced`, also where the last token of the text may be a longer one."""
        if limit < 1 or self.ended:
            return []
        if self._aliased:
            ids = self._forced_at_beginning()
        else:
            text = self._matcher.compute_ff_bytes()
            ids = self._grammar.trie.spell(text) if text else []
        return ids[: self.valid(ids[:limit])]

    @property
    def habit(self) -> tuple[int, float]:
        """As `Constraint.habit`."""
        return self._grammar.followers.guess(self._last)

    @property
    def replacements(self) -> Habits:
        """As `Constraint.replacements`."""
        return self._grammar.replacements

    @property
    def framed(self) -> int:
        """As `Constraint.framed`."""
        return self._framed

    def valid(self, tokens: Sequence[int]) -> int:
        """As `Constraint.valid`."""
        if self._length < 0:
            return 0
        inside: list[int] = []
        for place, token in enumerate(tokens):
            number = self._inside(int(token), at_beginning=place == 0 and self._length == 0)
            if number is None:
                break
            inside.append(number)
            if number == self._grammar.trie.end:
                break
        if not inside or inside[0] == self._grammar.trie.end:
            return int(bool(inside) and self.may_end)
        return int(self._matcher.validate_tokens(inside))

    @property
    def ended(self) -> bool:
        """As `Constraint.ended`."""
        return self._length < 0 or bool(self._matcher.is_stopped())

    def fork(self) -> GrammarConstraint:
        """As `Constraint.fork`; costs 5 to 80 microseconds."""
        copy = GrammarConstraint(self._grammar, self._matcher.deep_copy(), self._length, learns=False)
        copy._last, copy._framed = self._last, self._framed
        return copy

    def prepare(self) -> None:
        """As `Constraint.prepare`."""
        if self._computing is None and not self._is_computed and not self.ended and (executor := _beside()) is not None:
            self._computing = executor.submit(self._compute, self._idle_matcher)

    # ------------------------------------------------------------------------------------------------------------- more

    @property
    def may_end(self) -> bool:
        """Whether the answer is complete here."""
        return self._length < 0 or bool(self._matcher.is_accepting())

    def allowed_mask(self) -> Array:
        """The tokens that may follow, bool [vocab]; a new array.

        Raises:
            StateError: no token may follow.
        """
        bits = _bits(self._mask())[: self._grammar.vocab_size]
        missing = self._grammar.vocab_size - len(bits)
        return np.concatenate([bits, np.zeros(missing, np.bool_)]) if missing else bits

    @property
    def _matcher(self) -> Any:
        """llguidance's, which no other thread uses then."""
        computing, self._computing = self._computing, None
        if computing is not None:
            computing.result()
        return self._idle_matcher

    def _compute(self, matcher: Any) -> None:
        matcher.unsafe_compute_mask_ptr(self._buffer.ctypes.data, self._buffer.nbytes)
        self._is_computed = True

    @property
    def _aliased(self) -> bool:
        """Whether tokens may have other bytes now than later."""
        return self._length == 0 and len(self._grammar.trie.aliased) > 0

    def _inside(self, token: int, at_beginning: bool | None = None) -> int | None:
        """The id in the trie; None for what is no token of the logits."""
        grammar = self._grammar
        if token in grammar.eos:
            return grammar.trie.end
        if not 0 <= token < self._limit:
            return None
        begins = self._length == 0 if at_beginning is None else at_beginning
        return grammar.trie.at_beginning(token) if begins else token

    def _mask(self) -> Array:
        """A bit for each token of the logits that may follow, int32 [ceil(vocab / 32)]; good until the next call."""
        self._check_open()
        grammar, trie = self._grammar, self._grammar.trie
        matcher, buffer = self._matcher, self._buffer
        if not self._is_computed:
            self._compute(matcher)
        self._check_matcher()
        may_end = bool(buffer[trie.end >> 5] >> (trie.end & 31) & 1)
        if self._aliased:
            mask = _words(self._allowed_at_beginning(), -(-grammar.vocab_size // 32))
        else:
            mask = _cut(buffer, min(trie.size, grammar.vocab_size), -(-grammar.vocab_size // 32))
        bits = mask.view(np.uint32)
        for number in grammar.eos:
            bit = np.uint32(1 << (number & 31))
            bits[number >> 5] = bits[number >> 5] | bit if may_end else bits[number >> 5] & ~bit
        if not mask.any():
            raise GrammarError(self._dead_end(may_end))
        return mask

    def _allowed_at_beginning(self) -> Array:
        trie = self._grammar.trie
        text = self._matcher.compute_ff_bytes()
        if not text:
            return trie.allowed_at_beginning(self._buffer)[: self._grammar.vocab_size]
        # llguidance allows only its own spelling of a forced text, which knows nothing of beginnings.
        allowed = np.zeros(trie.size, np.bool_)
        for end in range(1, len(text) + 1):
            allowed[trie.beginnings.get(text[:end], [])] = True
        return allowed[: self._grammar.vocab_size]

    def _forced_at_beginning(self) -> list[int]:
        text = self._matcher.compute_ff_bytes()
        return self._grammar.trie.spell_beginning(text) if text else []

    def _check_open(self) -> None:
        if self._length < 0:
            raise StateError("The answer has ended: no token may follow its end token. Start a new constraint.")

    def _check_matcher(self) -> None:
        if self._matcher.is_error():
            problem = first_line(Exception(self._matcher.get_error()))
            if problem.startswith("NoExtension"):
                raise GrammarError(self._dead_end(may_end=False))
            raise GrammarError(
                f"The grammar engine gave up: {problem}. The grammar is too ambiguous or too large; simplify it."
            )

    def _dead_end(self, may_end: bool) -> str:
        if may_end:
            return "The answer is complete, and the model has no end token in its logits; stop where `ended` is true."
        return (
            "No token of the vocabulary can continue the answer as the grammar demands. The grammar needs a text that "
            "this tokenizer cannot write, or that no text can fulfil; change the grammar."
        )


@cache
def _beside() -> ThreadPoolExecutor | None:
    """The thread that computes masks while an engine runs; llguidance leaves Python free meanwhile.

    None where it cannot be started: a mask is then computed where it is needed.
    """
    from concurrent.futures import ThreadPoolExecutor

    executor = ThreadPoolExecutor(1, "edgeformer-masks")
    first = Beside(lambda: executor.submit(int))  # starts the thread
    first.start()
    with suppress(RuntimeError, MemoryError, TimeoutError):
        if first.wait(BEGIN):
            first.result().result(BEGIN)
            return executor
    first.claim()
    return None


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_beside.cache_clear)  # the thread is the parent's


def _limits(words: Array, dtype: Any) -> Array:
    """Per bit of `words`, inf where it is set and -inf where it is not. `minimum` with it takes a third of `where`.

    NaN stays NaN.
    """
    found: Array = np.take(_limits_of_bytes(dtype), words.view(np.uint8), axis=0)
    return found.ravel()


@lru_cache
def _limits_of_bytes(dtype: Any) -> Array:
    bits = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
    return np.where(bits, np.inf, -np.inf).astype(dtype)  # (256, 8)


def _bits(words: Array) -> Array:
    return np.unpackbits(words.view(np.uint8), bitorder="little").view(np.bool_)


def _words(allowed: Array, length: int) -> Array:
    packed = np.zeros(length * 4, np.uint8)
    data = np.packbits(allowed, bitorder="little")
    packed[: len(data)] = data
    return packed.view(np.int32)


def _cut(words: Array, count: int, length: int) -> Array:
    """The first `count` bits, in int32 [length]."""
    found = np.zeros(length, np.uint32)
    whole = -(-count // 32)
    found[:whole] = words[:whole].view(np.uint32)
    if count % 32:
        found[whole - 1] &= np.uint32((1 << (count % 32)) - 1)
    return found.view(np.int32)
