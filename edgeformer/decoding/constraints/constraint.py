"""The interface of a constraint: the position of one answer in a grammar."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from edgeformer.bundle.signature import Array
from edgeformer.decoding.constraints.habits import Habits
from edgeformer.decoding.sampling import Candidates


class Constraint(Protocol):
    """Which tokens may follow in one answer. Belongs to one sequence; not thread-safe."""

    def apply(self, scores: Array) -> Candidates:
        """The tokens that may follow with their `scores` [vocab]; or all tokens, with -inf where one may not.

        An end token keeps its score only where the answer may end.

        Raises:
            StateError: no token may follow.
        """
        ...

    def prepare(self) -> None:
        """Another thread may do now what the next `apply` needs: while an engine makes the scores."""
        ...

    def accept(self, token: int) -> None:
        """Advances by the chosen token.

        Raises:
            InputError: the token may not follow; nothing has changed.
        """
        ...

    def allows(self, tokens: Sequence[int]) -> list[bool]:
        """Whether each of `tokens` may follow: what `apply` says, at a fraction of its cost.

        Where the grammar forces a text, any token may follow that this text begins with; `apply` leaves only `only`.
        """
        ...

    def only(self) -> int | None:
        """The one token that `apply` leaves where the grammar forces a text; None where it does not, or may not."""
        ...

    def forced(self, limit: int) -> list[int]:
        """At most `limit` tokens that must follow now, [] if none: drafts. Does not advance."""
        ...

    def likely(self, limit: int) -> list[int]:
        """At most `limit` tokens that write the text that must follow now, [] if none must. Other tokens may too."""
        ...

    @property
    def habit(self) -> tuple[int, float]:
        """(the token that followed the last one in earlier answers and fields, the chance that it does; 0: none)"""
        ...

    @property
    def replacements(self) -> Habits:
        """Token of a text that is copied -> what answers write in its place, as a quotation mark for a full stop."""
        ...

    @property
    def framed(self) -> int:
        """How many of the last tokens, up to the last one, were chosen where few may follow: keys and punctuation."""
        ...

    def valid(self, tokens: Sequence[int]) -> int:
        """How many of `tokens`, from the first, may follow in turn. Does not advance."""
        ...

    @property
    def ended(self) -> bool:
        """Whether nothing but an end token may follow."""
        ...

    def fork(self) -> Constraint:
        """An independent copy at the same position, to look ahead: nothing is learned from it."""
        ...
