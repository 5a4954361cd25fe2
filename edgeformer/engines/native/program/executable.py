"""What the C++ engine runs, as plain data: the lowered program, and where its weights are in the bundle's files.

Lowering is the slowest step of a load, and gives the same result for the same graph. So the disk cache has it. The key
is the content of the graph and of the manifest (which has the SHA-256 of the weights), and the code that lowers; an
entry is valid while the weights files have the size and time that it records.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import edgeformer
from edgeformer import disk_cache
from edgeformer.bundle.manifest import MANIFEST
from edgeformer.bundle.signature import Array
from edgeformer.engines.native.ir.graph import Constant
from edgeformer.engines.native.ir.weight import Weight
from edgeformer.engines.native.program.program import PackedWeight, Program, spec

if TYPE_CHECKING:
    from edgeformer.engines.native.ir.graph import Graph

LARGEST_CACHED = 16 << 20  # bytes of a graph file, and of constants that are in no file; more is not cached
_ALIGNED = 64


@dataclass(slots=True)
class Executable:
    """All that `NativeEngine` needs of a graph. `program` is the result of `program.spec`.

    inputs: (name, dtype, shape); a size that is known only in a call is text. outputs, defaults and dtypes: as the
    graph has them. files: the mapped weights files by name. constants: those that the parts of `weights` name.
    """

    program: dict[str, Any]
    weights: list[PackedWeight]
    constants: dict[str, Constant]
    files: dict[str, Array]
    inputs: list[tuple[str, str, tuple[int | str, ...]]]
    outputs: list[str]
    dtypes: dict[str, str]
    defaults: dict[str, int]
    rows: tuple[str, str]  # names of the axes [batch, sequence]
    past: str  # of the caches' length
    batch_local: bool
    cache_key: str = ""  # of its entry in the disk cache and that of its packed weights; "" without
    file_states: dict[str, list[int]] = field(default_factory=dict)  # size and time of the weights files, by name


def load_executable(path: Path, *, use_disk_cache: bool = True) -> Executable:
    """The lowered graph file `path`, from the disk cache if it has a valid entry.

    Raises:
        BundleError: the file cannot be read.
        EngineUnavailable: some nodes cannot be lowered; the message names all of them.
    """
    key = _cache_key(path) if use_disk_cache else ""
    data = disk_cache.read(f"{key}.program") if key else None
    found = _restored(data, path.parent) if data is not None else None
    if found is None:
        found = _lowered(path)
        found.file_states = {name: _file_state(path.parent / name) for name in found.files}
        data = _as_bytes(found) if key else None
        if data is not None:
            disk_cache.write(f"{key}.program", data)
        else:
            key = ""
    found.cache_key = key
    return found


def _lowered(path: Path) -> Executable:
    from edgeformer.engines.native.program.lowering import lower_bundle  # imports all passes: only here

    program, graph = lower_bundle(path)
    return _of(program, graph, spec(program))


def _of(program: Program, graph: Graph, plain: dict[str, Any]) -> Executable:
    slots = program.slots
    parts = [part for weight in program.weights for part, _ in weight.parts]
    named = dict.fromkeys(name for part in parts for name in (part.q, part.scale, part.min) if name)
    return Executable(
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
        rows=program.row_symbols,
        past=program.past_symbol,
        batch_local=program.batch_local,
    )


# --------------------------------------------------------------------------------------------------------- disk cache


def _cache_key(path: Path) -> str:
    """The key of its entries; "" for a file with the weights inside, which takes long to read twice."""
    try:
        if path.stat().st_size > LARGEST_CACHED:
            return ""
        graph, manifest = path.read_bytes(), path.with_name(MANIFEST)
        named = manifest.read_bytes() if manifest.is_file() else b""
    except OSError:
        return ""  # lowering reports what is wrong
    return disk_cache.key(b"executable", edgeformer.__version__.encode(), code_identity(), graph, named)


def code_identity() -> bytes:
    """Identifies the code that lowers and packs: an editable installation changes without its version."""
    here = Path(__file__).parents[1]
    files = [*sorted(here.glob("**/*.py")), *sorted(Path(edgeformer.__file__).parent.glob("_native.*"))]
    return repr([(file.name, *_file_state(file)) for file in files]).encode()


def _file_state(path: Path) -> list[int]:
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns]


class _Blob:
    """Arrays concatenated to one blob, and their places in it."""

    def __init__(self, files: Mapping[str, Array]) -> None:
        self.parts: list[Array] = []
        self.size = 0
        self.files = {name: (mapped.ctypes.data, mapped.nbytes) for name, mapped in files.items()}

    def place(self, array: Array) -> dict[str, Any]:
        """Where the array's bytes are: in one of the files, else in this blob."""
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


def _as_bytes(p: Executable) -> bytes | None:
    blob = _Blob(p.files)
    header = {
        "files": p.file_states,
        "program": p.program | {"slots": _slots(p.program, blob.place)},
        "weights": [asdict(weight) for weight in p.weights],
        "constants": {name: (c.dtype, c.shape, blob.place(c.data)) for name, c in p.constants.items()},
    }
    header |= {name: getattr(p, name) for name in _PLAIN}
    if blob.size > LARGEST_CACHED:
        return None
    text = json.dumps(header, default=_number, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % _ALIGNED)
    return b"".join([len(text).to_bytes(8, "little"), text, *blob])


def _slots(program: dict[str, Any], constant: Callable[[Any], Any]) -> list[dict[str, Any]]:
    """The program's slots, each constant replaced by `constant` of it."""
    return [
        slot if slot["constant"] is None else slot | {"constant": constant(slot["constant"])}
        for slot in program["slots"]
    ]


_PLAIN = ("inputs", "outputs", "dtypes", "defaults", "rows", "past", "batch_local")


def _number(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{type(value).__name__} in a program")


def _restored(data: bytes, folder: Path) -> Executable | None:
    """None if the weights files have changed since."""
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
    program["slots"] = _slots(program, array)
    plain = {name: header[name] for name in _PLAIN}
    plain["inputs"] = [(name, dtype, tuple(shape)) for name, dtype, shape in plain["inputs"]]
    return Executable(
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


__all__ = ["Executable", "load_executable"]
