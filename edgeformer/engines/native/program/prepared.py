"""What an engine is made of, as plain data: the lowered program, and where its weights lie in the bundle's files.

Lowering takes longer than all else of a load, and gives the same for the same graph. So its result is kept (`cache`):
under the graph's content, the manifest's (which names the weights by their SHA-256) and the code that lowered it; and
only while the weights file has the size and time that it had.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import edgeformer
from edgeformer import disk_cache
from edgeformer.bundle.manifest import MANIFEST
from edgeformer.engines.native.ir.graph import Array, Constant
from edgeformer.engines.native.ir.weight import Weight
from edgeformer.engines.native.program.program import PackedWeight, Program, spec

if TYPE_CHECKING:
    from edgeformer.engines.native.ir.graph import Graph

LARGEST_KEPT = 16 << 20  # bytes of constants that no file of the bundle holds; with more it is not kept
_ALIGNED = 64


@dataclass(slots=True)
class Prepared:
    """All that `NativeEngine` needs of a graph. `program` is what `program.spec` made for C++.

    inputs: (name, dtype, shape), a size that is not known before a call as text; outputs, defaults and dtypes as the
    graph has them. files: the weights files, mapped, by name. constants: what the parts of `weights` name.
    """

    program: dict[str, Any]
    weights: list[PackedWeight]
    constants: dict[str, Constant]
    files: dict[str, Array]
    inputs: list[tuple[str, str, tuple[int | str, ...]]]
    outputs: list[str]
    dtypes: dict[str, str]
    defaults: dict[str, int]
    keep: str  # the input that says how many logits to keep, "" without one
    rows: tuple[str, str]  # names of the axes [batch, sequence]
    past: str  # of the caches' length
    batch_local: bool
    entry: str = ""  # what it is kept under, as its packed weights are; "" where it is not
    file_states: dict[str, list[int]] = field(default_factory=dict)  # size and time of the weights files, by name


def prepare(path: Path, *, kept: bool = True) -> Prepared:
    """The graph file `path` lowered, or as the cache folder has it; without `kept` that folder is left alone.

    Raises:
        BundleError: the file cannot be read.
        EngineUnavailable: some nodes cannot be lowered; the message names all of them.
    """
    entry = _entry(path) if kept else ""
    data = disk_cache.read(f"{entry}.program") if entry else None
    found = _restored(data, path.parent) if data is not None else None
    if found is None:
        found = _lowered(path)
        found.file_states = {name: _file_state(path.parent / name) for name in found.files}
        data = _as_bytes(found) if entry else None
        if data is not None:
            disk_cache.write(f"{entry}.program", data)
        else:
            entry = ""
    found.entry = entry
    return found


def _lowered(path: Path) -> Prepared:
    from edgeformer.engines.native.program.lowering import lower_bundle  # with all passes: not needed for what was kept

    program, graph = lower_bundle(path)
    return _of(program, graph, spec(program))


def _of(program: Program, graph: Graph, plain: dict[str, Any]) -> Prepared:
    slots = program.slots
    sized = [n for n in program.inputs if graph.info[n].value is not None]
    parts = [part for weight in program.weights for part, _ in weight.parts]
    named = dict.fromkeys(name for part in parts for name in (part.q, part.scale, part.min) if name)
    return Prepared(
        program=plain,
        weights=program.weights,
        constants={name: graph.constants[name] for name in named},
        files=graph.files,
        inputs=[
            (name, slots[i].dtype, tuple(s if isinstance(s, int) else str(s) for s in slots[i].shape))
            for name, i in program.inputs.items()
        ],
        outputs=list(program.outputs),
        dtypes=dict(graph.io_dtypes),
        defaults=dict(graph.defaults),
        keep="logits_to_keep" if "logits_to_keep" in sized else "",
        rows=program.row_symbols,
        past=program.past_symbol,
        batch_local=program.batch_local,
    )


# ------------------------------------------------------------------------------------------------------- kept on disk


def _entry(path: Path) -> str:
    """What its entries are called; "" for a graph with its weights inside, which would take long to read twice."""
    try:
        if path.stat().st_size > LARGEST_KEPT:
            return ""
        graph, manifest = path.read_bytes(), path.with_name(MANIFEST)
        named = manifest.read_bytes() if manifest.is_file() else b""
    except OSError:
        return ""  # lowering says what is wrong
    return disk_cache.key(b"prepared", edgeformer.__version__.encode(), code_identity(), graph, named)


def code_identity() -> bytes:
    """Identifies what lowers graphs and packs weights: an editable installation changes without its version."""
    here = Path(__file__).parents[1]
    files = [*sorted(here.glob("**/*.py")), *sorted(Path(edgeformer.__file__).parent.glob("_native.*"))]
    return repr([(file.name, *_file_state(file)) for file in files]).encode()


def _file_state(path: Path) -> list[int]:
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns]


class _Blob:
    """Arrays behind one another, and their places."""

    def __init__(self, files: Mapping[str, Array]) -> None:
        self.parts: list[Array] = []
        self.size = 0
        self.files = {name: (mapped.ctypes.data, mapped.nbytes) for name, mapped in files.items()}

    def place(self, array: Array) -> dict[str, Any]:
        """Where the array's bytes lie: in one of the files, else here."""
        plain = np.ascontiguousarray(array)
        at: int = plain.ctypes.data
        found: dict[str, Any] = {"dtype": plain.dtype.str, "shape": plain.shape}
        for name, (start, length) in self.files.items():
            if start <= at and at + plain.nbytes <= start + length:
                return found | {"file": name, "at": at - start}
        place = self.size
        self.parts.append(plain)
        self.size += plain.nbytes + -plain.nbytes % _ALIGNED
        return found | {"at": place}

    def __iter__(self) -> Iterator[bytes]:
        for part in self.parts:
            yield part.tobytes() + bytes(-part.nbytes % _ALIGNED)


