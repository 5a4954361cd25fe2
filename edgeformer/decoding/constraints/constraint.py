"""The interface of a constraint: the position of one answer in a grammar."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from edgeformer.bundle.signature import Array


class Constraint(Protocol):
    """Which tokens may follow in one answer. Belongs to one sequence; not thread-safe."""

    def apply(self, scores: Array) -> Array:
        """`scores` [vocab] with -inf where a token may not follow; a new array.

        An end token keeps its score only where the answer may end.

        Raises:
            StateError: no token may follow.
        """
        ...

    def accept(self, token: int) -> None:
        """Advances by the chosen token.

        Raises:
            InputError: the token may not follow; nothing has changed.
        """
        ...

    def forced(self, limit: int) -> list[int]:
        """At most `limit` tokens that must follow now, [] if none: drafts. Does not advance."""
        ...

    def valid(self, tokens: Sequence[int]) -> int:
        """How many of `tokens`, from the first, may follow in turn. Does not advance."""
        ...

    @property
    def ended(self) -> bool:
        """Whether nothing but an end token may follow."""
        ...

    def fork(self) -> Constraint:
        """An independent copy at the same position."""
        ...
