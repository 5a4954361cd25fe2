"""A scheduler in a thread of its own: any thread or event loop adds prompts and reads their answers as they come."""

from __future__ import annotations

import atexit
import contextlib
import os
import threading
import weakref
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator

from edgeformer.decoding.counters import Counters
from edgeformer.decoding.job import Job
from edgeformer.decoding.result import Piece, Result
from edgeformer.decoding.scheduler import Scheduler
from edgeformer.errors import EdgeformerError, InputError, QueueFull, StateError
from edgeformer.threads import start

AtEnd = Callable[[list[Result] | None, Exception | None], None]  # the results, or why it failed


class Answer:
    """One request in a scheduler. Iterate over it for its pieces (`for` or `async for`), or wait for `result()`.

    Pieces of several answers to one prompt (`n`) come mixed, each with its `index`.
    """

    def __init__(self, worker: Worker, jobs: list[Job]) -> None:
        self._worker = worker
        self._jobs = jobs
        self._changed = threading.Condition()
        self._pieces: deque[Piece] = deque()
        self._listeners: list[Callable[[], None]] = []
        self._error: Exception | None = None
        self._results: list[Result] | None = None
        self._at_end: list[AtEnd] = []
        self._outcome: tuple[list[Result] | None, Exception | None] | None = None  # known before it is done

    @property
    def done(self) -> bool:
        """Whether it has ended or failed."""
        return self._results is not None or self._error is not None

    @property
    def prompt_tokens(self) -> int:
        """Tokens of its prompt."""
        return len(self._jobs[0].request.prompt)

    @property
    def position(self) -> int:
        """0 once it runs or has ended, else its place in the queue, from 1."""
        return self._worker.position(self)

    def cancel(self) -> None:
        """Ends it before the next step; its finish reason is then "cancel"."""
        self._worker.cancel(self)

    def result(self, timeout: float | None = None) -> Result:
        """Waits for the answer, at most `timeout` seconds; the first one where there are several.

        Raises:
            TimeoutError: it has not ended yet.
            EdgeformerError: it failed.
        """
        return self.results(timeout)[0]

    def results(self, timeout: float | None = None) -> list[Result]:
        """As `result`, all answers to the prompt."""
        with self._changed:
            if not self._changed.wait_for(lambda: self.done, timeout):
                raise TimeoutError(f"The answer has not ended after {timeout} s; it goes on.")
        if self._error is not None:
            raise self._error
        assert self._results is not None
        return self._results

    def __iter__(self) -> Iterator[Piece]:
        """The pieces as they come; if the loop is left early, the answer is cancelled.

        Raises:
            EdgeformerError: it failed.
        """
        try:
            while True:
                with self._changed:
                    self._changed.wait_for(lambda: bool(self._pieces) or self.done)
                    pieces = self._take()
                if not pieces:
                    break
                yield from pieces
        finally:
            if not self.done:
                self.cancel()
        self.results()  # raises if it failed

    async def __aiter__(self) -> AsyncIterator[Piece]:
        """The pieces as they come; if the task is cancelled or the loop is left early, so is the answer."""
        import asyncio  # here, for it takes 3 MB and 15 ms or more

        loop, event = asyncio.get_running_loop(), asyncio.Event()

        def wake() -> None:
            with contextlib.suppress(RuntimeError):  # the loop was closed
                loop.call_soon_threadsafe(event.set)

        self.listen(wake)
        try:
            while True:
                event.clear()
                pieces, done = self.take()
                for piece in pieces:
                    yield piece
                if done and not pieces:
                    break
                if not pieces:
                    await event.wait()
        finally:
            self.unlisten(wake)
            if not self.done:
                self.cancel()
        self.results()

    async def wait(self) -> Result:
        """As `result`, without blocking the event loop."""
        async for _ in self:
            pass
        return self.result()

    @property
    def has_parts(self) -> bool:
        """Whether its content is in `Piece.parts`: a chat whose template has tool calls or reasoning."""
        return self._jobs[0].request.shape.format is not None

    def listen(self, wake: Callable[[], None]) -> None:
        """`wake` is called, from another thread, whenever there are new pieces, and at the end."""
        with self._changed:
            self._listeners.append(wake)

    def unlisten(self, wake: Callable[[], None]) -> None:
        """Undoes `listen`."""
        with self._changed:
            self._listeners.remove(wake)

    def when_done(self, call: AtEnd) -> None:
        """`call` is called once, from another thread, just before it is done; at once if it has ended.

        It must not raise: nobody could catch that.
        """
        with self._changed:
            outcome = self._outcome
            if outcome is None:
                self._at_end.append(call)
        if outcome is not None:
            call(*outcome)

    def take(self) -> tuple[list[Piece], bool]:
        """(the pieces since the last call, whether no more will come). It does not wait."""
        with self._changed:
            return self._take(), self.done

    def _take(self) -> list[Piece]:
        pieces = list(self._pieces)
        self._pieces.clear()
        return pieces

    def _deliver(self) -> None:
        """Called by the worker's thread after each step."""
        pieces = [piece for job in self._jobs for piece in job.take()]
        error = next((job.error for job in self._jobs if job.error is not None), None)
        ended = error is not None or all(job.reason is not None for job in self._jobs)
        results = [job.result() for job in self._jobs] if ended and error is None else None
        if pieces or ended:
            self._publish(pieces, results, error)

    def _publish(self, pieces: list[Piece], results: list[Result] | None, error: Exception | None) -> None:
        if results is not None or error is not None:
            with self._changed:
                self._outcome = (results, error)
                at_end, self._at_end = self._at_end, []
            for call in at_end:
                call(results, error)
        with self._changed:
            self._pieces += pieces
            self._results, self._error = results, error
            listeners = list(self._listeners)
            self._changed.notify_all()
        for wake in listeners:
            wake()


