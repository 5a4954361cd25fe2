"""The pieces of one or several answers, in an event loop. What comes while the loop is busy comes together."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence

from edgeformer.decoding.result import Piece, Result
from edgeformer.decoding.worker import Answer
from edgeformer.server.errors import too_busy

Numbered = tuple[int, Piece]  # the index of the choice, and a piece of it


class Feed:
    """Reads answers of a scheduler; choice `i * n + k` is answer k to prompt i. Close it in `finally`.

    `queue_timeout`: seconds that they may wait for others. `interval`: seconds between two deliveries, at least; asked
    before each.
    """

    def __init__(
        self, answers: Sequence[Answer], n: int, queue_timeout: float, interval: Callable[[], float] = lambda: 0.0
    ) -> None:
        self.answers = answers
        self._interval = interval
        self._waits_for_ends = False
        self._ended = 0  # answers
        self._n = n
        self._loop, self._event = asyncio.get_running_loop(), asyncio.Event()
        self._is_signalled = False
        self._queue_timeout, self._began = queue_timeout, time.monotonic()
        self._has_begun = False
        self._delivered = 0.0
        for answer in answers:
            answer.listen(self._wake)

    async def next(self, timeout: float) -> list[Numbered] | None:
        """The new pieces of all answers; none after the end of all; None if `timeout` seconds bring none.

        Raises:
            ApiError: they waited too long (429).
            EdgeformerError: an answer failed.
        """
        if self._has_begun and (wait := self._delivered + self._interval() - self._loop.time()) > 0:
            self._is_signalled = True  # new pieces need not wake it
            await asyncio.sleep(wait)
        end = self._loop.time() + timeout
        while True:
            self._is_signalled = False
            self._event.clear()
            pieces, done = self._take()
            if pieces or done:
                self._has_begun = True
                self._delivered = self._loop.time()
                return pieces
            left = end - self._loop.time()
            if left <= 0:
                return None
            timer = self._loop.call_later(left if self._has_begun else min(left, self._patience()), self._event.set)
            try:
                await self._event.wait()
            finally:
                timer.cancel()

    async def results(self) -> list[Result]:
        """Waits for all answers; one result for each choice.

        Raises:
            ApiError, EdgeformerError: as `next`.
        """
        await self.whole()
        return [result for answer in self.answers for result in answer.results(0)]

    async def whole(self) -> list[Numbered]:
        """Waits for all answers; all their pieces.

        Raises:
            ApiError, EdgeformerError: as `next`.
        """
        self._waits_for_ends = True
        found: list[Numbered] = []
        while (pieces := await self.next(3600.0)) != []:
            found += pieces or ()
        return found

    def close(self) -> None:
        """Cancels what has not ended."""
        for answer in self.answers:
            with contextlib.suppress(ValueError):  # closed before
                answer.unlisten(self._wake)
            if not answer.done:
                answer.cancel()

    def _take(self) -> tuple[list[Numbered], bool]:
        found: list[Numbered] = []
        ended = 0
        for number, answer in enumerate(self.answers):
            pieces, done = answer.take()
            found += [(number * self._n + piece.index, piece) for piece in pieces]
            if done:
                ended += 1
                answer.results(0)  # raises if it failed
        self._ended = ended
        return found, ended == len(self.answers)

    def _patience(self) -> float:
        """Seconds until they have waited too long.

        Raises:
            ApiError: they have.
        """
        left = self._began + self._queue_timeout - time.monotonic()
        if left > 0:
            return left
        if any(answer.position == 0 for answer in self.answers):
            self._has_begun = True  # the prompt runs
            return 3600.0
        raise too_busy(f"The request waited {self._queue_timeout:g} s for its turn. Try again later.")

    def _wake(self) -> None:
        if self._waits_for_ends and sum(answer.done for answer in self.answers) == self._ended:
            return
        if not self._is_signalled:  # at most one call waits in the loop
            self._is_signalled = True
            with contextlib.suppress(RuntimeError):  # the loop was closed
                self._loop.call_soon_threadsafe(self._event.set)
