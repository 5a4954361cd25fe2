"""Memory and disk that an export needs, compared with what the machine has before the export begins.

Also rejects a config that describes a far larger model than its weights, before any layer is made: a damaged or hostile
config must not exhaust memory.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import tempfile
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)

from edgeformer import machine
from edgeformer.errors import ExportError
from edgeformer.export.progress import Progress
from edgeformer.export.sizes import shown

# Bytes of memory per parameter at the peak, measured by tests/export/test_export_memory.py: int8 blocks of 32 with a
# scale (1.125), all linear layers in float32 inside onnxruntime (4), copies of the largest matrix (1.5).
MEMORY_EACH = 1.125 + 4 + 1.5
MEMORY_FIXED = 700 << 20  # torch, transformers and onnxruntime with their threads, and the graph of a small model
SCRATCH_EACH = 12  # in the temporary folder: the weights of PyTorch, of the float graph, and the dequantized ones
BUNDLE_EACH = 4  # a float32 bundle; quantized ones are smaller

# A model may have more elements than its file: tied tensors that are untied, tables that are computed.
_MORE = 4
_SPARE = 1 << 22  # elements (16 MiB of float32): tables of a tiny model
_SPARE_TENSORS = 1 << 12
_COUNTS = re.compile(
    r"(^|_)(n|num)_.*(layers?|blocks?|labels|experts|heads?|groups|stages|buckets)$|_layers?$|^n_layers?$|^num_layers$"
    r"|^depth$|block_count$|expert_count$|head_count$|^(vocab|hidden|intermediate|embedding|ffn)_size$|_dim$"
)
_SMALL = 1 << 16  # smaller counts are harmless: a list of that length takes a megabyte
_POSITIONS = re.compile(r"position|context|max_|_length$|window")  # these size no layers


@dataclass(frozen=True)
class Need:
    """Bytes that an export of `parameters` needs at most."""

    parameters: int
    memory: int
    scratch: int
    bundle: int

    def __str__(self) -> str:
        return (
            f"{self.parameters:,} parameters: {shown(self.memory)} of memory, {shown(self.scratch)} in "
            f"{tempfile.gettempdir()}, up to {shown(self.bundle)} for the bundle"
        )


def need_of(parameters: int) -> Need:
    """The memory and disk that an export of a model with this many parameters needs at most."""
    return Need(
        parameters,
        int(MEMORY_EACH * parameters) + MEMORY_FIXED,
        SCRATCH_EACH * parameters,
        BUNDLE_EACH * parameters,
    )


def require_room(parameters: int, output: Path, limit: int | None, progress: Progress) -> Need:
    """Reports what the export needs and checks it; `limit` (bytes) replaces the machine's memory.

    Raises:
        ExportError: the export needs more memory or disk than there is.
    """
    need = need_of(parameters)
    progress.stage(f"needs for {need}")
    memory = machine.total_memory() if limit is None else limit
    if memory is not None and need.memory > memory:
        whose = "this machine has" if limit is None else "--memory-limit allows"
        raise ExportError(
            f"exporting {parameters:,} parameters needs about {shown(need.memory)} of memory; {whose} {shown(memory)}. "
            "Export it on a larger machine; the bundle itself needs less."
        )
    scratch, place = Path(tempfile.gettempdir()), _existing(Path(output))
    together = scratch.stat().st_dev == place.stat().st_dev
    for folder, wanted, what in (
        (scratch, need.scratch + (need.bundle if together else 0), "set TMPDIR to a folder with more space"),
        (place, 0 if together else need.bundle, "choose another --output"),
    ):
        free = shutil.disk_usage(folder).free
        if wanted > free:
            raise ExportError(
                f"exporting {parameters:,} parameters needs about {shown(wanted)} of disk at {folder}, which has "
                f"{shown(free)} free; {what}."
            )
    return need


def require_plausible(config: Mapping[str, Any], shapes: Iterable[tuple[int, ...]], source: str) -> None:
    """Rejects a config with far more layers, labels or rows than a file with tensors of these `shapes` can have.

    Runs before a library reads the config: some allocate lists of these lengths.

    Raises:
        ExportError: a count is far too large; the message names the first few.
    """
    sizes = list(shapes)
    most = max([_SMALL, len(sizes), *(max(shape, default=0) for shape in sizes)])
    bad = [
        f"{name} is {value:,}"
        for name, value in _integers(config, "")
        if value > _MORE * most and _COUNTS.search(name.rpartition(".")[2]) and not _POSITIONS.search(name)
    ]
    if bad:
        raise ExportError(
            f"{source} describes a larger model than its weights: {', '.join(bad[:4])}, but it has {len(sizes):,} "
            f"tensors of at most {max((max(s, default=0) for s in sizes), default=0):,} rows. The config belongs to "
            "another model or is damaged."
        )


@contextlib.contextmanager
def construction(elements: int, tensors: int, source: str) -> Iterator[None]:
    """A context in which a model made on the meta device may be at most a few times as large as its source.

    `elements` and `tensors` are those of the source. Only this thread's tensors are counted.

    Raises:
        ExportError: the model is larger.
    """
    most, many, thread = _MORE * elements + _SPARE, _MORE * tensors + _SPARE_TENSORS, threading.get_ident()
    made = [0, 0]

    def count(_: torch.nn.Module, __: str, value: torch.Tensor | None) -> None:
        if value is None or value.device.type != "meta" or threading.get_ident() != thread:
            return
        made[0] += value.numel()
        made[1] += 1
        if made[0] > most or made[1] > many:
            raise ExportError(
                f"{source} describes a model of more than {made[0]:,} numbers in {made[1]:,} tensors, but its weights "
                f"are {elements:,} numbers in {tensors:,} tensors: the config belongs to another model, or is broken."
            )

    hooks = [register_module_parameter_registration_hook(count), register_module_buffer_registration_hook(count)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _integers(value: Any, place: str, depth: int = 0) -> Iterator[tuple[str, int]]:
    if isinstance(value, bool) or depth > 8:
        return
    if isinstance(value, (int, float)):
        if value == value and abs(value) != float("inf"):
            yield place, int(value)
    elif isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _integers(inner, f"{place}.{name}" if place else str(name), depth + 1)
    elif isinstance(value, list):
        for inner in value:
            yield from _integers(inner, place, depth + 1)


def _existing(path: Path) -> Path:
    """The nearest existing parent of `path`, or `path` itself."""
    path = path.resolve()
    return next(parent for parent in (path, *path.parents) if parent.is_dir())
