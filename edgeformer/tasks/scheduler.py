"""`Model.scheduler`: prompts of any thread or event loop, answered together."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Unpack

from edgeformer.decoding.counters import Counters
from edgeformer.decoding.request import CallArguments
from edgeformer.decoding.scheduler import SchedulerOptions
from edgeformer.decoding.worker import Answer, Worker
from edgeformer.errors import InputError
from edgeformer.machine import available_memory
from edgeformer.tasks.seq2seq import EncoderDecoder
from edgeformer.tasks.text_generation import Prompt, TextGeneration


class GenerationScheduler:
    """Answers many prompts at once with one model: those that arrive while others run join them at the next step.

    Threads may share it; `Answer` also works in an event loop. Use it in a `with` block, or call `close`; one that is
    dropped finishes its answers.
    """

    def __init__(
        self, task: TextGeneration | EncoderDecoder, options: SchedulerOptions, queue_limit: int | None
    ) -> None:
        self._task = task
        self._generator = task.generator
        self._worker = Worker(self._generator.scheduler(options), queue_limit)
        self.options = options
        # Its thread holds the worker, not this: without it, a scheduler that was dropped would keep the model for ever.
        weakref.finalize(self, self._worker.retire).atexit = False

    def add(self, prompt: Prompt, **arguments: Unpack[CallArguments]) -> Answer:
        """Queues a prompt. Arguments are those of `Model.generate`.

        Raises:
            InputError: an argument is wrong, or the answer can never fit into the memory limit.
            QueueFull: too many wait already.
        """
        return self._add(prompt, arguments)

    def stream(self, prompt: Prompt, **arguments: Unpack[CallArguments]) -> Answer:
        """As `add`, for one answer that is read piece by piece, by `for` or `async for`.

        Raises:
            InputError: as `add`, or several answers are asked for.
            QueueFull: too many wait already.
        """
        if arguments.get("n", 1) != 1:
            raise InputError(f"n is {arguments['n']}: a stream gives one answer; use add().")
        return self._add(prompt, arguments)

    def _add(self, prompt: Prompt, arguments: Mapping[str, Any]) -> Answer:
        if arguments.get("session") is not None:
            raise InputError("A scheduler keeps states itself; leave out session (its prefix cache finds old turns).")
        return self._worker.add(self._generator.jobs(self._task.call(prompt, arguments)))

    def cancel(self, answer: Answer) -> None:
        """Ends an answer before the next step and frees its state; nobody else is disturbed.

        Raises:
            InputError: it is no answer that `add` or `stream` gave.
        """
        if not isinstance(answer, Answer):
            raise InputError(f"cancel() takes an answer of this scheduler's add() or stream(), not {answer!r:.40}.")
        answer.cancel()

    @property
    def running(self) -> int:
        """Requests that run now."""
        return self._worker.counts[0]

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return self._worker.counts[1]

    @property
    def reserved_bytes(self) -> int:
        """Bytes of cache that the running requests may need; `options.memory_limit` bounds them."""
        return self._worker.reserved_bytes

    def count_in(self, counters: Counters) -> None:
        """What it does is added to `counters`; before the first request."""
        self._worker.count_in(counters)

    def close(self, *, finish: bool = False) -> None:
        """Ends it: cancels all answers, or with `finish` waits for them. It takes no more prompts."""
        self._worker.close(finish=finish)

    def __enter__(self) -> GenerationScheduler:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Ctrl-C does not wait for the end of the step, which may be a long prompt's.
        self._worker.close(finish=error is None, wait=error is None or isinstance(error, Exception))


def half_of_memory() -> int | None:
    """The default memory limit of states: half of what can be allocated now; None where that is unknown."""
    free = available_memory()
    return None if free is None else free // 2
