"""What an export needs of memory and disk, said and compared with what there is before it begins.

And a source cannot ask for more than it holds: a config that claims a million layers beside a small file is refused
before any of them is made.
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

# Bytes of memory a parameter costs at the worst moment, as tests/export/test_export_memory.py measures: int8 blocks
# with a scale for 32 (1.125), all linears in float32 inside of onnxruntime (4), the largest matrix in passing (1.5).
MEMORY_EACH = 1.125 + 4 + 1.5
MEMORY_FIXED = 700 << 20  # torch, transformers and onnxruntime with their threads, and the graph of a small model
SCRATCH_EACH = 12  # in the temporary folder: PyTorch's weights, the float graph's, what the blocks stand for
BUNDLE_EACH = 4  # a float32 bundle; quantized ones are smaller

# A model may have more parameters than its file has numbers: tied tensors that are untied, tables that are computed.
_MORE = 4
_SPARE = 1 << 22  # elements, 16 MiB: tables of a tiny model
_SPARE_TENSORS = 1 << 12
_COUNTS = re.compile(
    r"(^|_)(n|num)_.*(layers?|blocks?|labels|experts|heads?|groups|stages|buckets)$|_layers?$|^n_layers?$|^num_layers$"
    r"|^depth$|block_count$|expert_count$|head_count$|^(vocab|hidden|intermediate|embedding|ffn)_size$|_dim$"
)
_SMALL = 1 << 16  # a count up to this is no danger: a list of so many entries takes a megabyte
_POSITIONS = re.compile(r"position|context|max_|_length$|window")  # they size no weights that a file would not hold


@dataclass(frozen=True)
class Need:
    """Bytes that an export of so many parameters needs."""

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
    """What an export of a model with so many parameters needs at most."""
    return Need(
        parameters,
        int(MEMORY_EACH * parameters) + MEMORY_FIXED,
        SCRATCH_EACH * parameters,
        BUNDLE_EACH * parameters,
    )


def require_room(parameters: int, output: Path, limit: int | None, progress: Progress) -> Need:
    """Says what the export needs; `limit` bytes of memory stand for the machine's.

    Raises:
        ExportError: that is more than there is.
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
        (scratch, need.scratch + (need.bundle if together else 0), "name a folder with more room by TMPDIR"),
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
    """Refuses a config that counts more layers, labels or rows than a file with these tensors can fill.

    It is looked at before a library reads it, for some make lists as long as the config says.

    Raises:
        ExportError: a count is far beyond the file; the message names the first few.
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
            f"{source} claims more than its weights can hold: {', '.join(bad[:4])}, but it has {len(sizes):,} tensors "
            f"of at most {max((max(s, default=0) for s in sizes), default=0):,} rows. The config belongs to another "
            "model, or is broken."
        )


@contextlib.contextmanager
def construction(elements: int, tensors: int, source: str) -> Iterator[None]:
    """While it is entered, a model that is made on the meta device may not outgrow a source of so many elements.

    Only this thread's tensors are counted.

    Raises:
        ExportError: it does.
    """
    most, many, thread = _MORE * elements + _SPARE, _MORE * tensors + _SPARE_TENSORS, threading.get_ident()
    made = [0, 0]

    def count(module: torch.nn.Module, name: str, value: torch.Tensor | None) -> None:
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
    """The nearest folder of `path` that is there."""
    path = path.resolve()
    return next(parent for parent in (path, *path.parents) if parent.is_dir())
