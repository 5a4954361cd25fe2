"""The state of the native engine: the KV cache of one sequence, in memory and as bytes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from edgeformer.bundle.signature import Array
from edgeformer.engines.base import CHUNK_TOKENS, KvChunk
from edgeformer.errors import StateError

if TYPE_CHECKING:
    from edgeformer import _native

_STATE_MAGIC = b"edgeformer-state 1\n"


class NativeState:
    """The KV cache of one sequence, or of one batch of them. See `edgeformer.engines.base.State`."""

    __slots__ = ("_fingerprint", "_state", "_static_inputs")

    def __init__(
        self, state: _native.State, fingerprint: str, static_inputs: Mapping[str, Array] | None = None
    ) -> None:
        self._state = state
        self._fingerprint = fingerprint
        self._static_inputs = static_inputs or {}  # inputs that are given once a sequence

    @property
    def length(self) -> int:
        """Tokens that the cache holds."""
        return int(self._state.length)

    @property
    def nbytes(self) -> int:
        """Bytes of the cache that this state alone holds; it grows in chunks as tokens come."""
        return int(self._state.nbytes)

    @property
    def nbytes_shared(self) -> int:
        """Bytes of chunks that other states or a prefix cache hold too."""
        return int(self._state.nbytes_shared)

    @property
    def shortest(self) -> int:
        """See `edgeformer.engines.base.State.shortest`."""
        return int(self._state.shortest)

    def truncate(self, length: int) -> None:
        """Forget all tokens from `length` on.

        Raises:
            InputError: `length` is negative or larger than `self.length`.
            StateError: the state is in use by another call, or `length` is not 0 and less than `self.shortest`.
        """
        self._state.truncate(int(length))

    def fork(self) -> NativeState:
        """An independent state that shares all chunks: one of 128 tokens is copied before the first append to it."""
        return NativeState(self._state.fork(), self._fingerprint, self._static_inputs)

    def chunks(self, first: int = 0) -> list[KvChunk]:
        """See `edgeformer.engines.base.State.chunks`. The chunks share the state's memory.

        Raises:
            InputError: `first` is negative, or the state is a batch of several sequences.
        """
        return [self._state.chunk(i) for i in range(first, self.length // CHUNK_TOKENS)]

    def restore(self, chunks: Sequence[KvChunk], length: int) -> int:
        """See `edgeformer.engines.base.State.restore`. The state shares the memory of the chunks."""
        from edgeformer import _native

        natives = [chunk for chunk in chunks if isinstance(chunk, _native.KvChunk)]
        if len(natives) < len(chunks):
            raise StateError(f"chunks of another engine were given to a state of the native one: {chunks!r:.200}")
        return int(self._state.restore(natives, int(length)))

    def select(self, rows: Sequence[int]) -> None:
        """See `edgeformer.engines.base.State.select`. Sequences that come from one row share its chunks.

        Raises:
            InputError: `rows` is empty, or has a number that no sequence has.
            StateError: the state is in use by another call.
        """
        wanted, before = [int(row) for row in rows], self._state.batch
        if wanted == list(range(before)):
            return
        self._state.select(wanted)
        if len(wanted) != before:
            self._static_inputs = {name: array[wanted] for name, array in self._static_inputs.items()}

    def to_bytes(self) -> bytes:
        """The state as bytes, for `NativeEngine.state_from_bytes` of an engine of the same bundle and kv type.

        Raises:
            StateError: it has static inputs (what an encoder made), which are not saved.
        """
        if self._static_inputs:
            names = ", ".join(self._static_inputs)
            raise StateError(f"a state with the static inputs {names} cannot be saved; encode the source again")
        parts = self._state.save()
        header = {"model": self._fingerprint, "parts": [len(p) for p in parts]}
        return _STATE_MAGIC + json.dumps(header).encode() + b"\n" + b"".join(parts)


def saved_parts(data: bytes, fingerprint: str) -> list[bytes]:
    """The KV caches in what `NativeState.to_bytes` wrote, for the C++ state to load.

    Raises:
        StateError: it was written for a model with another fingerprint, or is damaged.
    """
    start = data.find(b"\n", len(_STATE_MAGIC))
    if not data.startswith(_STATE_MAGIC) or start < 0:
        raise StateError("these bytes are not a saved state of edgeformer's native engine, format 1")
    try:
        header = json.loads(data[len(_STATE_MAGIC) : start])
        model, sizes = str(header["model"]), [int(n) for n in header["parts"]]
    except (ValueError, KeyError, TypeError) as e:
        raise StateError(f"the saved state's header is damaged: {e}") from e
    if model != fingerprint:
        raise StateError(
            f"the saved state belongs to model {model[:12]}, this is {fingerprint[:12]}; load the bundle that wrote it"
        )
    body = data[start + 1 :]
    if min(sizes, default=0) < 0 or sum(sizes) != len(body):
        raise StateError(f"the saved state holds {len(body):,} bytes, its header says {sum(sizes):,}; it is cut short")
    parts, at = [], 0
    for n in sizes:
        parts.append(body[at : at + n])
        at += n
    return parts
