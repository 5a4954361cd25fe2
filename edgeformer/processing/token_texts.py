"""The bytes that each token of a vocabulary stands for within a text.

A byte-level token is read through GPT-2's table of characters, a byte token `<0x0A>` is that byte, and any other token
is what the tokenizer's decoder makes of it between two others: with its leading space, without `##`.
"""

from __future__ import annotations

from typing import Any

_OTHER = "a"  # a token before and after: decoders treat the first and the last of a text specially


class TokenTexts:
    """A tokenizer's tokens as bytes. Immutable; threads may share it."""

    def __init__(self, backend: Any) -> None:
        self._backend = backend
        state = "" if backend.decoder is None else backend.decoder.__getstate__().decode()
        self._bytes = byte_alphabet() if '"ByteLevel"' in state else None
        self._falls_back = '"ByteFallback"' in state
        self._added = {token: added.content for token, added in backend.get_added_tokens_decoder().items()}

    def of(self, token: int) -> bytes | None:
        """The token's bytes, those of its name for a special token; None if there is no such token."""
        if token in self._added:
            name: str = self._added[token]
            return name.encode()
        piece: str | None = self._backend.id_to_token(token)
        if piece is None:
            return None
        if self._bytes is not None:
            found = [self._bytes.get(character) for character in piece]
            return piece.encode() if None in found else bytes(found)  # type: ignore[arg-type]
        if self._falls_back and len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
            return bytes([int(piece[3:5], 16)])
        text, after = self._decoded([_OTHER, piece, _OTHER]), self._decoded([_OTHER, _OTHER])[len(_OTHER) :]
        inside = text.startswith(_OTHER) and text.endswith(after)
        return (text[len(_OTHER) : len(text) - len(after)] if inside else piece).encode()

    def _decoded(self, pieces: list[str]) -> str:
        text: str = " ".join(pieces) if self._backend.decoder is None else self._backend.decoder.decode(pieces)
        return text


def byte_alphabet() -> dict[str, int]:
    """GPT-2's character for each byte, inverted: printable ones stand for themselves, the others are moved up."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    moved = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + place): byte for place, byte in enumerate(moved)}
