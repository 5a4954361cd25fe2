"""Forms of GGUF files for the sweep: versions, byte orders, truncation, shards, inconsistent files."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np

from bench.sources.row import Row


def _refused(setting: str, path: Path, *words: str) -> Row:
    from bench.sources.gguf import outcome_of

    what, seen = outcome_of(path)
    if what == "refused":
        named = all(word in seen for word in words)
        return Row(setting, "refused" if named else "ignored", seen[:200])
    return Row(setting, "ignored", f"made; {seen[0]:.0e} from the reference")


def _plain(work: Path, **more: object) -> Path:
    from support import gguf_files

    return Path(gguf_files.write(work / "form.gguf", gguf_files.keys() | more, gguf_files.tensors()))


def _patched(at: int, data: bytes, *words: str) -> Callable[[str, Path], Row]:
    def row(setting: str, work: Path) -> Row:
        path = _plain(work)
        raw = bytearray(path.read_bytes())
        raw[at : at + len(data)] = data
        path.write_bytes(raw)
        return _refused(setting, path, *words)

    return row


def _cut(share: float) -> Callable[[str, Path], Row]:
    def row(setting: str, work: Path) -> Row:
        path = _plain(work)
        raw = path.read_bytes()
        path.write_bytes(raw[: int(len(raw) * share)])
        return _refused(setting, path, "form.gguf", "bytes")

    return row


def _version_2(setting: str, work: Path) -> Row:
    from bench.sources.gguf import TOLERANCE, outcome_of

    path = _plain(work)
    raw = bytearray(path.read_bytes())
    raw[4:8] = struct.pack("<I", 2)
    path.write_bytes(raw)
    what, seen = outcome_of(path)
    fine = what == "made" and seen[0] < TOLERANCE
    return Row(setting, "honoured" if fine else "ignored", f"ours differ by {seen[0]:.0e}", "numpy")


def _big_endian(setting: str, work: Path) -> Row:
    import gguf
    from support import gguf_files

    path, writer = work / "form.gguf", None
    writer = gguf.GGUFWriter(path, "llama", endianess=gguf.GGUFEndian.BIG)
    for key, value in gguf_files.keys().items():
        gguf_files.add(writer, key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return _refused(setting, path, "big-endian")


def _shards(setting: str, work: Path) -> Row:
    from support import gguf_files

    from bench.sources.gguf import TOLERANCE, outcome_of

    worst = 0.0
    paths = gguf_files.split(work, gguf_files.keys(), gguf_files.tensors(), count=3)
    for path in paths:
        what, seen = outcome_of(path, *paths)
        if what == "refused":
            return Row(setting, "refused", seen[:200])
        worst = max(worst, seen[0])
    fine = "honoured" if worst < TOLERANCE else "ignored"
    return Row(setting, fine, f"any of 3 shards given, all are read; ours differ by {worst:.0e}", "numpy")


def _missing_shard(setting: str, work: Path) -> Row:
    from support import gguf_files

    paths = gguf_files.split(work, gguf_files.keys(), gguf_files.tensors(), count=3)
    paths[1].unlink()
    return _refused(setting, paths[0], "m-00002-of-00003.gguf")


def _renamed_shard(setting: str, work: Path) -> Row:
    from support import gguf_files

    paths = gguf_files.split(work, gguf_files.keys(), gguf_files.tensors())
    return _refused(setting, paths[0].rename(work / "model.gguf"), "split.count", "model.gguf")


def _swapped_shards(setting: str, work: Path) -> Row:
    from support import gguf_files

    first, second = gguf_files.split(work, gguf_files.keys(), gguf_files.tensors())
    first.rename(work / "x"), second.rename(first), (work / "x").rename(second)
    return _refused(setting, first, "split.no")


def _unknown_key(setting: str, work: Path) -> Row:
    return _refused(setting, _plain(work, **{"llama.attention.new_thing": 2.0}), "llama.attention.new_thing")


def _foreign_key(setting: str, work: Path) -> Row:
    from bench.sources.gguf import outcome_of

    what, seen = outcome_of(_plain(work, **{"somebody.thing": 2.0}))
    noted = what == "made" and any("somebody.thing" in note for note in seen[2].notes)
    return Row(setting, "irrelevant" if noted else "ignored", "named in the bundle's notes")


def _tensors(change: Callable[[dict[str, np.ndarray]], object], *words: str) -> Callable[[str, Path], Row]:
    def row(setting: str, work: Path) -> Row:
        from support import gguf_files

        values = gguf_files.tensors()
        change(values)
        return _refused(setting, gguf_files.write(work / "form.gguf", gguf_files.keys(), values), *words)

    return row


def _nan(values: dict[str, np.ndarray]) -> None:
    values["blk.1.ffn_up.weight"][3, 4] = np.nan


def _thin(values: dict[str, np.ndarray]) -> None:
    values["blk.1.ffn_up.weight"] = values["blk.1.ffn_up.weight"][:32]


FORMS: dict[str, Callable[[str, Path], Row]] = {
    "file: version 2": _version_2,
    "file: version 1": _patched(4, struct.pack("<I", 1), "version 1"),
    "file: version 4": _patched(4, struct.pack("<I", 4), "version 4"),
    "file: no magic": _patched(0, b"GGML", "GGML"),
    "file: big-endian": _big_endian,
    "file: 2**60 keys announced": _patched(16, struct.pack("<Q", 2**60), "metadata keys"),
    "file: 2**60 tensors announced": _patched(8, struct.pack("<Q", 2**60), "tensors"),
    "file: cut in the header": _cut(0.01),
    "file: cut in the tensors": _cut(0.9),
    "file: shards": _shards,
    "file: a shard is missing": _missing_shard,
    "file: a shard under another name": _renamed_shard,
    "file: shards with swapped names": _swapped_shards,
    "file: unknown key of the architecture": _unknown_key,
    "file: unknown key of somebody else": _foreign_key,
    "file: a tensor is missing": _tensors(lambda v: v.pop("blk.1.ffn_up.weight"), "model.layers.1.mlp.up_proj.weight"),
    "file: layers are missing": _tensors(
        lambda v: [v.pop(name) for name in list(v) if name.startswith("blk.1.")], "block_count"
    ),
    "file: a tensor of another shape": _tensors(_thin, "blk.1.ffn_up.weight"),
    "file: NaN in a weight": _tensors(_nan, "blk.1.ffn_up.weight", "NaN"),
}
