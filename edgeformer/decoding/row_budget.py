"""How many rows of prompts run in a step beside sequences that decode, so that these do not wait long."""

from __future__ import annotations

from collections import deque

# In the mean: the longest of a few hundred steps took 2.4 to 2.9 times as long as one without (docs/performance.md).
STRETCH = 1.8
BEHIND = 16.0  # steps' worth of time for each prompt that waits behind the first one, over the sequences that decode
SMALLEST = 4  # rows of a prompt in a step, and multiples of it: behind 2,000 cached tokens 4 rows double a step
SMOOTHING = 0.25  # weight of the newest measurement
LATEST = 3  # steps without prompts that are remembered; the shortest counts, for an interruption makes one long
REMEASURED = 32  # after so many steps with prompts one runs without: the contexts grow


class RowBudget:
    """The rows of one step: at most `limit`, and where sequences decode only so many rows of prompts that the step
    takes about `stretch` times a step without them. `stretch=None`: no such limit, for jobs nobody watches.

    Where more prompts wait, they have more time: of 16 requests that come at once the last would begin when the first
    have half of their answers, and end in steps of few rows, which cost nearly as much as those of 16. So has one
    prompt beside one or two answers.
    """

    def __init__(self, limit: int, stretch: float | None = STRETCH) -> None:
        self.limit = limit
        self._stretch = stretch
        self._plain: dict[int, deque[float]] = {}  # rows that decode -> seconds of the latest steps without prompts
        self._since: dict[int, int] = {}  # the same -> steps with prompts since then
        self._row_seconds: float | None = None  # of one row of a prompt

    def prompt_rows(self, decode_rows: int, prompts: int) -> int:
        """The rows of prompts for a step with `decode_rows` rows of sequences that decode, where `prompts` wait.

        0 where the time of a step without prompts is unknown: the next one measures it.
        """
        room = max(0, self.limit - decode_rows)
        if decode_rows == 0 or self._stretch is None:
            return room
        if self._since.get(decode_rows, REMEASURED) >= REMEASURED:
            return 0
        if self._row_seconds is None:
            return min(room, SMALLEST)
        share = max(self._stretch - 1, BEHIND * (prompts - 1) / decode_rows, (2 * prompts / decode_rows) ** 2)
        rows = int(share * min(self._plain[decode_rows]) / self._row_seconds)
        return min(room, max(SMALLEST, rows // SMALLEST * SMALLEST))

    def observe(self, decode_rows: int, prompt_rows: int, seconds: float) -> None:
        """A step of these rows, none of them a draft, took so long."""
        if prompt_rows == 0:
            self._plain.setdefault(decode_rows, deque(maxlen=LATEST)).append(seconds)
            self._since[decode_rows] = 0
            return
        plain = 0.0
        if decode_rows:
            if decode_rows not in self._plain:
                return
            self._since[decode_rows] += 1
            plain = min(self._plain[decode_rows])
        each = max(seconds - plain, 0.02 * seconds) / prompt_rows
        old = self._row_seconds
        self._row_seconds = each if old is None else old + SMOOTHING * (each - old)
