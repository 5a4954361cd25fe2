"""Speculation of all sequences on one engine: who drafts, and how many drafts run in each step."""

from __future__ import annotations

from collections.abc import Sequence as Tokens
from typing import Literal, Protocol
from weakref import WeakKeyDictionary

from edgeformer.decoding.constraints.constraint import Constraint
from edgeformer.decoding.limits import Limits
from edgeformer.decoding.speculation.control import DraftControl
from edgeformer.decoding.speculation.draft_model import DraftBundle, DraftModel, ModelDrafts, check_vocabulary
from edgeformer.decoding.speculation.lookup import RecentAnswers
from edgeformer.decoding.speculation.sequence_drafts import SequenceDrafts
from edgeformer.errors import EdgeformerError, InputError
from edgeformer.processing.tokenizer import Tokenizer

SpeculationName = Literal["auto", "off", "lookup"]
NAMES: tuple[SpeculationName, ...] = ("auto", "off", "lookup")


class Drafting(Protocol):
    """What drafts are made for: a `Sequence`."""

    ids: list[int]  # the prompt and all new tokens
    guesses: SequenceDrafts | None

    @property
    def constraint(self) -> Constraint | None:
        """The grammar of the answer."""
        ...

    @property
    def count(self) -> int:
        """The number of new tokens."""
        ...

    @property
    def draft_room(self) -> int:
        """How many drafts the next step can take."""
        ...

    def draft(self, tokens: Tokens[int]) -> None:
        """Drafts for the next step."""
        ...

    def fail(self, error: Exception) -> None:
        """Its draft model failed."""
        ...


def check_speculation(asked: object) -> None:
    """
    Raises:
        InputError: it is neither a name nor a model.
    """
    if not ((isinstance(asked, str) and asked in NAMES) or all(hasattr(asked, n) for n in ("bundle", "engine"))):
        raise InputError(f"speculation is {asked!r}, expected 'auto', 'off', 'lookup' or a Model that drafts.")


class Speculation:
    """What the sequences of one engine share: the cost of rows, recent answers, draft models.

    Schedulers of several threads may share it.
    """

    def __init__(self, limits: Limits, tokenizer: Tokenizer | None, *, is_exact: bool) -> None:
        self.control = DraftControl()
        self.recent = RecentAnswers()
        self._limits = limits
        self._tokenizer = tokenizer
        self._is_exact = is_exact
        self._models: WeakKeyDictionary[DraftBundle, DraftModel] = WeakKeyDictionary()

    def drafts(self, asked: SpeculationName | DraftBundle) -> SequenceDrafts | None:
        """The drafts of a new sequence; None without speculation.

        "auto" looks up the sequence itself and recent answers, where a row has the same bits in every step: so it
        changes no token. "lookup" looks up the sequence itself, on any engine. A model drafts where that is better.

        Raises:
            InputError: the graph cannot verify drafts, or the model cannot draft for it.
        """
        can = self._limits.cached and self._limits.keeps_logits
        if asked == "off" or (asked == "auto" and not (can and self._is_exact)):
            return None
        if not can:
            missing = "KV cache" if not self._limits.cached else "input logits_to_keep"
            raise InputError(f"Speculation needs a graph that verifies drafts; this one has no {missing}.")
        if isinstance(asked, str):
            return SequenceDrafts(self.control, self.recent if asked == "auto" else None)
        return SequenceDrafts(self.control, model=ModelDrafts(self._draft_model(asked)))

    def propose(self, sequences: Tokens[Drafting], room: int) -> None:
        """Gives drafts to those sequences (all of them decode) for which they pay, at most `room` in all.

        Those whose draft model fails, fail.
        """
        rows = len(sequences)
        waiting: dict[DraftModel, list[tuple[Drafting, ModelDrafts, int]]] = {}
        for sequence in sequences:
            guesses = sequence.guesses
            if guesses is None:
                continue
            count = guesses.plan(sequence.ids, rows - 1, min(room, sequence.draft_room), sequence.constraint)
            if count and guesses.model is not None:
                waiting.setdefault(guesses.model.source, []).append((sequence, guesses.model, count))
            else:
                count = len(guesses.drafts)
                sequence.draft(guesses.drafts)
            rows, room = rows + count, room - count
        for model, those in waiting.items():
            try:
                made = model.propose_batch([drafts for _, drafts, _ in those], [count for _, _, count in those])
            except (EdgeformerError, MemoryError) as error:
                for sequence, _, _ in those:
                    sequence.fail(error)
                continue
            for (sequence, _, _), tokens in zip(those, made, strict=True):
                guesses = sequence.guesses
                assert guesses is not None
                guesses.take(tokens, sequence.constraint)
                sequence.draft(guesses.drafts)

    def observe(self, rows: int, seconds: float) -> None:
        """A step of `rows` rows, none of them of a prompt, took so long."""
        self.control.observe(rows, seconds)

    def end(self, sequence: Drafting) -> None:
        """A sequence has ended: its answer is remembered, its drafts are not."""
        if sequence.guesses is not None:
            sequence.guesses.close(sequence.ids[len(sequence.ids) - sequence.count :])
            sequence.guesses = None

    def _draft_model(self, bundle: DraftBundle) -> DraftModel:
        known = self._models.get(bundle)
        if known is None:
            check_vocabulary(self._tokenizer, bundle.tokenizer, str(bundle.bundle.path))
            limits = Limits.of(bundle.bundle, bundle.engine)
            known = self._models[bundle] = DraftModel(bundle.engine, limits)
        return known
