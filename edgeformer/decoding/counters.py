"""What a scheduler has done, as numbers that only grow: a server's metrics read them."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass, field

from edgeformer.decoding.job import Job

# Seconds; those of vLLM's metrics, and smaller ones for small models.
GAP_BOUNDS = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0,
    40.0, 80.0,
)  # fmt: skip
STEP_BOUNDS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)  # tokens


class Tally:
    """How many values lay in each range: `counts[i]` up to and including `bounds[i]`, the last one above all."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def add(self, value: float) -> None:
        """Counts a value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value


@dataclass
class Counters:
    """Written by the thread of a scheduler, read by any; the schedulers of one model may follow each other in it."""

    steps: int = 0  # calls of the engine
    sequences: int = 0  # that ran, summed over the steps
    prompt_tokens: int = 0  # that ran: without those that were cached
    new_tokens: int = 0
    drafts: int = 0  # steps of a sequence that had drafts
    draft_tokens: int = 0
    accepted: list[int] = field(default_factory=list)  # drafts that were right, by their place in a step
    longest: int = 0  # most tokens of a sequence, with its prompt
    step_tokens: Tally = field(default_factory=lambda: Tally(STEP_BOUNDS))  # of prompts, and new ones
    gaps: Tally = field(default_factory=lambda: Tally(GAP_BOUNDS))  # seconds between steps that gave a sequence tokens

    def step(self, jobs: Iterable[Job], sequences: int, prompt_tokens: int) -> None:
        """A step has run `sequences` of `jobs`, and so many tokens of prompts."""
        before = self.new_tokens
        for job in jobs:
            self._job(job)
        self.steps += 1
        self.sequences += sequences
        self.prompt_tokens += prompt_tokens
        self.step_tokens.add(prompt_tokens + self.new_tokens - before)

    def _job(self, job: Job) -> None:
        now, before = job.progress, job.counted
        if now.tokens == before.tokens:
            return
        job.counted = now
        self.new_tokens += now.tokens - before.tokens
        self.longest = max(self.longest, len(job.request.prompt) + now.tokens)
        if before.tokens:
            self.gaps.add(now.seconds - before.seconds)
        if now.proposed > before.proposed:
            self.drafts += 1
            self.draft_tokens += now.proposed - before.proposed
            right = now.accepted - before.accepted
            self.accepted += [0] * (right - len(self.accepted))
            for place in range(right):
                self.accepted[place] += 1
