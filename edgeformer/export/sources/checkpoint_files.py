"""Finds the files of a checkpoint and reads their headers and tensors, without unpickling objects.

Supported are `.safetensors` and plain tensors written by `torch.save` (`.pt`, `.pth`, `.bin`, `.ckpt`), in one file or
in shards with an index (`*.index.json`), given as a file or as their folder.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from edgeformer.errors import ExportError

INDEX_SUFFIX = ".index.json"
# In the order in which transformers prefers them.
WEIGHT_FILES = (
    "model.safetensors",
    f"model.safetensors{INDEX_SUFFIX}",
    "pytorch_model.bin",
    f"pytorch_model.bin{INDEX_SUFFIX}",
)
_MAX_INDEX = 64 << 20  # bytes: 100 a tensor, so more tensors than any model has
_CONVERT = (
    "If you trust the file, save its tensors where it was made: torch.save(torch.load({name!r}, weights_only=False)"
    "['state_dict'], 'weights.pt') for a checkpoint, or torch.save(torch.load({name!r}, weights_only=False)"
    ".state_dict(), 'weights.pt') for a whole module"
)


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as the header of its file describes it."""

    shape: tuple[int, ...]
    dtype: torch.dtype | None  # None: a type that torch does not have
    file: Path


def find_files(path: Path) -> list[Path]:
    """The weight files of the checkpoint at `path`: a file, an index of shards, or a folder.

    Raises:
        ExportError: there is no such file or more than one candidate, or a shard that an index names is missing.
    """
    if path.is_dir():
        path = _in_folder(path)
    if not path.is_file():
        raise ExportError(f"there is no file {path}; expected a checkpoint file, its index or its folder.")
    if not path.name.endswith(INDEX_SUFFIX):
        return [path]
    shards = _shards(path)
    missing = sorted({file for file in shards.values() if not (path.parent / file).is_file()})
    if missing:
        raise ExportError(
            f"{path} names {len(set(shards.values()))} shards, of which {len(missing)} "
            f"{'are' if len(missing) > 1 else 'is'} missing: {', '.join(missing[:4])}. Copy or download the whole "
            "folder again."
        )
    return [path.parent / file for file in sorted(set(shards.values()))]


def read_headers(path: Path) -> dict[str, StoredTensor]:
    """All tensors of the checkpoint at `path` by name, without reading their values.

    Raises:
        ExportError: a file is missing, damaged, or has more than plain tensors; or an index and its shards differ.
    """
    files = find_files(path)
    found: dict[str, StoredTensor] = {}
    for file in files:
        for name, stored in _headers(file):
            if name in found:
                raise ExportError(
                    f"{name} is in {found[name].file.name} and in {file.name}; expected it once. Remove one."
                )
            found[name] = stored
    index = path if path.name.endswith(INDEX_SUFFIX) else None
    if index is None and path.is_dir():
        inside = _in_folder(path)
        index = inside if inside.name.endswith(INDEX_SUFFIX) else None
    if index is not None:
        shards = _shards(index)
        lost = [name for name, file in shards.items() if name not in found or found[name].file.name != file]
        lost += [name for name in found if name not in shards]
        if lost:
            raise ExportError(
                f"{index} and its shards differ in {len(lost)} tensors, such as {', '.join(lost[:4])}: the files "
                "belong to different checkpoints. Copy or download the whole folder again."
            )
    return found


def read_object(path: Path) -> Any:
    """The content of the checkpoint: {name: tensor} of safetensors and shards, else what `torch.save` wrote.

    Tensors of a torch file are memory-mapped.

    Raises:
        ExportError: as `read_headers`.
    """
    files = find_files(path)
    if len(files) == 1 and not is_safetensors(files[0]):
        return _torch_object(files[0])
    read_headers(path)
    state: dict[str, Any] = {}
    for file in files:
        state |= _safetensors(file) if is_safetensors(file) else _torch_object(file)
    return state


def is_safetensors(file: Path) -> bool:
    """Whether the name of `file` is that of a safetensors file."""
    return file.suffix == ".safetensors"


