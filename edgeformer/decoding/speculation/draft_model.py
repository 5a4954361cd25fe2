"""Drafts by a smaller model of the same vocabulary (Leviathan et al., arXiv 2211.17192, with greedy drafts)."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from edgeformer.bundle.bundle import Bundle
from edgeformer.bundle.signature import IDS, KEEP, Array
from edgeformer.decoding.limits import Limits
from edgeformer.decoding.speculation.drafts import NOTHING, Proposal
from edgeformer.engines.base import Engine, State
from edgeformer.engines.feed import CHUNK
from edgeformer.errors import InputError
from edgeformer.processing.tokenizer import Tokenizer

CHANCES = (0.6, 0.6, 0.6, 0.6, 0.6, 0.6)  # that a guess is right, before it is measured; by position in the proposal
FEW = 8  # tokens of a step that counts as the time of a guess; a step with more of them catches up with a prompt


class DraftBundle(Protocol):
    """What a draft model is made of; an `edgeformer.Model` has it."""

    bundle: Bundle
    engine: Engine
    tokenizer: Tokenizer | None


class DraftModel:
    """An engine that drafts for any number of sequences; each has its own state in it.

    Raises:
        InputError: the graph has no KV cache, or cannot give the logits of the last token alone.
    """

    def __init__(self, engine: Engine, limits: Limits) -> None:
        if not limits.cached or not limits.keeps_logits:
            missing = "KV cache" if not limits.cached else f"input {KEEP}"
            raise InputError(f"A draft model must have a KV cache and {KEEP}; this bundle has no {missing}.")
        self._engine = engine
        self._limits = limits
        self.seconds = 0.0  # that one draft took lately, for one sequence

    def new_state(self) -> State:
        """The state of a sequence in the draft engine."""
        return self._engine.new_state()

    def propose_batch(self, drafts: Sequence[ModelDrafts], counts: Sequence[int]) -> list[list[int]]:
        """For each sequence at most counts[i] guesses; one step of the engine makes a guess for all of them."""
        guesses: list[list[int]] = [[] for _ in drafts]
        pending = {i: d.pending() for i, d in enumerate(drafts) if counts[i] > 0 and self._has_room(d, counts[i])}
        while pending:
            most = max(map(len, pending.values()))
            began = time.perf_counter()
            logits = self._run([(drafts[i], ids) for i, ids in pending.items()])
            if most <= FEW:
                self._observe((time.perf_counter() - began) / len(pending))
            following = {}
            for i, row in zip(pending, logits, strict=True):
                token = int(row.argmax())
                guesses[i].append(token)
                if len(guesses[i]) < counts[i]:
                    following[i] = [token]
            pending = following
        return guesses

    def _observe(self, seconds: float) -> None:
        self.seconds = 0.8 * self.seconds + 0.2 * seconds if self.seconds else seconds

    def _has_room(self, drafts: ModelDrafts, count: int) -> bool:
        return self._limits.context is None or drafts.length + count <= self._limits.context

    def _run(self, batch: Sequence[tuple[ModelDrafts, list[int]]]) -> list[Array]:
        """The logits [vocab] after the ids of each sequence. Long ids, as a prompt has them, run in chunks first."""
        for drafts, ids in batch:
            while len(ids) > CHUNK:
                self._forward([(drafts, ids[:CHUNK])])
                del ids[:CHUNK]
        return self._forward(batch)

    def _forward(self, batch: Sequence[tuple[ModelDrafts, list[int]]]) -> list[Array]:
        one = np.array(1, np.int64)
        given = [({IDS: np.array([ids], np.int64), KEEP: one}, drafts.state) for drafts, ids in batch]
        outputs = self._engine.forward(given)
        for drafts, ids in batch:
            drafts.held.extend(ids)
        return [out["logits"][0, -1] for out in outputs]


class ModelDrafts:
    """The drafts of one sequence by a DraftModel: greedy guesses, with a KV cache that follows the accepted tokens."""

    def __init__(self, model: DraftModel) -> None:
        self.source = model
        self._tokens: list[int] = []
        self.state = model.new_state()
        self.held: list[int] = []  # tokens in the state: accepted ones, and guesses since
        self._agreed = 0  # so many of them are known to be accepted

    @property
    def length(self) -> int:
        """Tokens of the sequence."""
        return len(self._tokens)

    @property
    def seconds(self) -> float:
        """What one guess takes."""
        return self.source.seconds

    def extend(self, tokens: Sequence[int]) -> None:
        """Append tokens that the sequence has accepted; first its prompt."""
        self._tokens.extend(tokens)

    def propose(self, count: int, after: Sequence[int] = ()) -> Proposal:
        """At most `count` guesses of what follows the tokens of the sequence and then `after`."""
        length = len(self._tokens)
        self._tokens.extend(after)
        try:
            guesses = self.source.propose_batch([self], [count])[0]
        finally:
            del self._tokens[length:]
            self._agreed = min(self._agreed, length)  # `after` is not accepted yet
        return Proposal(guesses, 1) if guesses else NOTHING

    def pending(self) -> list[int]:
        """The tokens that the state does not hold; guesses in it that were wrong are removed. At least one token."""
        held, tokens = self.held, self._tokens
        known = min(self.state.length, len(held), len(tokens) - 1)
        common = min(self._agreed, known)
        while common < known and held[common] == tokens[common]:
            common += 1
        if self.state.length > common:
            self.state.truncate(common)
        del held[common:]
        self._agreed = common
        return tokens[common:]


def check_vocabulary(target: Tokenizer | None, draft: Tokenizer | None, name: str) -> None:
    """Require that each token id means the same token to both models.

    Raises:
        InputError: one has no tokenizer, or the vocabularies differ. `name` is the draft bundle's.
    """
    if target is None or draft is None:
        raise InputError(f"{name} cannot draft for this model: both need a tokenizer, to compare their vocabularies.")
    sizes = target.size, draft.size
    if sizes[0] != sizes[1]:
        raise InputError(
            f"{name} has {sizes[1]} tokens, the model {sizes[0]}; a draft model needs the same vocabulary."
        )
    for number in range(sizes[0]):
        if target.token(number) != draft.token(number):
            raise InputError(
                f"Token {number} is {draft.token(number)!r} in {name} and {target.token(number)!r} in the model; "
                "a draft model needs the same vocabulary."
            )
