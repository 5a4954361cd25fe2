"""Streaming token ids to text: pieces end at whole characters, and joined they are the text of all ids."""

from __future__ import annotations

from collections.abc import Callable

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"

# `clean_up_tokenization_spaces` of tokenizer_config.json: removes the spaces that a word-level tokenizer puts before
# punctuation and English contractions, in this order.
_CLEANED = (
    *((f" {mark}", mark) for mark in ".?!,"),
    (" ' ", "'"),
    *((f" {end}", end) for end in ("n't", "'m", "'s", "'ve", "'re")),
)


def clean_up(text: str) -> str:
    """`text` without spaces before punctuation and contractions."""
    for spaced, close in _CLEANED:
        text = text.replace(spaced, close)
    return text


class CleanUp:
    """`clean_up` of a text in pieces: the results joined are `clean_up` of the whole text."""

    def __init__(self) -> None:
        self._rest = ""

    def push(self, piece: str) -> str:
        """The cleaned text that no later piece can change."""
        text = self._rest + piece
        end = len(text)
        while end and _may_continue(text, end):
            end -= 1
        self._rest = text[end:]
        return clean_up(text[:end])

    def flush(self) -> str:
        """The cleaned rest of the text."""
        text, self._rest = clean_up(self._rest), ""
        return text


def _may_continue(text: str, end: int) -> bool:
    """Whether a replaced sequence may begin before `end` and end after it.

    The character before `end` must then be inside a sequence of `_CLEANED`, with the character that precedes it there.
    """
    last, before = text[end - 1], text[end - 2 : end - 1]
    return last in " '" or (last == "n" and before == " ") or (last in "vr" and before == "'")


class Detokenizer:
    """Decodes ids one by one; the pieces joined are the text, and no piece ends within a character.

    A character may be split over several tokens (byte-level BPE, byte fallback), and a token may decode differently at
    the beginning of a text (leading spaces). So a short window of the latest ids is decoded as a whole, and its new
    text is returned once it ends with a whole character. Where each token is bytes whatever stands before it
    (`is_bytes`), no window is needed, and most tokens are looked up.

    With byte fallback, one invalid byte turns all adjacent bytes into U+FFFD, also those of valid characters. So the
    bytes of a run are decoded together, at the end of the run. `is_byte` says which ids are bytes.
    """

    PATIENCE = 16  # tokens; a character has at most 4 bytes, so an incomplete one is invalid after these
    LONGEST_RUN = 64  # bytes of a run of byte fallback; the longest emoji of Unicode have 41
    CONTEXT = 64  # tokens without text that stay in the window

    def __init__(
        self,
        decode: Callable[[list[int]], str],
        is_byte: Callable[[int], bool] = lambda _: False,
        clean: bool = False,
        is_bytes: bool = False,
    ) -> None:
        self._decode = decode
        self._is_bytes = is_bytes
        self._is_byte = is_byte
        self._clean = CleanUp() if clean else None
        self._settled: list[int] = []  # the latest ids whose text was returned: context for the next
        self._pending: list[int] = []
        self._sent = 0  # characters of the window's text that were returned
        self._in_run = False

    def push(self, id: int) -> str:  # noqa: A002
        """The text that `id` completes; often empty in the middle of a character."""
        piece = self._next(id)
        return piece if self._clean is None else self._clean.push(piece)

    def flush(self) -> str:
        """The rest of the text; an incomplete character becomes U+FFFD."""
        piece = ""
        if self._pending:
            piece = self._decode(self._settled + self._pending)[self._sent :]
            self._settle()
        return piece if self._clean is None else self._clean.push(piece) + self._clean.flush()

    def _next(self, token: int) -> str:
        self._pending.append(token)
        byte = self._is_byte(token)
        if byte:
            self._in_run = True
        if self._in_run and len(self._pending) < self.LONGEST_RUN and (byte or not self._decode([token])):
            return ""  # a token without text (a skipped special token) does not end a run
        self._in_run = byte
        text = self._decode(self._settled + self._pending)
        whole = text.rstrip(REPLACEMENT)
        if len(whole) < len(text):
            if len(self._pending) < self.PATIENCE:
                return ""
            # Flush invalid UTF-8 as U+FFFD, except what may be the beginning of a character: at most 3 bytes.
            end = max(len(whole), len(text) - 3)
            new, self._sent = text[self._sent : end], max(self._sent, end)
            return new
        new = text[self._sent :]
        self._settle()
        return new

    def _settle(self) -> None:
        """Make the pending ids the window; append them to it if they have no text.

        A decoder may strip the space before the first token: the window must contain text before the next token, or
        that token would lose its space.
        """
        if self._is_bytes:
            self._pending, self._sent = [], 0
            return
        text = self._decode(self._pending)
        if text:
            self._settled, self._sent = self._pending, len(text)
        else:
            if len(self._settled) + len(self._pending) < self.CONTEXT:
                self._settled = self._settled + self._pending
            self._sent = len(self._decode(self._settled))
        self._pending = []
