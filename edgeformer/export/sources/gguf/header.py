"""Reads the header of a GGUF file and checks every count and offset against the size of the file.

The `gguf` package trusts the file: a count of 2**60 makes it allocate that much. A file that passes this reader is safe
for the package and for transformers. Format: the GGUF specification of ggml.
"""

from __future__ import annotations

import itertools
import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf

from edgeformer.errors import ExportError

MAGIC = b"GGUF"
VERSIONS = (2, 3)  # version 1 has 32-bit counts; the gguf package does not read it
MAX_DIMS = 4  # ggml's GGML_MAX_DIMS
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_PREVIEW = 60


@dataclass(frozen=True)
class TensorInfo:
    """The place of one tensor in the file. `shape` is in PyTorch's order: the innermost axis last."""

    name: str
    type: gguf.GGMLQuantizationType
    shape: tuple[int, ...]
    start: int  # bytes from the beginning of the file
    size: int  # bytes

    @property
    def elements(self) -> int:
        """The number of values."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Header:
    """The checked header of a GGUF file."""

    path: Path
    version: int
    metadata: dict[str, Any]  # scalars, strings, and lists of them
    tensors: tuple[TensorInfo, ...]
    alignment: int
    pairs: slice  # the bytes of the metadata, between the counts and the table of tensors


def read_header(path: Path) -> Header:
    """The checked header of `path`.

    Raises:
        ExportError: it is not a GGUF file, is big-endian, has an unsupported version or type, or is cut short.
    """
    size = path.stat().st_size
    if size < 24:
        raise ExportError(f"{path.name} has {size} bytes; a GGUF header has at least 24. Copy or download it again.")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        try:
            return _Reader(path, data).header()
        except struct.error as error:
            raise ExportError(f"{path.name} ends within its header ({size:,} bytes): {error}.") from error


class _Reader:
    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.size, self.at = path, data, len(data), 0

    def header(self) -> Header:
        magic, version, tensors, pairs = self.data[:4], *struct.unpack_from("<IQQ", self.data, 4)
        if magic != MAGIC:
            raise ExportError(f"{self.path.name} begins with {magic!r}, expected {MAGIC!r}: it is not a GGUF file.")
        if version & 0xFFFF == 0 and version:
            raise ExportError(
                f"{self.path.name} is big-endian (its version reads {version:#x}); expected a little-endian "
                "file. Convert it with gguf-convert-endian."
            )
        if version not in VERSIONS:
            raise ExportError(f"{self.path.name} is GGUF version {version}; expected 2 or 3. Convert the model again.")
        self.at = 24
        # The smallest key-value pair and tensor entry: a name's length, a type, a value.
        for what, count, least in (("metadata keys", pairs, 13), ("tensors", tensors, 32)):
            if count > (self.size - self.at) // least:
                raise self._cut(f"it declares {count:,} {what}")
        metadata: dict[str, Any] = {}
        for _ in range(pairs):
            key = self._string("a metadata key")
            if key in metadata:
                raise ExportError(f"{self.path.name} has the metadata key {key} twice.")
            metadata[key] = self._value(self._unpack("I"), key)
        end, alignment = self.at, metadata.get("general.alignment", gguf.GGUF_DEFAULT_ALIGNMENT)
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            raise ExportError(f"{self.path.name}: general.alignment is {alignment!r}; expected a power of two.")
        table = [self._tensor() for _ in range(tensors)]
        start = -(-self.at // alignment) * alignment
        infos = tuple(self._placed(name, kind, shape, start, offset, alignment) for name, kind, shape, offset in table)
        self._check_places(infos)
        return Header(self.path, version, metadata, infos, alignment, slice(24, end))

    def _cut(self, why: str) -> ExportError:
        return ExportError(
            f"{self.path.name} has {self.size:,} bytes, but {why}: the file is cut short or damaged. Copy or "
            "download it again."
        )

    def _unpack(self, code: str) -> Any:
        (value,) = struct.unpack_from("<" + code, self.data, self.at)
        self.at += struct.calcsize("<" + code)
        return value

    def _bytes(self, count: int, what: str) -> bytes:
        if count > self.size - self.at:
            raise self._cut(f"{what} needs {count:,} from byte {self.at:,} on")
        self.at += count
        return self.data[self.at - count : self.at]

    def _string(self, what: str) -> str:
        raw = self._bytes(self._unpack("Q"), what)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            shown = repr(raw[:_PREVIEW])
            raise ExportError(f"{self.path.name}: {what} is not UTF-8: {shown}. Convert the model again.") from error

    def _value(self, kind: int, key: str) -> Any:
        if kind in _SCALARS:
            return self._unpack(_SCALARS[kind])
        if kind == _STRING:
            return self._string(key)
        if kind != _ARRAY:
            raise ExportError(f"{self.path.name}: {key} has the unknown value type {kind}. Convert the model again.")
        kind, count = self._unpack("I"), self._unpack("Q")
        if kind in _SCALARS:
            code = f"<{count}{_SCALARS[kind]}"
            width = struct.calcsize("<" + _SCALARS[kind])
            return list(struct.unpack(code, self._bytes(count * width, key)))
        if kind != _STRING:
            raise ExportError(f"{self.path.name}: {key} is an array of value type {kind}; expected numbers or strings.")
        if count > (self.size - self.at) // 8:
            raise self._cut(f"{key} declares {count:,} strings")
        return [self._string(key) for _ in range(count)]

    def _tensor(self) -> tuple[str, int, tuple[int, ...], int]:
        name = self._string("a tensor's name")
        dims = self._unpack("I")
        if not 0 < dims <= MAX_DIMS:
            raise ExportError(f"{self.path.name}: tensor {name} has {dims} axes; expected 1 to {MAX_DIMS}.")
        shape = tuple(self._unpack("Q") for _ in range(dims))
        return name, self._unpack("I"), shape[::-1], self._unpack("Q")

    def _placed(
        self, name: str, number: int, shape: tuple[int, ...], start: int, offset: int, alignment: int
    ) -> TensorInfo:
        try:
            kind = gguf.GGMLQuantizationType(number)
        except ValueError as error:
            raise ExportError(
                f"{self.path.name}: tensor {name} has the type {number}, which the installed gguf package does not "
                "know. Use a newer gguf, or convert the model to a known type."
            ) from error
        block, width = gguf.GGML_QUANT_SIZES[kind]
        if 0 in shape or shape[-1] % block:
            raise ExportError(
                f"{self.path.name}: tensor {name} has the shape {list(shape)}; expected rows of a multiple of {block} "
                f"values for {kind.name}, and no empty axis."
            )
        size = math.prod(shape) // block * width
        if offset % alignment:
            raise ExportError(f"{self.path.name}: tensor {name} is at {offset}; expected a multiple of {alignment}.")
        if start + offset + size > self.size:
            raise self._cut(f"tensor {name} needs {size:,} from byte {start + offset:,} on")
        return TensorInfo(name, kind, shape, start + offset, size)

    def _check_places(self, tensors: tuple[TensorInfo, ...]) -> None:
        names = [tensor.name for tensor in tensors]
        if twice := sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []:
            raise ExportError(f"{self.path.name} has the tensor {twice[0]} twice.")
        ordered = sorted(tensors, key=lambda tensor: tensor.start)
        for before, after in itertools.pairwise(ordered):
            if before.start + before.size > after.start:
                raise ExportError(f"{self.path.name}: the tensors {before.name} and {after.name} overlap.")
