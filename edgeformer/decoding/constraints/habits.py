"""What the answers to one grammar have in common, learned token by token.

A grammar forces the keys of a JSON object, and leaves open whether a space follows a colon and whether a quotation mark
is a token of its own. A model has its habits there. They are the same in all answers to a grammar, so they are learned
from the first fields of the first answer.
"""

from __future__ import annotations

MOST_KEYS = 1024  # tokens whose followers are remembered; about 200 KB
DECAY = 0.9  # what a follower weighs after the next one: a window of about 10


class Habits:
    """Token -> the token that mostly comes with it. Threads may share it.

    An entry is replaced as a whole: where two threads write the same one at once, one observation is lost.
    """

    def __init__(self) -> None:
        self._known: dict[int, tuple[int, float, float]] = {}  # token -> (its follower, times right, times in all)

    def learn(self, token: int, follower: int | None) -> None:
        """`follower` came with `token`; None: something that is no habit, and counts against the known follower."""
        known = self._known.get(token)
        if known is None:
            if follower is not None and len(self._known) < MOST_KEYS:
                self._known[token] = (follower, 1.0, 1.0)
            return
        expected, right, times = known[0], DECAY * known[1], DECAY * known[2] + 1
        if follower == expected:
            right += 1
        elif follower is not None and right < 0.5 * times:
            expected, right = follower, 1.0
        self._known[token] = (expected, right, times)

    def guess(self, token: int) -> tuple[int, float]:
        """(the token that mostly comes with `token`, the chance that it does); the chance is 0 without a guess."""
        known = self._known.get(token)
        if known is None:
            return -1, 0.0
        follower, right, times = known
        return follower, right / (times + 0.5)
