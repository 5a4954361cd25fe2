"""Engines run one graph of a bundle; a state is all that one sequence owns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

Arrays = Mapping[str, np.ndarray]


class State(Protocol):
    """What one sequence owns: the KV cache and its length. Made by `Engine.new_state`, changed by `Engine.forward`."""

    @property
    def length(self) -> int:
        """Tokens that the cache holds."""
        ...

    def truncate(self, length: int) -> None:
        """Forget all tokens from `length` on.

        Raises:
            InputError: `length` is negative or larger than `self.length`.
        """
        ...

    def fork(self) -> State:
        """An independent copy of the state."""
        ...

    def select(self, rows: Sequence[int]) -> None:
        """Sequence i of the batch becomes a copy of what sequence `rows[i]` was; the batch keeps its size.
        Static inputs do not move: a beam search has the same ones in every row.

        Raises:
            InputError: `rows` has another length than the batch, or names a sequence that is none.
        """
        ...


class Engine(Protocol):
    """Runs a graph. Immutable: many threads may share one, each with states of its own."""

    @property
    def name(self) -> str:
        """`"cpu"`, `"cuda"` or `"native"`."""
        ...

    def new_state(self, static_inputs: Arrays | None = None) -> State:
        """An empty state; `static_inputs` are inputs of the graph given once, for all calls with it.

        Raises:
            InputError: one of them does not fit the graph.
        """
        ...

    def forward(self, batch: Sequence[tuple[Arrays, State]]) -> list[dict[str, np.ndarray]]:
        """The outputs of the graph for each (inputs, state), in order; each state grows by the tokens given.

        One entry for everything: many tokens are a prefill, one token is a decode step, several pairs are a batch, and
        a graph without a KV cache simply has a state that stays empty. Inputs are the graph's own inputs without
        `past_key_values.*`, with their batch axis; outputs are its outputs without `present.*`. `position_ids` may be
        left out: it continues from the state's length. `logits_to_keep` (int, default 0 = all) keeps the last logits.

        Raises:
            InputError: an array's name, type, rank or size is wrong, or a token id is out of range.
            StateError: a state is in use by another thread, or belongs to another model.
        """
        ...
