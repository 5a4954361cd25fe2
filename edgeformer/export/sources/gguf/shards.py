"""GGUF models in one file or in shards of llama.cpp's `gguf-split`, read as one model."""

from __future__ import annotations

import contextlib
import mmap
import os
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeformer.errors import ExportError
from edgeformer.export.sources.gguf.header import MAGIC, Header, TensorInfo, read_header
from edgeformer.files import temporary_folder

_NAME = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.IGNORECASE)
NUMBER, COUNT, TENSORS = "split.no", "split.count", "split.tensors.count"


@dataclass(frozen=True)
class GgufFile:
    """A model in one file or in shards. The metadata are the first shard's: the others have only `split.*`."""

    shards: tuple[Header, ...]

    @property
    def name(self) -> str:
        """The name of the first file."""
        return self.shards[0].path.name

    @property
    def metadata(self) -> dict[str, Any]:
        """The metadata of the first shard."""
        return self.shards[0].metadata

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        """{name: tensor} of all shards, in order."""
        return {tensor.name: tensor for shard in self.shards for tensor in shard.tensors}

    @property
    def architecture(self) -> str:
        """`general.architecture`, the prefix of the model's keys.

        Raises:
            ExportError: the file does not have it.
        """
        found = self.metadata.get("general.architecture")
        if not isinstance(found, str) or not found:
            raise ExportError(
                f"{self.name} has no general.architecture, so it has no settings of a model. Pass the model's first "
                "shard, or convert the model again."
            )
        return found

    @contextlib.contextmanager
    def whole(self) -> Iterator[Path]:
        """A single file with all tensors: the file itself, or the shards joined in a temporary folder."""
        if len(self.shards) == 1:
            yield self.shards[0].path
            return
        # Beside the shards: that disk more often has space for a copy than the system's temporary folder.
        folder = self.shards[0].path.parent
        with temporary_folder(folder if os.access(folder, os.W_OK) else None, ".joined-") as joined:
            path = joined / _stem(self.shards[0].path)
            join(self.shards, path)
            yield path


def open_gguf(path: Path) -> GgufFile:
    """The model whose only file or any shard is `path`, checked.

    Raises:
        ExportError: a file is damaged, or a shard is missing or belongs to another model.
    """
    header = read_header(path)
    count = header.metadata.get(COUNT, 0)
    named = _NAME.fullmatch(path.name)
    if type(count) is not int or count < 0 or count > 99999:
        raise ExportError(f"{path.name}: {COUNT} is {count!r}; expected the number of shards.")
    if count < 2:
        if named is not None and int(named["count"]) > 1:
            raise ExportError(
                f"{path.name} is named as one of {int(named['count'])} shards but has no {COUNT}: it was split by "
                "another tool than gguf-split. Join the parts (cat, for files split by bytes) and pass the whole file."
            )
        return _checked(GgufFile((header,)))
    if named is None or int(named["count"]) != count:
        raise ExportError(
            f"{path.name} has {COUNT} = {count}, but its name is not NAME-00001-of-{count:05d}.gguf, needed "
            "to find the other shards. Restore the names, or join the shards with gguf-split --merge."
        )
    paths = [path.with_name(f"{named['stem']}-{number:05d}-of-{count:05d}.gguf") for number in range(1, count + 1)]
    missing = [other.name for other in paths if not other.is_file()]
    if missing:
        raise ExportError(
            f"{path.name} is one of {count} shards; missing beside it: {', '.join(missing[:8])}"
            f"{' ...' if len(missing) > 8 else ''}. Copy or download all shards to {path.parent}."
        )
    return _checked(GgufFile(tuple(read_header(other) for other in paths)))


def _checked(model: GgufFile) -> GgufFile:
    first = model.shards[0].metadata
    for place, shard in enumerate(model.shards) if len(model.shards) > 1 else ():
        for key, expected in ((NUMBER, place), (COUNT, len(model.shards)), (TENSORS, first.get(TENSORS))):
            if shard.metadata.get(key) != expected:
                raise ExportError(
                    f"{shard.path.name} has {key} = {shard.metadata.get(key)!r}, expected {expected!r}: it is not "
                    f"a shard of {model.name}. Copy or download all shards of one model again."
                )
        for key, value in shard.metadata.items():
            if not key.startswith("split.") and first.get(key) != value:
                raise ExportError(f"{shard.path.name} and {model.name} have different {key}; expected one model.")
    names = [tensor.name for shard in model.shards for tensor in shard.tensors]
    if len(set(names)) < len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ExportError(f"the shards of {model.name} have {twice[0]} twice.")
    total = first.get(TENSORS)
    if total is not None and total != len(names):
        raise ExportError(
            f"{model.name} has {TENSORS} = {total!r}, but {len(model.shards)} files have {len(names)} tensors. Copy or "
            "download all shards again."
        )
    return model


def join(shards: tuple[Header, ...], path: Path) -> None:
    """Writes one file with the metadata of the first shard and the tensors of all.

    It keeps `split.*`, which readers of the joined file ignore.
    """
    first = shards[0]
    tensors = [(shard, tensor) for shard in shards for tensor in shard.tensors]

    def padded(size: int) -> int:
        return -(-size // first.alignment) * first.alignment

    with first.path.open("rb") as file:
        file.seek(first.pairs.start)
        pairs = file.read(first.pairs.stop - first.pairs.start)
    offset, table = 0, []
    for _, tensor in tensors:
        name = tensor.name.encode()
        table.append(struct.pack(f"<Q{len(name)}sI", len(name), name, len(tensor.shape)))
        table.append(struct.pack(f"<{len(tensor.shape)}QIQ", *tensor.shape[::-1], int(tensor.type), offset))
        offset += padded(tensor.size)
    start = MAGIC + struct.pack("<IQQ", first.version, len(tensors), len(first.metadata)) + pairs + b"".join(table)
    with path.open("wb") as out, contextlib.ExitStack() as stack:
        maps = {}
        for shard in shards:
            file = stack.enter_context(shard.path.open("rb"))
            maps[shard.path] = stack.enter_context(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        out.write(start.ljust(padded(len(start)), b"\0"))
        for shard, tensor in tensors:
            out.write(memoryview(maps[shard.path])[tensor.start : tensor.start + tensor.size])
            out.write(bytes(padded(tensor.size) - tensor.size))


def _stem(path: Path) -> str:
    named = _NAME.fullmatch(path.name)
    return f"{named['stem']}.gguf" if named is not None else path.name
