"""Token ids to text in which the special tokens of calls and reasoning are kept."""

from __future__ import annotations

from collections.abc import Sequence

from edgeformer.processing.tokenizer import Tokenizer
from edgeformer.processing.tool_format import AnswerFormat


class TokenText:
    """A detokenizer for an `AnswerParser`: special tokens that the format has become their text.

    A plain detokenizer leaves out all special tokens, also those that a call begins and ends with.
    """

    def __init__(self, tokenizer: Tokenizer, format: AnswerFormat) -> None:  # noqa: A002
        texts = format.texts
        self._kept = {
            number: text for text, number in tokenizer.special_texts.items() if any(text in one for one in texts)
        }
        self._detokenizer = tokenizer.detokenizer()

    def push(self, id: int) -> str:  # noqa: A002
        """The text that `id` completes."""
        return self._detokenizer.push(id) + self._kept.get(id, "")

    def flush(self) -> str:
        """The rest of the text."""
        return self._detokenizer.flush()

    @classmethod
    def of(cls, tokenizer: Tokenizer, format: AnswerFormat, ids: Sequence[int]) -> str:  # noqa: A002
        """The text of all `ids`."""
        made = cls(tokenizer, format)
        return "".join([*(made.push(id) for id in ids), made.flush()])  # noqa: A001
