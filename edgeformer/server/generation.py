"""One request that generates: the lease of its model, its answers, and what is counted when they end."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

from edgeformer.decoding.result import Result
from edgeformer.decoding.worker import Answer
from edgeformer.errors import QueueFull
from edgeformer.server.endpoint import Call
from edgeformer.server.errors import SERVER, ApiError, too_busy
from edgeformer.server.feed import Feed
from edgeformer.server.registry import Lease, Loaded
from edgeformer.tasks.text_generation import Prompt

FINISH = {"eos": "stop", "stop": "stop", "length": "length", "context": "length", "time": "length"}


def finish_reason(reason: str) -> str:
    """OpenAI's finish reason.

    Raises:
        ApiError: the answer was cancelled: the server ends.
    """
    if reason not in FINISH:
        raise ApiError(503, "The server stopped before the answer ended.", kind=SERVER, code="server_stopping")
    return FINISH[reason]


class Generation:
    """Answers that run. Made by `start`; `close` it in `finally`: it cancels what has not ended."""

    def __init__(self, call: Call, lease: Lease, answers: Sequence[Answer], n: int) -> None:
        self._call, self._lease = call, lease
        self.entry, self.n = lease.entry, n
        self.answers = answers
        self._is_stream = bool(call.body.stream)
        self.loaded.streams += self._is_stream
        self.feed = Feed(answers, n, call.server.options.queue_timeout, self._pace)
        self._is_counted = False

    @classmethod
    async def start(
        cls,
        call: Call,
        name: str | None,
        prompts: Sequence[Prompt],
        arguments: Callable[[Loaded], Mapping[str, Any]],
    ) -> Generation:
        """Queues the prompts; `arguments` gives those of `Model.generate`, once the model is loaded.

        Raises:
            ApiError: there is no such model, it does not generate, or too many requests wait.
            EdgeformerError: an argument or a prompt is wrong.
        """
        lease = await call.server.registry.lease(name)
        call.log["model"] = lease.entry.name
        try:
            given = arguments(lease.loaded)
            work = asyncio.get_running_loop().run_in_executor(None, _add, call, lease, prompts, given)
            try:
                answers = await asyncio.shield(work)
            except asyncio.CancelledError:
                work.add_done_callback(_cancel)
                raise
            return cls(call, lease, answers, given.get("n", 1))
        except BaseException:
            lease.release()
            raise

    @property
    def loaded(self) -> Loaded:
        """The model that answers."""
        return self._lease.loaded

    def _pace(self) -> float:
        return self.loaded.interval() if self._is_stream else 0.0

    async def results(self) -> list[Result]:
        """Waits for all answers: one result for each choice."""
        await self.feed.results()
        return self.ended()

    def ended(self) -> list[Result]:
        """The results of answers that have all ended; they are counted once."""
        each = [answer.results(0) for answer in self.answers]
        results = [result for found in each for result in found]
        if not self._is_counted:
            self._is_counted = True
            timings = [result.timings for result in results]
            seconds = max(one.first_token_seconds + one.decode_seconds for one in timings)
            self.loaded.mean_seconds += (seconds - self.loaded.mean_seconds) / 8
            self._call.log |= {
                "prompt_tokens": sum(found[0].timings.prompt_tokens for found in each),
                "cached_tokens": sum(found[0].cached_tokens for found in each),
                "completion_tokens": sum(len(result.ids) for result in results),
                "finish": ",".join(result.finish_reason for result in results),
                "first_token_ms": round(1000 * (timings[0].queue_seconds + timings[0].first_token_seconds), 1),
            }
            if self._call.server.options.log_prompts:
                self._call.log["answers"] = [result.text for result in results]
        return results

    def close(self) -> None:
        """Cancels what has not ended and gives the model back."""
        if not self._is_counted and any(not answer.done for answer in self.answers):
            self._is_counted = True
            self._call.log["finish"] = "abort"
        self.loaded.streams -= self._is_stream
        self._is_stream = False
        self.feed.close()
        self._lease.release()


def _add(call: Call, lease: Lease, prompts: Sequence[Prompt], arguments: Mapping[str, Any]) -> list[Answer]:
    """Runs in a thread: encoding a long prompt and compiling a grammar take milliseconds."""
    loaded, name = lease.loaded, lease.entry.name
    if loaded.scheduler is None:
        raise ApiError(400, f"{name} is a {loaded.model.bundle.task} model and does not generate text.", param="model")
    options = loaded.scheduler.options
    most = options.max_sequences + loaded.queue
    if len(prompts) > most:
        raise ApiError(400, f"{len(prompts)} prompts are more than run and wait at once ({most}).", param="prompt")
    answers: list[Answer] = []
    try:
        for prompt in prompts:
            answers.append(loaded.scheduler.add(prompt, **arguments))
            call.server.metrics.watch(name, answers[-1], arguments.get("n", 1))
            if call.trace is not None:
                call.trace.watch(name, answers[-1])
    except BaseException as error:
        for answer in answers:
            answer.cancel()
        if isinstance(error, QueueFull):
            raise too_busy(str(error), loaded.retry_after()) from error
        raise
    return answers


def _cancel(work: Future[list[Answer]] | asyncio.Future[list[Answer]]) -> None:
    """The client left while its prompts were being queued."""
    if not work.cancelled() and work.exception() is None:
        for answer in work.result():
            answer.cancel()
