"""Token ids to text, one by one: whole characters only, and the pieces joined are the text of all ids."""

from __future__ import annotations

from collections.abc import Callable

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"

# What `clean_up_tokenization_spaces` of tokenizer_config.json asks for: spaces that a word-level tokenizer puts before
# punctuation and English contractions are taken out, in this order.
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
    """`clean_up` of a text that comes in pieces: the results joined are `clean_up` of the whole."""

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
        text, self._rest = clean_up(self._rest), ""
        return text


def _may_continue(text: str, end: int) -> bool:
    """Whether a replaced sequence may begin before `end` and go on after it.

    Only spaces are ever taken out, so the character before `end` stays: it must be one that a sequence has inside. Of
    these, a letter is inside a sequence only behind the character that stands before it there.
    """
    last, before = text[end - 1], text[end - 2 : end - 1]
    return last in " '" or (last == "n" and before == " ") or (last in "vr" and before == "'")


class Detokenizer:
    """Decodes ids one by one; the pieces joined are the text, and no piece ends within a character.

    Characters are often cut over several tokens (byte-level BPE, byte fallback), and the first token of a text may
    decode otherwise than the same token later (leading spaces). So a short window of the latest ids is decoded as a
    whole, and what is new in it is given out once it ends with whole characters.

    With byte fallback, one wrong byte makes U+FFFD of all bytes beside it, also of those that were a character. So
    the bytes of one run are given out together, at the run's end: `is_byte` says which ids are bytes.
    """

    PATIENCE = 16  # tokens; a character has at most 4 bytes, so what is still broken after these was never text
    LONGEST_RUN = 64  # bytes of byte fallback that wait for their end: the longest emoji of Unicode have 41
    CONTEXT = 64  # tokens without text that stay in the window

    def __init__(
        self,
        decode: Callable[[list[int]], str],
        is_byte: Callable[[int], bool] = lambda id: False,
        clean: bool = False,
    ) -> None:
        self._decode = decode
        self._is_byte = is_byte
        self._clean = CleanUp() if clean else None
        self._settled: list[int] = []  # the latest ids whose text was given out: context for the next
        self._pending: list[int] = []
        self._sent = 0  # characters of the window's text that were given out
        self._in_run = False

    def push(self, id: int) -> str:
        """The text that `id` completes; often empty in the middle of a character."""
        piece = self._next(id)
        return piece if self._clean is None else self._clean.push(piece)

    def flush(self) -> str:
        """What is left at the end of the stream; half a character comes out as U+FFFD."""
        piece = ""
        if self._pending:
            piece = self._decode(self._settled + self._pending)[self._sent :]
            self._settle()
        return piece if self._clean is None else self._clean.push(piece) + self._clean.flush()

    def _next(self, id: int) -> str:
        self._pending.append(id)
        byte = self._is_byte(id)
        if byte:
            self._in_run = True
        if self._in_run and len(self._pending) < self.LONGEST_RUN and (byte or not self._decode([id])):
            return ""  # a token without text, as a special one that is left out, does not end a run
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
        """The pending ids become the window, behind those before them where they have no text of their own.

        A decoder may strip the space before the first token of what it is given: the window must begin with text
        that stands before the next token, or that token would lose its space.
        """
        if self._decode(self._pending):
            self._settled = self._pending
        elif len(self._settled) + len(self._pending) < self.CONTEXT:
            self._settled = self._settled + self._pending
        self._pending = []
        self._sent = len(self._decode(self._settled))
