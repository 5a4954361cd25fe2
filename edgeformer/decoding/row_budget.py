"""How many rows of prompts run in a step beside sequences that decode, so that these do not wait long."""

from __future__ import annotations

from collections import deque
from statistics import median

SMALLEST = 8  # rows of a prompt in a step: kernels work on tiles of rows
SMOOTHING = 0.25  # weight of the newest measurement


class RowBudget:
    """The rows of one step: at most `limit`, and where sequences decode only so many rows of prompts that the step
    takes about `stretch` times a step without them. `stretch=None`: no such limit, for jobs nobody watches.
    """

    def __init__(self, limit: int, stretch: float | None = 2.0) -> None:
        self.limit = limit
        self._stretch = stretch
        self._plain: deque[float] = deque(maxlen=15)  # seconds of the latest steps without prompts
        self._row_seconds: float | None = None  # of one row of a prompt, in a step of both

    def prompt_rows(self, decode_rows: int) -> int:
        """The rows of prompts for a step with `decode_rows` rows of sequences that decode."""
        room = max(0, self.limit - decode_rows)
        if decode_rows == 0 or self._stretch is None:
            return room
        if not self._plain or self._row_seconds is None:
            return min(room, SMALLEST)  # behind 1,900 cached tokens, 16 rows beside 7 make a step 3.8 times as long
        rows = int((self._stretch - 1) * median(self._plain) / self._row_seconds)
        return min(room, max(SMALLEST, rows // SMALLEST * SMALLEST))

    def observe(self, decode_rows: int, prompt_rows: int, seconds: float) -> None:
        """A step of these rows, none of them a draft, took so long."""
        if decode_rows == 0:
            return
        if prompt_rows == 0:
            self._plain.append(seconds)
        elif self._plain:
            each = max(seconds - median(self._plain), 0.02 * seconds) / prompt_rows
            old = self._row_seconds
            self._row_seconds = each if old is None else old + SMOOTHING * (each - old)
