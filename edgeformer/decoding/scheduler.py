"""Many jobs on one engine: each step runs the pending rows of all of them in one call.

Jobs join and leave between steps. A step takes the rows of jobs that decode, then chunks of prompts, the oldest first,
up to a budget of rows (continuous batching with chunked prefill: Orca, OSDI 2022; Sarathi-Serve, OSDI 2024). What a
job gets does not depend on the others: on the native engine each row has the same bits whatever runs beside it.
"""

from __future__ import annotations

import math
import time
from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgeformer.bundle.signature import IDS, KEEP, LOGITS
from edgeformer.decoding.counters import Counters
from edgeformer.decoding.job import Job, Rows
from edgeformer.decoding.row_budget import SMALLEST, STRETCH, RowBudget
from edgeformer.decoding.sequence import Sequence
from edgeformer.decoding.speculation.speculation import Speculation
from edgeformer.engines.base import Engine, Outputs, State
from edgeformer.errors import EdgeformerError, InputError
from edgeformer.machine import usable_cpus

TOKEN_BUDGET = 512  # rows of one step: bounds the memory of activations, and how long Ctrl-C waits


@dataclass(frozen=True)
class SchedulerOptions:
    """
    max_sequences: how many run at once; beams count each.
    token_budget: most rows of a step.
    memory_limit: bytes of all states; None: as much as `max_sequences` take.
    stretch: how many times as long as a step without prompts one with prompts may take, above 1; None: any.

    Raises:
        InputError: a value is out of its range.
    """

    max_sequences: int = 8
    token_budget: int = TOKEN_BUDGET
    memory_limit: int | None = None
    stretch: float | None = STRETCH

    def __post_init__(self) -> None:
        for name, low, value in (
            ("max_sequences", 1, self.max_sequences),
            ("token_budget", 1, self.token_budget),
            ("memory_limit", 1, self.memory_limit),
        ):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < low):
                raise InputError(f"{name} is {value!r}, expected a whole number of at least {low}.")
        stretch = self.stretch
        if stretch is not None and not (type(stretch) in (int, float) and 1 < stretch < math.inf):
            raise InputError(f"stretch is {stretch!r}, expected a finite number above 1, or None.")
        if self.token_budget < self.max_sequences:
            raise InputError(
                f"token_budget is {self.token_budget} rows a step, and max_sequences is {self.max_sequences}: each "
                "sequence that decodes needs a row of its own; allow more rows or fewer sequences."
            )


Plan = list[tuple[Job, Rows]]  # which rows of which jobs run in a step