def _in_folder(folder: Path) -> Path:
    found = [folder / name for name in WEIGHT_FILES if (folder / name).is_file()]
    if found[:2] == [folder / name for name in WEIGHT_FILES[:2]]:
        raise ExportError(
            f"{folder} holds both {WEIGHT_FILES[0]} and {WEIGHT_FILES[1]}; expected one of them. Move the other one "
            "out of the folder."
        )
    if found:
        return found[0]
    if (folder / ".metadata").is_file():
        raise ExportError(
            f"{folder} is a distributed checkpoint; expected one file. Convert it: "
            f"torch.distributed.checkpoint.format_utils.dcp_to_torch_save({str(folder)!r}, 'weights.pt')."
        )
    named = [f for f in sorted(folder.iterdir()) if f.suffix in (".safetensors", ".bin", ".pt", ".pth", ".ckpt")]
    indices = [f for f in sorted(folder.iterdir()) if f.name.endswith(INDEX_SUFFIX)]
    if len(indices) == 1 or (len(named) == 1 and not indices):
        return (indices or named)[0]
    raise ExportError(
        f"{folder} has no {' or '.join(WEIGHT_FILES[:3:2])}"
        + (f", but {', '.join(f.name for f in named[:4])}: pass one of these files." if named else ".")
    )


def _shards(index: Path) -> dict[str, str]:
    """{tensor name: file name} of an index; rejects file names outside its folder."""
    try:
        if index.stat().st_size > _MAX_INDEX:
            raise ExportError(f"{index} has {index.stat().st_size:,} bytes; an index has at most {_MAX_INDEX:,}.")
        shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        if not isinstance(shards, dict) or not shards or not all(isinstance(f, str) for f in shards.values()):
            raise ValueError("weight_map is not an object of file names")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ExportError(f"{index} is not an index of a sharded checkpoint: {error!r}.") from error
    outside = next((file for file in shards.values() if Path(file).name != file or file in ("", "..")), None)
    if outside is not None:
        raise ExportError(f"{index} names the file {outside!r}; expected shards beside the index.")
    return shards


def _headers(file: Path) -> Iterator[tuple[str, StoredTensor]]:
    if not is_safetensors(file):
        for name, value in _torch_object(file).items():
            if isinstance(value, torch.Tensor):
                yield str(name), StoredTensor(tuple(value.shape), value.dtype, file)
        return
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118 (not a dict)
                part = opened.get_slice(name)
                yield name, StoredTensor(tuple(part.get_shape()), _DTYPES.get(part.get_dtype()), file)
    except (SafetensorError, OSError) as error:
        raise ExportError(_damaged(file, error)) from error


_DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip


def _safetensors(file: Path) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise ExportError(_damaged(file, error)) from error


def _damaged(file: Path, error: Exception) -> str:
    return (
        f"the weights {file} cannot be read as safetensors: {error}. The file is cut short or damaged: copy or "
        "download it again, or save it with safetensors.torch.save_file(module.state_dict(), ...)."
    )


def _torch_object(file: Path) -> Any:
    """The object given to `torch.save`, tensors memory-mapped; only tensors and plain values are unpickled."""
    _require_plain_zip(file)
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # pickle, zip and torch raise errors of many types
        first = " ".join(str(error).split())
        code = first.partition("Unsupported global: ")[2].partition(" was not")[0].partition(" is not")[0]
        reason = f"it holds code ({code.strip()})" if code else first[:200]
        hint = f"{_CONVERT.format(name=str(file))}, and pass weights.pt"
        raise ExportError(
            f"the weights {file} cannot be read as plain tensors: {reason}. edgeformer unpickles no code. {hint}; or "
            "save them with safetensors.torch.save_file(module.state_dict(), ...)."
        ) from error


def _require_plain_zip(file: Path) -> None:
    """Rejects files that are not an uncompressed zip of tensors: a compressed record could grow a thousandfold."""
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        raise ExportError(
            f"the weights {file} cannot be read: the file is cut short, or not in the format that "
            f"torch.save writes since PyTorch 1.6 ({error}). Copy it again; or, if it is an old file that you trust, "
            f"torch.save(torch.load({str(file)!r}, weights_only=True), 'weights.pt'); or save them with "
            "safetensors.torch.save_file(module.state_dict(), ...)."
        ) from error
    if any(entry.filename.endswith("/constants.pkl") for entry in entries):
        raise ExportError(
            f"the weights {file} are a TorchScript archive, which is code. If you trust it, save its tensors: "
            f"torch.save(torch.jit.load({str(file)!r}).state_dict(), 'weights.pt'), and pass weights.pt."
        )
    if packed := [entry.filename for entry in entries if entry.compress_type != zipfile.ZIP_STORED]:
        raise ExportError(
            f"the weights {file} have a compressed record ({packed[0]}); torch.save writes none. Save it again."
        )
