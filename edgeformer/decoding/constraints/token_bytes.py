"""The UTF-8 bytes that each token adds to a decoded text, for every kind of tokenizer.

A decoder may give a token another text at the beginning of a text than later: SentencePiece and WordPiece write the
space before a word into its token and remove the first one. So a token has two byte strings, `first` and `later`, and

    decode(t0, t1, ..., tn) = first[t0] + later[t1] + ... + later[tn]      as UTF-8

`TokenBytes.of` checks this law on random sequences and refuses a tokenizer that breaks it.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from edgeformer.errors import InputError
from edgeformer.processing.detokenizer import REPLACEMENT
from edgeformer.processing.token_texts import byte_alphabet
from edgeformer.processing.tokenizer import Tokenizer

_SAMPLES, _LENGTH = 200, 8  # random sequences of the check, and their tokens


@dataclass(frozen=True)
class TokenBytes:
    """`first[id]` and `later[id]`; b"" for ids that add no text: special tokens, gaps, and texts that are unknown."""

    first: list[bytes]
    later: list[bytes]

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> TokenBytes:
        """The bytes of all tokens of a tokenizer. Takes about 0.2 s for 50,000 tokens.

        Raises:
            InputError: the text of a token depends on its neighbours, so that it has no bytes of its own.
        """
        vocabulary = tokenizer.vocabulary
        size = max(vocabulary.values(), default=-1) + 1
        found = cls([b""] * size, [b""] * size)
        skipped = tokenizer.skipped_ids
        entries = {number: entry for entry, number in vocabulary.items() if number not in skipped}
        if '"ByteLevel"' in tokenizer.decoder:
            found._by_alphabet(entries)
        else:
            found._by_decoding(tokenizer, entries)
        if tokenizer.cleans_up:
            found._without_cleaned()
        found._check(tokenizer)
        return found

    def _by_alphabet(self, entries: dict[int, str]) -> None:
        alphabet = byte_alphabet()
        for number, entry in entries.items():
            try:
                data = bytes(map(alphabet.__getitem__, entry))
            except KeyError:  # as the decoder: an added token with other characters is text
                data = entry.encode()
            self.first[number] = self.later[number] = data

    def _by_decoding(self, tokenizer: Tokenizer, entries: dict[int, str]) -> None:
        fallback = '"ByteFallback"' in tokenizer.decoder
        anchor = _anchor(tokenizer, entries)
        before = tokenizer.decode([anchor])
        numbers = list(entries)
        firsts = tokenizer.decode_batch([[number] for number in numbers])
        laters = tokenizer.decode_batch([[anchor, number] for number in numbers])
        for number, first, later in zip(numbers, firsts, laters, strict=True):
            data = _fallback_byte(entries[number]) if fallback else None
            if data is not None and data >= b"\x80":  # a part of a character, which has no text
                self.first[number] = self.later[number] = data
                continue
            if REPLACEMENT not in first:
                self.first[number] = first.encode()
            if later.startswith(before) and REPLACEMENT not in later:
                self.later[number] = later[len(before) :].encode()

    def _without_cleaned(self) -> None:
        """Removes tokens whose text `clean_up` may change together with their neighbours."""
        for forms in (self.first, self.later):
            for number, data in enumerate(forms):
                if b"'" in data or data.endswith(b" "):
                    forms[number] = b""

    def _check(self, tokenizer: Tokenizer) -> None:
        draw = random.Random(0)
        firsts = [number for number, data in enumerate(self.first) if data and _text(data) is not None]
        laters = [number for number, data in enumerate(self.later) if data and _text(data) is not None]
        if not firsts or not laters:
            raise InputError("The tokenizer has no token with a text, so that no answer can follow a grammar.")
        rows = [[draw.choice(firsts), *draw.choices(laters, k=_LENGTH)] for _ in range(_SAMPLES)]
        for row, text in zip(rows, tokenizer.decode_batch(rows), strict=True):
            if self.joined(row) != text.encode():
                raise InputError(
                    f"The tokens {row} decode to {text!r}, each alone to {self.joined(row)!r}: in this tokenizer the "
                    f"text of a token depends on its neighbours. Constraints are unsupported with it."
                )

    def joined(self, ids: Sequence[int]) -> bytes:
        """The bytes of a whole answer."""
        return b"".join((self.later if place else self.first)[number] for place, number in enumerate(ids))


def _anchor(tokenizer: Tokenizer, entries: dict[int, str]) -> int:
    """A token that is a word of ASCII letters: what another token adds after it is what it adds after any."""
    for number in entries:
        text = tokenizer.decode([number])
        if text.isascii() and text.isalpha():
            return number
    raise InputError("The tokenizer has no token of ASCII letters; constraints are unsupported with it.")


def _fallback_byte(entry: str) -> bytes | None:
    """The byte of an entry such as <0x0A>."""
    if len(entry) == 6 and entry.startswith("<0x") and entry.endswith(">"):
        return bytes([int(entry[3:5], 16)])
    return None


def _text(data: bytes) -> str | None:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return None
