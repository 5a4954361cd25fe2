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

    `queue_timeout`: seconds that they may wait for others. `interval`: deliveries after the first come at the multiples
    of so many seconds, which is asked before each; so those of several feeds come in one turn of the loop. The end of
    an answer comes at once.
    """

    def __init__(
        self, answers: Sequence[Answer], n: int, queue_timeout: float, interval: Callable[[], float] = lambda: 0.0
    ) -> None:
        self.answers = answers
        self._interval = interval
        self._waits_for_ends = False
        self._ended = 0  # answers
        self._n = n
        self._loop = asyncio.get_running_loop()
        self._waiter: asyncio.Future[None] | None = None
        self._timer: asyncio.TimerHandle | None = None  # stays for the next wait: most end long before it
        self._deadline, self._wakes = 0.0, True
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
        if self._has_begun and not self._has_news_of_end() and (interval := self._interval()) > 0:
            moment = (self._delivered // interval + 1) * interval
            if moment > self._loop.time():
                await self._wait(moment, wakes=False)
        end = self._loop.time() + timeout
        while True:
            self._is_signalled = False
            pieces, done = self._take()
            now = self._loop.time()
            if pieces or done:
                self._has_begun = True
                self._delivered = now
                self._is_signalled = True  # the next call looks first: until then nothing need wake the loop
                return pieces
            if end <= now:
                return None
            await self._wait(end if self._has_begun else min(end, now + self._patience()))

    async def _wait(self, deadline: float, wakes: bool = True) -> None:
        """Returns at the deadline, or when an answer ends; with `wakes`, also when there are new pieces."""
        self._deadline, self._wakes = deadline, wakes
        if self._timer is None or self._timer.when() > deadline:
            if self._timer is not None:
                self._timer.cancel()
            self._timer = self._loop.call_at(deadline, self._late)
        self._waiter = self._loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _late(self) -> None:
        """The timer rings: it was set for this wait, or for one before it."""
        self._timer = None
        if self._waiter is None:
            return
        if self._loop.time() < self._deadline:
            self._timer = self._loop.call_at(self._deadline, self._late)
        else:
            self._end_wait()

    def _ring(self) -> None:
        if self._wakes or self._has_news_of_end():
            self._end_wait()

    def _has_news_of_end(self) -> bool:
        """Whether more answers have ended than `next` has seen, or all: nothing else is worth waiting for."""
        ended = sum(answer.done for answer in self.answers)
        return ended > self._ended or ended == len(self.answers)

    def _end_wait(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

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
        if self._timer is not None:
            self._timer.cancel()
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
        has_end = self._has_news_of_end()
        if self._waits_for_ends and not has_end:
            return
        if has_end or not self._is_signalled:  # of pieces, at most one call waits in the loop
            self._is_signalled = True
            with contextlib.suppress(RuntimeError):  # the loop was closed
                self._loop.call_soon_threadsafe(self._ring)