def _as_bytes(p: Prepared) -> bytes | None:
    blob = _Blob(p.files)
    header = {
        "files": p.file_states,
        "program": p.program
        | {"slots": [(*slot[:4], None if slot[4] is None else blob.place(slot[4])) for slot in p.program["slots"]]},
        "weights": [asdict(weight) for weight in p.weights],
        "constants": {name: (c.dtype, c.shape, blob.place(c.data)) for name, c in p.constants.items()},
    }
    header |= {name: getattr(p, name) for name in _PLAIN}
    if blob.size > LARGEST_KEPT:
        return None
    text = json.dumps(header, default=_number, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % _ALIGNED)
    return b"".join([len(text).to_bytes(8, "little"), text, *blob])


_PLAIN = ("inputs", "outputs", "dtypes", "defaults", "keep", "rows", "past", "batch_local")


def _number(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{type(value).__name__} in a program")


def _restored(data: bytes, folder: Path) -> Prepared | None:
    """None where the weights files are not those that it was made for."""
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    try:
        if any(_file_state(folder / name) != state for name, state in header["files"].items()):
            return None
        files = {name: np.memmap(folder / name, np.uint8, "r") for name in header["files"]}
    except (OSError, ValueError):
        return None
    blob = np.frombuffer(data, np.uint8, offset=end)

    def array(place: dict[str, Any]) -> Array:
        dtype, shape = np.dtype(place["dtype"]), place["shape"]
        source: Any = files[place["file"]] if "file" in place else blob
        found: Array = np.ndarray(shape, dtype, source, place["at"])
        return found

    program = header["program"]
    program["slots"] = [(*slot[:4], None if slot[4] is None else array(slot[4])) for slot in program["slots"]]
    plain = {name: header[name] for name in _PLAIN}
    plain["inputs"] = [(name, dtype, tuple(shape)) for name, dtype, shape in plain["inputs"]]
    return Prepared(
        program=program,
        weights=list(_weights(header["weights"])),
        constants={
            n: Constant(dtype, tuple(shape), array(at)) for n, (dtype, shape, at) in header["constants"].items()
        },
        files=dict(files),
        file_states=header["files"],
        **plain | {"rows": tuple(plain["rows"])},
    )


def _weights(plain: list[dict[str, Any]]) -> Iterator[PackedWeight]:
    for weight in plain:
        parts = [
            (Weight(**part | {"selected": part["selected"] and tuple(map(tuple, part["selected"]))}), role)
            for part, role in weight.pop("parts")
        ]
        yield PackedWeight(**weight, parts=parts)


__all__ = ["Prepared", "prepare"]
