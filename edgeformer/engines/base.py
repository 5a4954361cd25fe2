"""The protocols of engines and states: an engine runs one graph, a state is the KV cache of one sequence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

Arrays = Mapping[str, np.ndarray]

CHUNK_TOKENS = 128  # of a KvChunk


class KvChunk(Protocol):
    """The keys and values of CHUNK_TOKENS tokens in all layers. Immutable; made by `State.chunks`."""

    @property
    def nbytes(self) -> int:
        """Bytes that it keeps in memory, shared with states or not."""
        ...


class Outputs(dict[str, np.ndarray]):
    """What `Engine.forward` gives for one sequence: the graph's outputs by name, without `present.*`."""

    # int64 [batch, kept]: the place of the largest of each row of `logits`, of the first NaN where it has one. None
    # where the engine does not look for it.
    likeliest: np.ndarray | None = None


class State(Protocol):
    """The KV cache of one sequence, or of one batch of equal length. `Engine.forward` appends to it."""

    @property
    def length(self) -> int:
        """The number of tokens in the cache."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes of the KV cache that this state alone holds: dropping the state frees them."""
        ...

    def truncate(self, length: int) -> None:
        """Remove all tokens after the first `length`.

        Raises:
            InputError: `length` is negative or larger than `self.length`.
            StateError: `length` is not 0 and less than `self.shortest`.
        """
        ...

    @property
    def shortest(self) -> int:
        """The least `length` other than 0 for `truncate`; 0 means any.

        A layer with a sliding window drops keys that no later token sees. It keeps enough to remove 128 tokens.
        """
        ...

    def fork(self) -> State:
        """An independent state with the same tokens. Engines share the memory of both where they can."""
        ...

    def chunks(self, first: int = 0) -> list[KvChunk]:
        """The full chunks of the state from chunk `first` on: chunk i has the tokens from CHUNK_TOKENS * i on.

        Raises:
            InputError: the state is a batch of several sequences.
        """
        ...

    def restore(self, chunks: Sequence[KvChunk], length: int) -> int:
        """Fill an empty state with the first `length` tokens of the chunks 0, 1, ... of a sequence.

        Returns the tokens that the state now has: `length`, or fewer (a multiple of CHUNK_TOKENS, maybe 0) where a
        sliding window had dropped keys of the chunks.

        Raises:
            InputError: the chunks have fewer tokens than `length`.
            StateError: the state is not empty, or a chunk belongs to another engine.
        """
        ...

    def select(self, rows: Sequence[int]) -> None:
        """Reorder the batch: sequence i becomes a copy of the former sequence `rows[i]`.

        There may be more or fewer rows than before: a beam search runs its prompt as one row and then selects it for
        each beam. Static inputs follow the rows only where their number changes; else they stay in place, because all
        rows of a beam search have the same ones.

        Raises:
            InputError: `rows` is empty, an entry is out of range, or no token has run.
        """
        ...


class Engine(Protocol):
    """Runs a graph. Immutable: threads may share one engine, but not a state."""

    @property
    def name(self) -> str:
        """`"cpu"`, `"cuda"` or `"native"`."""
        ...

    @property
    def threads(self) -> int:
        """CPU threads that compute."""
        ...

    @property
    def rows_are_exact(self) -> bool:
        """Whether the outputs of a token have the same bits whatever else runs in the call, and in any chunks."""
        ...

    def new_state(self, static_inputs: Arrays | None = None) -> State:
        """An empty state. `static_inputs` are graph inputs that are the same for all calls with this state.

        Raises:
            InputError: a static input is not an input of the graph, or has a wrong type, shape or value.
        """
        ...

    def kv_bytes(self, tokens: int) -> int:
        """Bytes of the KV cache of one sequence with `tokens` tokens, without static inputs; 0 without a KV cache.

        Raises:
            InputError: `tokens` is negative.
        """
        ...

    def forward(self, batch: Sequence[tuple[Arrays, State]]) -> list[Outputs]:
        """The outputs of the graph for each (inputs, state), in order. The tokens are appended to each state.

        Prefill (many tokens), decode (one token) and batches (several pairs) all use this call. The state of a graph
        without a KV cache stays empty. Inputs are those of the graph, with a batch axis, without `past_key_values.*`
        and static inputs; outputs are those of the graph without `present.*`. `position_ids` is optional and then
        continues from the length of the state. `logits_to_keep` (int) computes the logits of the last tokens only;
        0, the default, means all.

        Raises:
            InputError: an array has a wrong name, type, rank or size, or a token id is out of range.
            StateError: a state is in use by another thread, or belongs to another engine.
        """
        ...
