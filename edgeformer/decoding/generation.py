"""From prompts to answers: makes the jobs of a call, and runs them on a scheduler of its own."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator
from collections.abc import Sequence as Tokens
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from edgeformer.bundle.signature import Array
from edgeformer.decoding.answer_shape import TEXT, AnswerShape
from edgeformer.decoding.beam_job import BeamSearch
from edgeformer.decoding.generation_config import GenerationConfig
from edgeformer.decoding.job import Job
from edgeformer.decoding.limits import Limits
from edgeformer.decoding.logits_processors import Change, with_changes
from edgeformer.decoding.request import CallOptions, Request
from edgeformer.decoding.result import Piece, Result, Stream
from edgeformer.decoding.scheduler import TOKEN_BUDGET, Scheduler, SchedulerOptions
from edgeformer.decoding.sequence import Sequence
from edgeformer.decoding.session import StateSource
from edgeformer.decoding.speculation.speculation import Speculation
from edgeformer.decoding.token_settings import with_token_ids
from edgeformer.engines.base import Engine, State
from edgeformer.errors import EdgeformerError, InputError
from edgeformer.processing.tokenizer import Tokenizer

if TYPE_CHECKING:
    from edgeformer.decoding.prefix_cache import PrefixCache
    from edgeformer.decoding.speculation.sequence_drafts import SequenceDrafts

MAX_SEQUENCES = 16  # of a list of prompts that run together


@dataclass(frozen=True)
class Call:
    """One prompt with what its answer depends on.

    new_state: makes the state of a number of sequences. source: the token ids that an encoder read, or the prompt.
    processors: rules of the task beside those of the config.
    """

    prompt: Tokens[int]
    config: GenerationConfig
    options: CallOptions
    new_state: Callable[[int], State]
    source: Tokens[int] | Array | None = None
    shape: AnswerShape = TEXT
    is_cacheable: bool = True  # its state depends on its tokens alone: no encoder's output is in it
    processors: tuple[Change, ...] = ()


@dataclass(frozen=True)
class Ended:
    """One of many prompts, by its number: its answers, or why it failed."""

    index: int
    results: list[Result] = field(default_factory=list)
    error: Exception | None = None

    def answers(self) -> list[Result]:
        """The results.

        Raises:
            Exception: the error, if it failed.
        """
        if self.error is not None:
            raise self.error
        return self.results


@dataclass(frozen=True)
class TextGenerator:
    """An engine that generates, with its limits, its tokenizer, and the prefixes that it keeps."""

    engine: Engine
    limits: Limits
    tokenizer: Tokenizer | None
    prefix_cache: PrefixCache | None = None
    speculation: Speculation | None = None

    def jobs(self, call: Call) -> list[Job]:
        """The jobs of one prompt: `n` answers that share its prefill, or one beam search.

        Raises:
            InputError: the prompt is wrong, there are stop strings and no tokenizer, beams with what they cannot have,
                or speculation that is not possible here.
        """
        config, options = call.config, call.options
        if config.stop_strings and self.tokenizer is None:
            raise InputError("Stop strings need a tokenizer, and this bundle has no tokenizer; leave them out.")
        config = with_token_ids(config, self.tokenizer)
        request = Request.of(call.prompt, config, self.limits, options, call.source, call.shape)
        if call.processors:
            request = replace(request, processors=with_changes(request.processors, call.processors))
        tokenizer = self.tokenizer
        cache = self.prefix_cache if call.is_cacheable else None
        if config.num_beams > 1:
            if options.n > 1:
                raise InputError(f"n is {options.n}: a beam search gives one answer; leave out n or num_beams.")
            if options.speculation not in ("auto", "off"):
                raise InputError("A beam search has no drafts; leave out speculation or num_beams.")
            if options.session is not None:
                raise InputError("A beam search keeps no session; leave out session, or pass num_beams=1.")
            if options.context_policy not in (None, "stop"):
                raise InputError(
                    f"context_policy is {options.context_policy!r}; a beam search ends where the context is full. "
                    "Leave out context_policy, or pass num_beams=1."
                )
            if call.shape.grammar is not None or options.logprobs is not None or options.prompt_logprobs is not None:
                raise InputError("A beam search has no constraints, tools or logprobs; leave them out, or num_beams.")
            rows = 1 if self.limits.cached else config.num_beams
            states = StateSource(lambda: call.new_state(rows), prefix_cache=cache)
            return [BeamSearch(request, states, tokenizer.decode if tokenizer else None)]
        states = StateSource(lambda: call.new_state(1), options.session, cache)
        answers = [Sequence(request, states, tokenizer, index, self._drafts(options)) for index in range(options.n)]
        answers[0].siblings = answers[1:]
        for sibling in answers[1:]:
            sibling.is_waiting = True
        return [*answers]

    def _drafts(self, options: CallOptions) -> SequenceDrafts | None:
        """The drafts of a new sequence; None without speculation."""
        if self.speculation is not None:
            return self.speculation.drafts(options.speculation)
        if options.speculation not in ("auto", "off"):
            raise InputError("Speculation is for models of one graph, and this is an encoder-decoder; leave it out.")
        return None

    def scheduler(self, options: SchedulerOptions) -> Scheduler:
        """A scheduler on this engine."""
        keeps_logits, speculation = self.limits.keeps_logits, self.speculation
        return Scheduler(self.engine, keeps_logits=keeps_logits, options=options, speculation=speculation)

    def stream(self, call: Call) -> Stream:
        """The answer to a prompt, piece by piece; that of a beam search comes all at its end.

        Raises:
            InputError: as `jobs`, or several answers are asked for.
        """
        if call.options.n != 1:
            raise InputError(f"n is {call.options.n}: a stream gives one answer; use generate().")
        (job,) = self.jobs(call)
        scheduler = self.scheduler(_unwatched(job.slots))
        scheduler.add([job])
        return Stream(_pieces(scheduler, job))

    def answers(
        self,
        calls: Iterable[Call | EdgeformerError],
        max_sequences: int = MAX_SEQUENCES,
        before_step: Callable[[], None] | None = None,
    ) -> Iterator[Ended]:
        """The answers to many prompts in the order in which they end; `max_sequences` run together.

        A call is taken from `calls` when it can begin soon. One that is an error, or fails, ends with its error; the
        others go on. What `before_step` raises ends all.
        """
        scheduler = self.scheduler(_unwatched(max_sequences))
        groups: dict[int, list[Job]] = {}
        upcoming = enumerate(calls)
        try:
            while True:
                while len(scheduler.waiting) < 2 and (taken := next(upcoming, None)) is not None:
                    index, call = taken
                    if isinstance(call, EdgeformerError):
                        yield Ended(index, error=call)
                        continue
                    try:
                        group = self.jobs(call)
                        scheduler.add(group)
                    except EdgeformerError as error:
                        yield Ended(index, error=error)
                    else:
                        groups[index] = group
                if scheduler.is_idle:
                    return
                if before_step is not None:
                    before_step()
                scheduler.step()
                for index in [i for i, group in groups.items() if all(job.reason or job.error for job in group)]:
                    group = groups.pop(index)
                    failure = next((job.error for job in group if job.error is not None), None)
                    yield Ended(index, [] if failure else [job.result() for job in group], failure)
        finally:
            for group in groups.values():  # where the caller took no more
                for job in group:
                    scheduler.cancel(job)


def _unwatched(max_sequences: int) -> SchedulerOptions:
    """Of a scheduler whose answers nobody waits for one by one: prompts run as fast as they can."""
    budget = max(TOKEN_BUDGET, max_sequences) if isinstance(max_sequences, int) else TOKEN_BUDGET
    return SchedulerOptions(max_sequences, budget, stretch=None)


def _pieces(scheduler: Scheduler, job: Job) -> Generator[Piece, None, Result]:
    try:
        while job.reason is None and job.error is None:
            scheduler.step()
            yield from job.take()
    finally:
        scheduler.cancel(job)  # where the stream was closed early
    if job.error is not None:
        raise job.error
    return job.result()
