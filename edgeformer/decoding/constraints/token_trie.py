"""The vocabulary as llguidance sees it: a trie over the bytes of all tokens.

Ids in the trie, `size` being that of the tokenizer:

    [0, size)                the tokens, with the bytes that they add later in an answer
    [size, size + aliases)   again those tokens that have other bytes at the beginning of an answer
    then 256                 single bytes, so that every text can be written
    last                     the end of the answer; a model's own end tokens are mapped to it
"""

from __future__ import annotations

import re
import threading
import weakref
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np

from edgeformer.bundle.signature import Array
from edgeformer.decoding.constraints.token_bytes import TokenBytes
from edgeformer.errors import EngineUnavailable, InputError
from edgeformer.processing.tokenizer import Tokenizer

_known: weakref.WeakKeyDictionary[Tokenizer, TokenTrie] = weakref.WeakKeyDictionary()
_lock = threading.Lock()
_SPELLED = 4096  # texts whose tokens are kept
_LONGEST = 64  # bytes of a token that `spell` looks for; longer ones are runs of spaces and rules


class TokenTrie:
    """What all grammars of a tokenizer share. Immutable but for what it remembers; threads may share it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Builds the trie: 0.3 s for 50,000 tokens.

        Raises:
            InputError: the tokenizer's tokens have no bytes of their own.
            EngineUnavailable: llguidance is not installed.
        """
        data = TokenBytes.of(tokenizer)
        self.size = len(data.later)
        # Weak: this object lives as long as the tokenizer, and must not hold it.
        self._tokenizer = weakref.ref(tokenizer)
        self._later, self._first = data.later, data.first
        self._spelled: dict[bytes, list[int]] = {}
        special = tokenizer.skipped_ids
        changed = [i for i, (first, later) in enumerate(zip(data.first, data.later, strict=True)) if first != later]
        self.aliased = np.array(changed, np.int64)  # tokens with other bytes at the beginning, in order
        self.alias = dict(zip(changed, range(self.size, self.size + len(changed)), strict=True))
        entries = {number: entry for entry, number in tokenizer.vocabulary.items()}
        tokens = [
            entries[number].encode() if number in special else _plain(later) for number, later in enumerate(data.later)
        ]
        tokens += [_plain(data.first[number]) for number in changed]
        self._bytes = len(tokens)
        tokens += [_plain(bytes([byte])) for byte in range(256)]
        self.end = len(tokens)
        self.ll = _trie(_Spelling([*tokens, b"<end of the answer>"], [*special, self.end], self.end, weakref.ref(self)))
        self.words = -(-(self.end + 1) // 32)  # int32 words of a mask

    def at_beginning(self, token: int) -> int:
        """The id in the trie of a token that begins an answer."""
        return self.alias.get(token, token)

    @cached_property
    def beginnings(self) -> dict[bytes, list[int]]:
        """Bytes -> the tokens that add them at the beginning of an answer."""
        found: dict[bytes, list[int]] = {}
        for number, data in enumerate(self._first):
            if data:
                found.setdefault(data, []).append(number)
        return found

    @cached_property
    def _spellings(self) -> dict[bytes, int]:
        found = {bytes([byte]): self._bytes + byte for byte in range(256)}
        for number in reversed(range(self.size)):  # the smallest id of those with the same bytes
            data = self._later[number]
            if data and len(data) <= _LONGEST:
                found[data] = number
        return found

    @cached_property
    def words_of_text(self) -> list[int]:
        """Some tokens of letters. Where none of them may follow an answer is no running text, but keys, punctuation,
        numbers or one of few words.
        """
        plain = [number for number, data in enumerate(self._later) if re.fullmatch(rb"[a-z]{3,5}", data)]
        every = plain or [number for number, data in enumerate(self._later) if data.decode(errors="replace").isalpha()]
        return [every[len(every) * place // 3] for place in range(3)] if every else []

    def spell(self, data: bytes) -> list[int]:
        """Tokens whose bytes are exactly `data`: the tokenizer's own, or the fewest that there are.

        The last results are kept: a grammar forces the same keys in each of its answers.
        """
        found = self._spelled.get(data)
        if found is None:
            if len(self._spelled) >= _SPELLED:
                self._spelled.clear()
            found = self._spelled[data] = self._spell(data)
        return list(found)

    def _spell(self, data: bytes) -> list[int]:
        tokenizer = self._tokenizer()
        text = data.decode(errors="replace")
        if tokenizer is not None:
            try:
                ids = tokenizer.encode(text, add_special_tokens=False)
            except InputError:  # the text of an infilling token
                ids = []
            if b"".join(self._later[number] for number in ids) == data:
                return ids
        return self._fewest(data)

    def spell_beginning(self, data: bytes) -> list[int]:
        """As `spell`, for the beginning of an answer; [] where the tokenizer's own ids are not exact."""
        tokenizer = self._tokenizer()
        if tokenizer is None:
            return []
        try:
            ids = tokenizer.encode(data.decode(errors="replace"), add_special_tokens=False)
        except InputError:
            return []
        forms = [self._first[number] if place == 0 else self._later[number] for place, number in enumerate(ids)]
        return ids if b"".join(forms) == data else []

    def can_write(self, data: bytes) -> bool:
        """Whether an answer can be exactly `data`."""
        starts = (end for end in range(1, len(data) + 1) if data[:end] in self.beginnings)
        return any(max(self._fewest(data[end:]), default=0) < self.size for end in starts)

    def _fewest(self, data: bytes) -> list[int]:
        """The shortest way through `data`; a single byte that is no token costs more than any number of tokens."""
        known, outside = self._spellings, len(data) + 1
        costs, choice = [0] + [0] * len(data), [0] * (len(data) + 1)
        for end in range(1, len(data) + 1):
            ways = []
            for begin in range(max(0, end - _LONGEST), end):
                number = known.get(data[begin:end])
                if number is not None:
                    ways.append((costs[begin] + (1 if number < self.size else outside), begin))
            costs[end], choice[end] = min(ways)
        ids, end = [], len(data)
        while end:
            ids.append(known[data[choice[end] : end]])
            end = choice[end]
        return ids[::-1]

    def allowed_at_beginning(self, mask: Array) -> Array:
        """The tokens that a bit mask, int32 [words], allows as the first of an answer; bool [size]."""
        bits = np.unpackbits(mask.view(np.uint8), bitorder="little").view(np.bool_)
        allowed = bits[: self.size].copy()
        allowed[self.aliased] = bits[self.size : self.size + len(self.aliased)]
        return allowed


def token_trie(tokenizer: Tokenizer) -> TokenTrie:
    """The trie of a tokenizer, built when first asked for and kept as long as the tokenizer.

    Raises:
        InputError, EngineUnavailable: as `TokenTrie`.
    """
    with _lock:
        found = _known.get(tokenizer)
        if found is None:
            found = _known[tokenizer] = TokenTrie(tokenizer)
        return found


class _Spelling:
    """The tokenizer that llguidance's wrapper asks for."""

    bos_token_id = None

    def __init__(
        self, tokens: list[bytes], special: Sequence[int], end: int, trie: weakref.ReferenceType[TokenTrie]
    ) -> None:
        self.tokens, self.special_token_ids, self.eos_token_id = tokens, special, end
        self._trie = trie  # weak: the trie holds llguidance's object, which holds this one where Python sees no cycle

    def __call__(self, data: bytes) -> list[int]:
        trie = self._trie()
        return [] if trie is None else trie.spell(data)


def _trie(spelling: _Spelling) -> Any:
    try:
        from llguidance import LLTokenizer, TokenizerWrapper
    except ImportError as error:
        raise EngineUnavailable(
            "Constraints need llguidance, which is not installed: pip install llguidance."
        ) from error
    return LLTokenizer(TokenizerWrapper(spelling))


def _plain(data: bytes) -> bytes:
    """The bytes, if they are not what llguidance marks special tokens with: no UTF-8 text has a byte 0xFF."""
    return b"" if data[:1] == b"\xff" else data
