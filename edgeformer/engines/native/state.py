"""What one sequence owns, in memory and as bytes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from edgeformer.engines.native.ir.graph import Array
from edgeformer.errors import StateError

_STATE_MAGIC = b"edgeformer-state 1\n"


class NativeState:
    """What one sequence (or one batch of them) owns: its KV cache. See `edgeformer.engines.base.State`."""

    __slots__ = ("_fingerprint", "_held", "_state")

    def __init__(self, state: Any, fingerprint: str, held: Mapping[str, Array] | None = None) -> None:
        self._state = state
        self._fingerprint = fingerprint
        self._held = held or {}  # inputs that stay the same for the whole sequence

    @property
    def length(self) -> int:
        """Tokens that the cache holds."""
        return int(self._state.length)

    @property
    def nbytes(self) -> int:
        """Bytes of the cache now; it grows in chunks as tokens come."""
        return int(self._state.nbytes)

    def truncate(self, length: int) -> None:
        """Forget all tokens from `length` on.

        Raises:
            InputError: `length` is negative or larger than `self.length`.
            StateError: the state is in use by another call.
        """
        self._state.truncate(int(length))

    def fork(self) -> NativeState:
        """An independent copy: what one does is never seen by the other."""
        return NativeState(self._state.fork(), self._fingerprint, self._held)

    def select(self, rows: Sequence[int]) -> None:
        """Sequence i of the batch becomes a copy of what sequence `rows[i]` was; as many as before. Inputs that the
        state holds stay where they are: a beam search has the same in every row.

        Raises:
            InputError: `rows` has another length than the batch, or names a sequence that is none.
            StateError: the state is in use by another call.
        """
        if list(rows) != list(range(self._state.batch)):
            self._state.select([int(row) for row in rows])

    def to_bytes(self) -> bytes:
        """The state as bytes, for `NativeEngine.state_from_bytes` of an engine of the same bundle and kv type.

        Raises:
            StateError: it holds inputs of its own (what an encoder made), which are not written.
        """
        if self._held:
            raise StateError(f"a state that holds {', '.join(self._held)} cannot be saved; encode the source again")
        parts = self._state.save()
        header = {"model": self._fingerprint, "parts": [len(p) for p in parts]}
        return _STATE_MAGIC + json.dumps(header).encode() + b"\n" + b"".join(parts)


def saved_parts(data: bytes, fingerprint: str) -> list[bytes]:
    """What `NativeState.to_bytes` wrote, for the C++ state to load.

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