class Worker:
    """Runs a scheduler in a thread, which starts with the first request. Threads may share it."""

    def __init__(self, scheduler: Scheduler, queue_limit: int | None = None) -> None:
        if queue_limit is not None and (type(queue_limit) is not int or queue_limit < 0):
            raise InputError(f"queue_limit is {queue_limit!r}, expected a whole number of at least 0.")
        self._scheduler = scheduler
        self._queue_limit = queue_limit
        self._lock = threading.Condition()
        self._inbox: list[tuple[str, Answer]] = []  # "add" or "cancel", for the thread
        self._answers: list[Answer] = []  # that have not ended
        self._thread: threading.Thread | None = None
        self._closing = False
        _workers.add(self)

    def add(self, jobs: list[Job]) -> Answer:
        """Queues the answers to one prompt.

        Raises:
            InputError: they can never fit.
            QueueFull: `queue_limit` requests beyond those that can run have not ended.
            OutOfMemory: no thread can be started; the next call tries again.
            EdgeformerError: the scheduler is closed.
        """
        answer = Answer(self, jobs)
        with self._lock:
            if self._closing:
                raise EdgeformerError("This scheduler is closed; make another one.")
            self._scheduler.check(jobs)
            limit, most = self._queue_limit, self._scheduler.options.max_sequences
            if limit is not None and len(self._answers) >= most + limit:
                raise QueueFull(
                    f"{len(self._answers)} requests have not ended; {most} run at once and {limit} may wait. "
                    "Try again later."
                )
            if self._thread is None:
                self._start()
            self._inbox.append(("add", answer))
            self._answers.append(answer)
            self._lock.notify_all()
        return answer

    def cancel(self, answer: Answer) -> None:
        """Ends an answer before the next step; one that has ended stays as it is."""
        with self._lock:
            if not answer.done:
                self._inbox.append(("cancel", answer))
                self._lock.notify_all()

    def position(self, answer: Answer) -> int:
        """Its place in the queue, from 1; 0 if it does not wait."""
        with self._lock:
            queue = self._queue()
        return queue.index(answer) + 1 if answer in queue else 0

    @property
    def counts(self) -> tuple[int, int]:
        """(requests that run, requests that wait)."""
        with self._lock:
            waiting = len(self._queue())
            return sum(not one.done for one in self._answers) - waiting, waiting

    @property
    def reserved_bytes(self) -> int:
        """See `Scheduler.reserved_bytes`."""
        return self._scheduler.reserved_bytes

    def count_in(self, counters: Counters) -> None:
        """What its scheduler does is added to `counters`; before the first request."""
        self._scheduler.counters = counters

    def close(self, *, finish: bool = False, wait: bool = True) -> None:
        """Ends the thread: after all answers with `finish`, else they are cancelled before the next step.

        Without `wait` it returns while the step that runs goes on.
        """
        with self._lock:
            self._closing = True
            if not finish:
                self._inbox += [("cancel", answer) for answer in self._answers]
            self._lock.notify_all()
            thread = self._thread
        if wait and thread is not None and thread is not threading.current_thread():
            thread.join()

    def retire(self) -> None:
        """Nobody can add to it any more: the thread ends after all answers. Does not wait."""
        with self._lock:
            self._closing = True
            self._lock.notify_all()

    def forget_parent(self) -> None:
        """After a fork, in the child: threads do not survive it, and what they locked stays locked."""
        self._lock = threading.Condition()
        self._thread = None
        for answer in self._answers:
            answer._changed = threading.Condition()
            answer._at_end = []
            answer._listeners = []  # they would wake the parent's event loop, whose pipe both share
        self._fail(StateError("the process was forked, and the thread is the parent's; make a scheduler in the child"))

    def _queue(self) -> list[Answer]:
        """The answers that wait, in their order."""
        running = {id(job) for job in self._scheduler.running}
        return [one for one in self._answers if not one.done and not any(id(job) in running for job in one._jobs)]

    def _start(self) -> None:
        # A daemon thread, which _close_all ends at exit: the interpreter must not end while it holds an engine.
        thread = threading.Thread(target=self._run, name="edgeformer-scheduler", daemon=True)
        self._thread = thread
        try:
            start(thread, "the scheduler")
        except BaseException:  # also Ctrl-C
            self._thread = None
            raise

    def _run(self) -> None:
        with self._lock:
            if self._thread is not threading.current_thread():
                return  # it began too late: its start was given up
        try:
            while True:
                with self._lock:
                    while not self._inbox and self._scheduler.is_idle and not self._closing:
                        self._lock.wait()
                    inbox, self._inbox = self._inbox, []
                    for command, answer in inbox:
                        if command == "add":
                            self._scheduler.add(answer._jobs)
                        else:
                            for job in answer._jobs:
                                self._scheduler.cancel(job)
                    if self._closing and self._scheduler.is_idle:
                        break
                    self._scheduler.admit()
                self._scheduler.step()
                self._deliver()
            self._deliver()
        except BaseException as error:
            self._fail(error)
            if not isinstance(error, Exception):
                raise

    def _deliver(self) -> None:
        with self._lock:
            answers = list(self._answers)
        for answer in answers:
            answer._deliver()
        with self._lock:
            self._answers = [answer for answer in self._answers if not answer.done]

    def _fail(self, error: BaseException) -> None:
        """A step raised what no job is to blame for: no answer can go on."""
        with self._lock:
            self._closing = True
            answers, self._answers = self._answers, []
        failure = EdgeformerError(f"The scheduler stopped: {type(error).__name__}: {error}")
        failure.__cause__ = error
        for answer in answers:
            answer._publish([], None, failure)


_workers: weakref.WeakSet[Worker] = weakref.WeakSet()


def _close_all() -> None:
    for worker in list(_workers):
        worker.close()


def _forget_parent() -> None:
    for worker in list(_workers):
        worker.forget_parent()


atexit.register(_close_all)
if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_forget_parent)
