"""The KV cache of a sequence in ONNX Runtime, and the joint cache of several that run together.

The sequences of a decode step stay joined from step to step: a run reads one joint cache and gives the next one. Only
when the set of sequences changes are the caches copied. Entries that a sequence drops stay in the tensors, hidden by
the mask, until too many of them are there.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from edgeformer.bundle.signature import IDS, KEEP, POSITIONS, Array, Signature
from edgeformer.engines.base import CHUNK_TOKENS, KvChunk
from edgeformer.engines.ort_padding import CACHE_MASK
from edgeformer.errors import InputError, StateError

SHORT = 8  # new tokens: a decode step with its drafts. Longer runs use the CPU well alone, and padding costs them more.
_SPARE = 32  # hidden entries that a joint cache may have beside a quarter of its longest sequence


class Owner(Protocol):
    """What a state needs of its engine."""

    gate: threading.Lock  # held while locks of states are taken
    signature: Signature

    def kv_bytes(self, tokens: int) -> int:
        """See `Engine.kv_bytes`."""
        ...

    def to_device(self, array: Array) -> Any:
        """The array as an OrtValue."""
        ...


@dataclass(frozen=True, eq=False)
class OrtChunk:
    """See `KvChunk`: copies of a part of each cache tensor, [1, kv_heads, CHUNK_TOKENS, head_dim], in host memory."""

    owner: Owner
    arrays: tuple[Array, ...]

    @property
    def nbytes(self) -> int:
        """See `KvChunk.nbytes`."""
        return sum(array.nbytes for array in self.arrays)


class OrtState:
    """The KV cache of one sequence, or of one batch of equal length.

    It has OrtValues [batch, kv_heads, length, head_dim] of its own, or is one row of a joint cache.
    """

    def __init__(self, owner: Owner, static_inputs: dict[str, Any] | None = None, batch: int | None = None) -> None:
        self.owner = owner
        self.lock = threading.Lock()
        self.static_inputs = static_inputs or {}  # OrtValues on the device
        self.joint: Joint | None = None
        self.row = 0  # in `joint`
        self._cache: list[Any] = []  # in the order of signature.caches; empty before the first token, or in a joint
        self._fixed_batch = batch
        self.batch = batch
        self._length = 0

    @property
    def length(self) -> int:
        """See `State.length`."""
        return self._length

    @property
    def nbytes(self) -> int:
        """See `State.nbytes`. Tensors that forks share until their next step count in each of them."""
        return self.owner.kv_bytes(self._length) * (self.batch or 1)

    @property
    def cache(self) -> list[Any]:
        """OrtValues of its own, in the order of signature.caches; a row of a joint cache is copied."""
        if self.joint is None:
            return self._cache
        return [self.owner.to_device(np.ascontiguousarray(array)[None]) for array in self.entries()]

    def entries(self) -> list[Array]:
        """The cache of the only sequence, arrays [kv_heads, length, head_dim]; empty before the first token."""
        if self.joint is None:
            return [value.numpy()[0] for value in self._cache]
        return self.joint.entries(self.row)

    def truncate(self, length: int) -> None:
        """See `State.truncate`."""
        if not 0 <= length <= self._length:
            raise InputError(f"A state of {self._length} tokens cannot be cut to {length}.")
        with locked([self]):
            if length == 0:
                self._cache, self.joint, self.batch = [], None, self._fixed_batch
            elif self.joint is not None:
                self.joint.hide(self.row, length)
            elif length < self._length:
                self._cache = [self._copied(value.numpy()[:, :, :length]) for value in self._cache]
            self._length = length

    def fork(self) -> OrtState:
        """See `State.fork`."""
        with locked([self]):
            copy = OrtState(self.owner, self.static_inputs, self._fixed_batch)
            # A step creates new OrtValues and does not write to old ones, so both states may share them.
            copy._cache, copy.batch, copy._length = list(self.cache), self.batch, self._length
            return copy

    @property
    def shortest(self) -> int:
        """See `State.shortest`."""
        return 0

    def chunks(self, first: int = 0) -> list[KvChunk]:
        """See `State.chunks`. They are copies."""
        if self.batch not in (None, 1):
            raise InputError(f"Chunks are of one sequence, the state holds {self.batch}.")
        starts = range(first * CHUNK_TOKENS, self._length - CHUNK_TOKENS + 1, CHUNK_TOKENS)
        if not starts:
            return []
        with locked([self]):
            whole = [value.numpy() for value in self.cache]
        return [OrtChunk(self.owner, tuple(a[:, :, at : at + CHUNK_TOKENS].copy() for a in whole)) for at in starts]

    def restore(self, chunks: Sequence[KvChunk], length: int) -> int:
        """See `State.restore`."""
        arrays = []
        for chunk in chunks:
            if not isinstance(chunk, OrtChunk) or chunk.owner is not self.owner:
                raise StateError("A chunk belongs to another engine; restore chunks of this engine's states.")
            arrays.append(chunk.arrays)
        if not 0 <= length <= len(chunks) * CHUNK_TOKENS:
            raise InputError(f"{len(chunks)} chunks cannot restore {length} tokens.")
        with locked([self]):
            if self._length:
                raise StateError(f"The state has {self._length} tokens; restore needs an empty one.")
            if length:
                parts = (np.concatenate(layer, axis=2)[:, :, :length] for layer in zip(*arrays, strict=True))
                self._cache = [self.owner.to_device(np.ascontiguousarray(part)) for part in parts]
                self.batch, self._length = 1, length
        return length

    def select(self, rows: Sequence[int]) -> None:
        """See `State.select`."""
        wanted, before = [int(row) for row in rows], self.batch
        if before is None or not wanted or not all(0 <= row < before for row in wanted):
            raise InputError(f"A state of {before} sequences cannot select {wanted}.")
        if wanted == list(range(before)):
            return
        with locked([self]):
            self._cache = [self._copied(value.numpy()[wanted]) for value in self.cache]
            self.joint, self.batch = None, len(wanted)
            if len(wanted) != before and self.static_inputs:
                self._fixed_batch = len(wanted)
                self.static_inputs = {
                    name: self._copied(value.numpy()[wanted]) for name, value in self.static_inputs.items()
                }

    # The rest is for runs: the caller must own the lock.

    def grow(self, cache: list[Any], batch: int, tokens: int) -> None:
        """Replace the cache by the one that a run returned."""
        self._cache, self.joint, self.batch, self._length = cache, None, batch, self._length + tokens

    def grow_joint(self, tokens: int) -> None:
        """Count the tokens that the joint cache got for this sequence."""
        self.batch, self._length = 1, self._length + tokens

    def belong(self, joint: Joint, row: int) -> None:
        """Give up the own cache for a row of `joint`, which has a copy of it."""
        self._cache, self.joint, self.row = [], joint, row

    def leave(self) -> None:
        """Give up the row of a joint cache for a cache of its own."""
        self._cache, self.joint = self.cache, None

    def _copied(self, array: Array) -> Any:
        return self.owner.to_device(np.ascontiguousarray(array))


Call = tuple[Mapping[str, Array], OrtState]


def short(arrays: Mapping[str, Array], state: OrtState) -> bool:
    """Whether a call may run in a batch: few tokens of one sequence, whose inputs are all given here."""
    ids = arrays.get(IDS)
    return not state.static_inputs and ids is not None and ids.shape[0] == 1 and ids.shape[1] <= SHORT


class Joint:
    """The KV caches of several sequences. Row i of each tensor is that of `members[i]`; a member may be gone.

    Whoever changes it owns the locks of all members: a step runs all of them, and `hide` is about a member's own row.
    """

    def __init__(self, members: Sequence[OrtState], values: list[Any], visible: Array) -> None:
        self._members = [weakref.ref(state) for state in members]
        self.values = values  # OrtValues [rows, kv_heads, total, head_dim] in the order of signature.caches
        self.visible = visible  # bool [rows, total]: the entries of the row's sequence, in order

    @classmethod
    def of(cls, states: Sequence[OrtState], fill: float = 0.0) -> Joint:
        """A copy of the caches of these states, each with one sequence at most, aligned right; `fill` pads them."""
        total = max(state.length for state in states)
        owner = states[0].owner
        visible = np.arange(total) >= total - np.array([[state.length] for state in states])  # [rows, total]
        caches = [state.entries() for state in states]
        values = []
        for place, port in enumerate(owner.signature.cache_ports.values()):
            sizes = [size if isinstance(size, int) else total for size in port.shape[1:]]
            joined = np.full([len(states), *sizes], fill, port.dtype)
            for row, (state, cache) in enumerate(zip(states, caches, strict=True)):
                if state.length:
                    joined[row, :, total - state.length :] = cache[place]
            values.append(owner.to_device(joined))
        return cls(states, values, visible)

    @classmethod
    def joining(cls, states: Sequence[OrtState]) -> Joint:
        """The joint cache of exactly these states: the one that they have, else a new one that they then belong to."""
        old = [joint for joint in {id(s.joint): s.joint for s in states}.values() if joint is not None]
        if len(old) == 1 and old[0]._holds(states):
            return old[0]
        joint = cls.of(states)
        for row, state in enumerate(states):
            state.belong(joint, row)
        for other in old:
            other._dissolve()
        return joint

    def entries(self, row: int) -> list[Array]:
        """The cache of one sequence, [kv_heads, length, head_dim] each: views where its entries are contiguous."""
        places = np.flatnonzero(self.visible[row])
        if not places.size:
            return []
        contiguous = places[-1] - places[0] + 1 == len(places)
        part = slice(places[0], places[-1] + 1) if contiguous else places
        return [value.numpy()[row][:, part] for value in self.values]

    def hide(self, row: int, length: int) -> None:
        """Remove the entries of a sequence after the first `length`."""
        self.visible[row, np.flatnonzero(self.visible[row])[length:]] = False

    def feeds(self, calls: Sequence[Call]) -> dict[str, Array]:
        """The inputs of a run of all members, each with one call, without the caches.

        A row with fewer new tokens than another is padded on their left. A padding token sees only itself, for the
        softmax of a token that sees nothing is NaN, and NaN in a cache spreads even through a weight of 0.
        """
        rows, total = self.visible.shape
        count = max(arrays[IDS].shape[1] for arrays, _ in calls)
        ids = np.zeros((rows, count), calls[0][0][IDS].dtype)
        positions = np.zeros((rows, count), calls[0][0][POSITIONS].dtype)
        fresh = np.zeros((rows, count), np.bool_)
        keep = 1
        for arrays, state in calls:
            size = arrays[IDS].shape[1]
            ids[state.row, count - size :] = arrays[IDS][0]
            positions[state.row, count - size :] = arrays[POSITIONS][0]
            fresh[state.row, count - size :] = True
            keep = max(keep, _kept(arrays))
        seen = np.concatenate([self.visible, fresh], axis=1)  # [rows, total + count]
        mask = np.repeat(seen[:, None], count, axis=1)  # [rows, count, total + count]; the graph hides later tokens
        mask[:, np.arange(count), total + np.arange(count)] = True
        feeds = {IDS: ids, POSITIONS: positions, CACHE_MASK: np.ascontiguousarray(mask[:, None])}
        return feeds | ({KEEP: np.array(keep, np.int64)} if KEEP in calls[0][0] else {})

    def logits(self, calls: Sequence[Call], logits: Array) -> list[Array]:
        """The logits [1, kept, vocab] of each call, out of those of the whole run."""
        return [logits[state.row : state.row + 1, logits.shape[1] - _kept(arrays) :] for arrays, state in calls]

    def grow(self, calls: Sequence[Call], values: list[Any]) -> None:
        """Replace the caches by those that the run of `calls` returned."""
        count = values[0].shape()[2] - self.visible.shape[1]
        fresh = np.zeros((len(self._members), count), np.bool_)
        for arrays, state in calls:
            fresh[state.row, count - arrays[IDS].shape[1] :] = True
        self.values, self.visible = values, np.concatenate([self.visible, fresh], axis=1)

    def _holds(self, states: Sequence[OrtState]) -> bool:
        """Whether its members are exactly these states, with few hidden entries."""
        longest = max(state.length for state in states)
        few = self.visible.shape[1] <= longest + longest // 4 + _SPARE
        return few and len(self._members) == len(states) and all(state.joint is self for state in states)

    def _dissolve(self) -> None:
        """Members that still belong here get a cache of their own, so that the tensors of all rows are freed.

        One that is in use by another thread stays; it keeps these tensors until its next run.
        """
        for member in self._members:
            state = member()
            if state is None or state.joint is not self:
                continue
            with state.owner.gate:  # nobody else sees that the lock is taken
                if state.lock.acquire(blocking=False):
                    try:
                        state.leave()
                    finally:
                        state.lock.release()


def _kept(arrays: Mapping[str, Array]) -> int:
    size = arrays[IDS].shape[1]
    return min(int(arrays.get(KEEP, 0)) or int(size), int(size))


@contextlib.contextmanager
def locked(states: Sequence[OrtState]) -> Iterator[None]:
    """Lock all states for one call, or raise StateError: a second call on a state would mix the tokens of both."""
    taken: list[OrtState] = []
    try:
        with states[0].owner.gate if states else contextlib.nullcontext():
            for state in states:
                if not state.lock.acquire(blocking=False):
                    raise StateError(
                        "The state is in use by another call; use one state per thread, for example a fork()."
                    )
                taken.append(state)
        yield
    finally:
        for state in taken:
            state.lock.release()
