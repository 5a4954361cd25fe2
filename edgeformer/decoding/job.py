"""What a scheduler runs: jobs that say which tokens run next, and take the logits of these."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from edgeformer.bundle.signature import Array
from edgeformer.decoding.request import Request
from edgeformer.decoding.result import Piece, Result
from edgeformer.engines.base import State


class Rows(NamedTuple):
    """Token ids [batch, length] to run through `state`; the logits of the last `keep` positions are wanted."""

    ids: Array
    state: State
    keep: int


class Progress(NamedTuple):
    """How far a job is. `seconds`: when its last token came, on `time.perf_counter`'s clock."""

    tokens: int = 0  # new ones
    proposed: int = 0  # drafts
    accepted: int = 0
    seconds: float = 0.0


class Job(Protocol):
    """One request in a scheduler: a sequence, or a beam search. The scheduler alone calls it, from one thread."""

    request: Request
    reason: str | None  # why it ended; None while it goes on
    error: Exception | None  # why it failed
    counted: Progress  # what the scheduler's counters know of it

    @property
    def slots(self) -> int:
        """How many sequences it runs: one, or its beams."""
        ...

    @property
    def tokens(self) -> int:
        """The most tokens that each of its sequences will hold."""
        ...

    def start(self) -> None:
        """It was admitted: makes its state."""
        ...

    @property
    def progress(self) -> Progress:
        """How far it is."""
        ...

    @property
    def decodes(self) -> bool:
        """Whether its prompt has run, so that each step gives it new tokens."""
        ...

    def pending(self, room: int) -> Rows | None:
        """What to run next, at most `room` rows (decode rows may be more); None while it waits for another job."""
        ...

    def prepare(self) -> None:
        """The engine runs what `pending` gave: another CPU may do meanwhile what `accept` will need."""
        ...

    def accept(self, logits: Array, likeliest: Array | None = None) -> None:
        """Takes the logits [batch, keep, vocab] of what `pending` gave last, which has run.

        `likeliest` [batch, keep]: the places of their largest, where the engine knows them; see `Outputs`.

        Raises:
            EdgeformerError: the logits hold NaN, or nothing may follow; the job has ended.
        """
        ...

    def take(self) -> Sequence[Piece]:
        """The pieces since the last call."""
        ...

    def fail(self, error: Exception) -> None:
        """It ends with an error."""
        ...

    def cancel(self) -> None:
        """It ends where it is, with the finish reason "cancel"."""
        ...

    def result(self) -> Result:
        """The whole answer, once it has ended."""
        ...

    def release(self) -> None:
        """Drops its state."""
        ...
