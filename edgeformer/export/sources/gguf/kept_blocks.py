"""Keeps the quantized blocks of a GGUF file bit for bit, without a second quantization.

A parameter's blocks are found by content, not by name: each row of the parameter, dequantized by transformers, is
looked up among the dequantized rows of the file. So tensor names and the row order of queries and keys (which llama.cpp
permutes and transformers restores) need not be known. Formats: ggml's block structures as documented by the `gguf`
package.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from edgeformer.bundle.signature import F32
from edgeformer.errors import ExportError
from edgeformer.export.blocks import Blocks
from edgeformer.export.sources.gguf.tensors import dequantized

Raw = NDArray[Any]  # of uint8


@dataclass(frozen=True)
class KeptMatrix:
    """The rows of one tensor: its blocks and its values, float32 [N, K]. A stack of matrices is concatenated."""

    blocks: Blocks
    values: F32


def read_matrices(path: Path) -> Iterator[tuple[str, str, KeptMatrix | None]]:
    """(name, type, blocks and values) of each matrix of a GGUF file, in order; None for types without kept blocks.

    Raises:
        ExportError: the blocks give other values than the gguf package.
    """
    for tensor in gguf.GGUFReader(path).tensors:
        if len(tensor.shape) > 1:
            yield tensor.name, tensor.tensor_type.name, _matrix(path, tensor)


def _matrix(path: Path, tensor: Any) -> KeptMatrix | None:
    kind = tensor.tensor_type.name
    if kind not in _READERS:
        return None
    columns = int(tensor.shape[0])  # GGUF has the innermost axis first
    raw = np.asarray(tensor.data, np.uint8)
    blocks = _READERS[kind](raw.reshape(-1, raw.shape[-1]), columns)
    if blocks.scheme == "q8" and blocks.minimum is None and (blocks.q == -128).any():
        return None  # kernels negate weights, and 128 does not fit; no quantizer writes -128
    values = dequantized(tensor).reshape(-1, columns)
    if not np.array_equal(blocks.dequantize(), values):
        raise ExportError(
            f"{path.name}: the blocks of {tensor.name} ({kind}) give other values than the gguf package; expected "
            "equal ones. Convert the model to another type."
        )
    return KeptMatrix(blocks, values)


class KeptRows:
    """The rows of a GGUF file or its shards, by content. `types` is {type: number of tensors with kept blocks}."""

    def __init__(self, *paths: Path) -> None:
        self.types: dict[str, int] = {}
        self._blocks: list[Blocks] = []
        self._rows: dict[bytes, tuple[int, int]] = {}
        self._floats: dict[str, list[str]] = {}  # type -> names of tensors whose blocks are not kept
        for name, kind, tensor in itertools.chain.from_iterable(map(read_matrices, paths)):
            if tensor is None:
                self._floats.setdefault(kind, []).append(name)
                continue
            self.types[kind] = self.types.get(kind, 0) + 1
            index = len(self._blocks)
            self._blocks.append(tensor.blocks)
            for row, values in enumerate(tensor.values):
                self._rows.setdefault(_digest(values), (index, row))

    def notes(self) -> list[str]:
        """Notes for the manifest about matrices whose blocks are not kept."""
        if not self._floats:
            return []
        listed = ", ".join(
            f"{len(names)} {kind} ({names[0]}{', ...' if len(names) > 1 else ''})"
            for kind, names in self._floats.items()
        )
        if not self.types:
            return [
                f"No matrix of the file has blocks that a bundle can keep: {listed}. They are quantized like those of "
                "a float model (--quantize, by default q4a)."
            ]
        return [f"Matrices whose values are exact but whose blocks are not kept (with keep they are float): {listed}."]

    def find(self, weight: F32) -> Blocks | None:
        """The blocks whose values equal `weight` [N, K]; None if a row is not in the file."""
        places = [self._rows.get(_digest(row)) for row in np.ascontiguousarray(weight)]
        found = [place for place in places if place is not None]
        if not found or len(found) < len(places):
            return None
        tensors, rows = np.array(found).T
        if (tensors == tensors[0]).all():
            blocks: Blocks | None = self._blocks[tensors[0]].rows(rows)
        else:
            blocks = _stack([self._blocks[t].rows(np.array([r])) for t, r in found])
        return blocks if blocks is not None and np.array_equal(blocks.dequantize(), weight) else None


def _digest(row: F32) -> bytes:
    return hashlib.blake2b(row.tobytes(), digest_size=16).digest()


def _stack(parts: list[Blocks]) -> Blocks | None:
    """One weight from rows of several tensors (a fused projection); None if their formats differ."""
    formats = {(part.scheme, part.block_size, part.minimum is None) for part in parts}
    if len(formats) > 1:
        return None
    minimum = [part.minimum for part in parts if part.minimum is not None]
    return Blocks(
        parts[0].scheme,
        parts[0].block_size,
        np.concatenate([part.q for part in parts]),
        np.concatenate([part.scale for part in parts]),
        np.concatenate(minimum) if minimum else None,
    )


# ------------------------------------------------------------------------------------------------ block formats of ggml
# Each reader takes the raw bytes [N, bytes of a row] and returns q int8 [N, K] and float32 [N, K / block] scales.


def _fields(raw: Raw, k: int, per_block: int, *sizes: int) -> list[Raw]:
    """The fields of each block, as [N, blocks, size] arrays."""
    blocks = raw.reshape(raw.shape[0], k // per_block, sum(sizes))
    return np.split(blocks, np.cumsum(sizes)[:-1], axis=-1)


def _half(field: Raw) -> F32:
    return np.ascontiguousarray(field).view(np.float16).astype(np.float32)[..., 0]


def _nibbles(packed: Raw) -> Raw:
    """The 4-bit integers [..., 2 n]: all low nibbles, then all high ones, as ggml orders a block."""
    return np.concatenate([packed & 15, packed >> 4], axis=-1)


def _fifth_bits(field: Raw) -> Raw:
    """The fifth bits [..., 32]: bit i of a little-endian 32-bit word belongs to weight i of the block."""
    return np.unpackbits(np.ascontiguousarray(field), axis=-1, bitorder="little")


def _blocks(scheme: str, size: int, q: Raw, shift: int, scale: F32, minimum: F32 | None = None) -> Blocks:
    n = q.shape[0]
    integers = (q.astype(np.int16) - shift).astype(np.int8).reshape(n, -1)
    return Blocks(scheme, size, integers, scale.reshape(n, -1), None if minimum is None else minimum.reshape(n, -1))


def _q4_0(raw: Raw, k: int) -> Blocks:
    scale, packed = _fields(raw, k, 32, 2, 16)
    return _blocks("q4", 32, _nibbles(packed), 8, _half(scale))


def _q4_1(raw: Raw, k: int) -> Blocks:
    scale, minimum, packed = _fields(raw, k, 32, 2, 2, 16)
    return _blocks("q4a", 32, _nibbles(packed), 0, _half(scale), _half(minimum))


def _q5_0(raw: Raw, k: int) -> Blocks:
    scale, high, packed = _fields(raw, k, 32, 2, 4, 16)
    return _blocks("q8", 32, _nibbles(packed) | _fifth_bits(high) << 4, 16, _half(scale))


def _q5_1(raw: Raw, k: int) -> Blocks:
    scale, minimum, high, packed = _fields(raw, k, 32, 2, 2, 4, 16)
    return _blocks("q8", 32, _nibbles(packed) | _fifth_bits(high) << 4, 0, _half(scale), _half(minimum))


def _q8_0(raw: Raw, k: int) -> Blocks:
    scale, q = _fields(raw, k, 32, 2, 32)
    return _blocks(
        "q8", 32, (np.ascontiguousarray(q).view(np.int8).astype(np.int16) + 128).astype(np.uint8), 128, _half(scale)
    )


def _q6_k(raw: Raw, k: int) -> Blocks:
    low, high, scales, scale = _fields(raw, k, 256, 128, 64, 16, 2)
    n, blocks = low.shape[:2]
    low_halves = low.reshape(n, blocks, 2, 1, 64) >> np.array([0, 4], np.uint8).reshape(2, 1) & 15
    high_pairs = high.reshape(n, blocks, 2, 1, 32) >> np.array([0, 2, 4, 6], np.uint8).reshape(4, 1) & 3
    q = low_halves.reshape(n, blocks, 256) | high_pairs.reshape(n, blocks, 256) << 4
    per_block = _half(scale)[..., None] * np.ascontiguousarray(scales).view(np.int8).astype(np.float32)
    return _blocks("q8", 16, q, 32, per_block)


def _q4_k(raw: Raw, k: int) -> Blocks:
    scale, minimum, packed_scales, packed = _fields(raw, k, 256, 2, 2, 12, 128)
    n, blocks = packed.shape[:2]
    scales, minima = _six_bit_pairs(packed_scales)
    q = packed.reshape(n, blocks, 4, 1, 32) >> np.array([0, 4], np.uint8).reshape(2, 1) & 15
    return _blocks(
        "q4a", 32, q.reshape(n, blocks, 256), 0, _half(scale)[..., None] * scales, -(_half(minimum)[..., None] * minima)
    )


def _q5_k(raw: Raw, k: int) -> Blocks:
    scale, minimum, packed_scales, high, packed = _fields(raw, k, 256, 2, 2, 12, 32, 128)
    n, blocks = packed.shape[:2]
    scales, minima = _six_bit_pairs(packed_scales)
    q = packed.reshape(n, blocks, 4, 1, 32) >> np.array([0, 4], np.uint8).reshape(2, 1) & 15
    fifth = high.reshape(n, blocks, 1, 32) >> np.arange(8, dtype=np.uint8).reshape(8, 1) & 1
    q = q.reshape(n, blocks, 256) | fifth.reshape(n, blocks, 256) << 4
    return _blocks("q8", 32, q, 0, _half(scale)[..., None] * scales, -(_half(minimum)[..., None] * minima))


def _six_bit_pairs(packed: Raw) -> tuple[F32, F32]:
    """Eight scales and eight minima of 6 bits in 12 bytes (ggml's get_scale_min_k4)."""
    first, second, third = packed[..., :4], packed[..., 4:8], packed[..., 8:]
    scales = np.concatenate([first & 63, third & 15 | first >> 6 << 4], axis=-1)
    minima = np.concatenate([second & 63, third >> 4 | second >> 6 << 4], axis=-1)
    return scales.astype(np.float32), minima.astype(np.float32)


_READERS: dict[str, Callable[[Raw, int], Blocks]] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}
