"""The protocol of what guesses the next tokens of a sequence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

MOST_DRAFTS = 15  # of one sequence in one step: with its last token, 16 rows
LONGEST = 32  # more tokens than this do not make a guess better founded


class Proposal(NamedTuple):
    """Guesses of the next tokens, and how well founded they are.

    Guess i rests on `match + i` tokens of context that agree with it. `DraftRecord` learns how often guesses that rest
    on so many tokens are right.
    """

    tokens: list[int]
    match: int  # 1 to LONGEST if there are tokens


NOTHING = Proposal([], 0)


class Drafts(Protocol):
    """Guesses for one sequence. A wrong guess costs time, never a token: every guess is verified by the model."""

    def extend(self, tokens: Sequence[int]) -> None:
        """Append tokens that the sequence has accepted; first its prompt."""
        ...

    def propose(self, count: int, after: Sequence[int] = ()) -> Proposal:
        """At most `count` guesses of what follows the tokens of the sequence and then `after`."""
        ...
