"""Parts of a KV cache of ONNX Runtime, for a prefix cache: copies in host memory, because a run makes new tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from edgeformer.bundle.signature import Array
from edgeformer.engines.base import CHUNK_TOKENS, KvChunk
from edgeformer.errors import InputError, StateError


@dataclass(frozen=True, eq=False)
class OrtChunk:
    """See `KvChunk`. `arrays` are in the order of signature.caches, each [kv_heads, CHUNK_TOKENS, head_dim]."""

    owner: object  # the engine
    arrays: tuple[Array, ...]

    @property
    def nbytes(self) -> int:
        """See `KvChunk.nbytes`."""
        return sum(array.nbytes for array in self.arrays)


def chunks_of(owner: object, entries: Sequence[Array], first: int) -> list[KvChunk]:
    """The full chunks from `first` on of a sequence's cache, arrays [kv_heads, length, head_dim]."""
    length = entries[0].shape[1] if entries else 0
    starts = range(first * CHUNK_TOKENS, length - CHUNK_TOKENS + 1, CHUNK_TOKENS)
    return [OrtChunk(owner, tuple(a[:, at : at + CHUNK_TOKENS].copy() for a in entries)) for at in starts]


def joined_chunks(owner: object, chunks: Sequence[KvChunk], length: int) -> list[Array]:
    """The first `length` (at least 1) tokens of the chunks as a cache: arrays [1, kv_heads, length, head_dim].

    Raises:
        InputError: the chunks have fewer tokens.
        StateError: a chunk belongs to another engine.
    """
    layers = []
    for chunk in chunks:
        if not isinstance(chunk, OrtChunk) or chunk.owner is not owner:
            raise StateError("A chunk belongs to another engine; restore chunks of this engine's states.")
        layers.append(chunk.arrays)
    if not 0 < length <= len(chunks) * CHUNK_TOKENS:
        raise InputError(f"{len(chunks)} chunks cannot restore {length} tokens.")
    return [
        np.ascontiguousarray(np.concatenate(parts, axis=1)[None, :, :length]) for parts in zip(*layers, strict=True)
    ]