class Scheduler:
    """Runs jobs on one engine. Not for several threads: see `edgeformer.decoding.worker`."""

    def __init__(
        self,
        engine: Engine,
        *,
        keeps_logits: bool,
        options: SchedulerOptions,
        speculation: Speculation | None = None,
    ) -> None:
        self.options = options
        self.waiting: deque[list[Job]] = deque()  # groups that are admitted together: the answers to one prompt
        self.running: list[Job] = []
        self.counters = Counters()
        self._engine = engine
        self._keeps_logits = keeps_logits
        self._speculation = speculation
        self._has_spare_cpu = engine.threads < len(usable_cpus())
        self._budget = RowBudget(options.token_budget, options.stretch)

    # -------------------------------------------------------------------------------------------------- join and leave

    def add(self, group: list[Job]) -> None:
        """Queues jobs that are admitted together, behind those that wait.

        Raises:
            InputError: as `check`.
        """
        self.check(group)
        self.waiting.append(group)

    def check(self, group: list[Job]) -> None:
        """
        Raises:
            InputError: these jobs would not fit together into an empty scheduler.
        """
        slots, size = sum(job.slots for job in group), self._bytes(group)
        if slots > self.options.max_sequences:
            raise InputError(
                f"{slots} sequences of one request must run together, max_sequences is {self.options.max_sequences}; "
                "ask for fewer answers or beams, or make a scheduler of more sequences."
            )
        limit = self.options.memory_limit
        if limit is not None and size > limit:
            tokens = sum(job.slots * job.tokens for job in group)
            raise InputError(
                f"The request may need {size:,} bytes of cache for {tokens:,} tokens, memory_limit is {limit:,}; "
                "shorten the prompt or max_new_tokens, or raise the limit."
            )

    def cancel(self, job: Job) -> None:
        """Ends a job, waiting or running; its state is free at once."""
        if job.reason is None and job.error is None:
            job.cancel()
        self._drop_ended()

    @property
    def is_idle(self) -> bool:
        """Whether nothing runs and nothing waits."""
        return not self.running and not self.waiting

    @property
    def reserved_bytes(self) -> int:
        """Bytes that the states of the running jobs may grow to."""
        return self._bytes(self.running)

    def _bytes(self, jobs: list[Job]) -> int:
        return sum(job.slots * self._engine.kv_bytes(job.tokens) for job in jobs)

    def admit(self) -> None:
        """Starts waiting groups in their order, as long as they fit."""
        while self.waiting:
            group = [job for job in self.waiting[0] if job.reason is None and job.error is None]
            slots = sum(job.slots for job in [*self.running, *group])
            limit = self.options.memory_limit
            if slots > self.options.max_sequences:
                return
            if limit is not None and self.reserved_bytes + self._bytes(group) > limit:
                return
            self.waiting.popleft()
            for job in group:
                try:
                    job.start()
                except (EdgeformerError, MemoryError) as error:  # of the state that a beam search makes
                    job.fail(error)
                else:
                    self.running.append(job)

    def _drop_ended(self) -> None:
        for job in self.running:
            if job.reason is not None or job.error is not None:
                job.release()
                if self._speculation is not None and isinstance(job, Sequence):
                    self._speculation.end(job)
        self.running = [job for job in self.running if job.reason is None and job.error is None]

    # -------------------------------------------------------------------------------------------------------- one step

    def step(self) -> None:
        """Runs one step of all jobs; each has ended, failed or gone on after it.

        A failure of the engine ends the job that caused it alone: the others' states are as before the call, and they
        run one by one.
        """
        self.admit()
        decoding, prompts = self._plan()
        plan = decoding + prompts
        if not plan:
            self._drop_ended()
            return
        decode_rows, prompt_rows = (sum(rows.ids.size for _, rows in part) for part in (decoding, prompts))
        has_drafts = decode_rows > sum(job.slots for job, _ in decoding)
        if self._has_spare_cpu:
            for job, _ in plan:
                job.prepare()
        began = time.perf_counter()
        try:
            found: list[Outputs | None] = [*self._forward([rows for _, rows in plan])]
        except (EdgeformerError, MemoryError):
            found = [self._forward_alone(job, rows) for job, rows in plan]
        seconds = time.perf_counter() - began
        if not has_drafts:
            self._budget.observe(decode_rows, prompt_rows, seconds)
        if self._speculation is not None and not prompt_rows:
            self._speculation.observe(decode_rows, seconds)
        for (job, rows), outputs in zip(plan, found, strict=True):
            if outputs is not None and job.reason is None:
                _accept(job, outputs, rows.keep)
        ran = sum(job.slots for (job, _), outputs in zip(plan, found, strict=True) if outputs is not None)
        of_prompts = zip(prompts, found[len(decoding) :], strict=True)
        prompt_ran = sum(rows.ids.size for (_, rows), outputs in of_prompts if outputs is not None)
        self.counters.step(self.running, ran, prompt_ran)
        self._drop_ended()

    def _plan(self) -> tuple[Plan, Plan]:
        """What runs in this step: (of jobs that decode, of prompts)."""
        decoding = [job for job in self.running if job.decodes]
        prompts = len(self.running) - len(decoding)
        if self._speculation is not None:
            room = self.options.token_budget - sum(job.slots for job in decoding)
            if prompts:
                room -= SMALLEST  # for prompts, which would wait as long as drafts fill the steps
            if prompts and self.options.stretch is not None:
                room = 0  # a prompt waits for the time that drafts would take, and others for the end of the step
            self._speculation.propose([job for job in decoding if isinstance(job, Sequence)], room)
        plan: Plan = []
        for job in decoding:
            rows = None if job.error is not None else _pending(job, 1)
            if rows is not None:
                plan.append((job, rows))
        chunks: Plan = []
        if not prompts:
            return plan, chunks
        room = self._budget.prompt_rows(sum(rows.ids.size for _, rows in plan), prompts)
        for job in self.running:
            if room <= 0:
                break
            if not job.decodes and (rows := _pending(job, room)) is not None:
                chunks.append((job, rows))
                room -= rows.ids.size
        return plan, chunks

    def _forward(self, batch: list[Rows]) -> list[Outputs]:
        calls: list[tuple[dict[str, Any], State]] = []
        for rows in batch:
            inputs = {IDS: rows.ids}
            if self._keeps_logits:
                inputs[KEEP] = np.array(rows.keep, np.int64)
            calls.append((inputs, rows.state))
        return self._engine.forward(calls)

    def _forward_alone(self, job: Job, rows: Rows) -> Outputs | None:
        """None if it failed, which ends it."""
        try:
            return self._forward([rows])[0]
        except (EdgeformerError, MemoryError) as error:
            job.fail(error)
            return None


def _accept(job: Job, outputs: Outputs, keep: int) -> None:
    """Hands it the logits of its last `keep` rows; an error ends it."""
    likeliest = outputs.likeliest
    try:
        job.accept(outputs[LOGITS][:, -keep:], None if likeliest is None else likeliest[:, -keep:])
    except (EdgeformerError, MemoryError) as error:
        job.fail(error)


def _pending(job: Job, room: int) -> Rows | None:
    """What it runs next; None if it waits, or failed to get a state."""
    try:
        return job.pending(room)
    except (EdgeformerError, MemoryError) as error:
        job.fail(error)
        return None
