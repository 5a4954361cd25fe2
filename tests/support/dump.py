"""A bundle's lowered program, its weights and some calls in one file, for `engine_runner.cpp` (C++ without Python)."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from edgeformer.engines.native.engine import NativeEngine
from edgeformer.engines.native.program.executable import load_executable
from edgeformer.engines.native.program.packing import weight_rows

LANES = 16  # rows of a panel


class Writer:
    """Writes int64, doubles, and byte strings after their length."""

    def __init__(self) -> None:
        self.bytes = bytearray()

    def integers(self, *values: int) -> None:
        self.bytes += struct.pack(f"<{len(values)}q", *map(int, values))

    def list(self, values: Iterable[int]) -> None:
        items = list(values)
        self.integers(len(items), *items)

    def blob(self, data: Any) -> None:
        raw = b"" if data is None else data.encode() if isinstance(data, str) else np.ascontiguousarray(data).tobytes()
        self.integers(len(raw))
        self.bytes += raw


def dump(bundle: Path, out: Path, kv: str, prompts: list[np.ndarray], steps: int) -> list[str]:
    """Write the file; the hashes of the logits of prompts one after another (last positions) and of `steps` greedy
    tokens, as the extension of this machine computes them with its best table."""
    engine = NativeEngine.from_bundle(bundle, threads=2, kv=kv)
    executable = load_executable(bundle / "model.onnx")
    plain = executable.program
    w = Writer()
    w.integers(kv == "float32")
    w.integers(len(plain["symbols"]))
    for name in plain["symbols"]:
        w.blob(name)
    w.integers(len(plain["sizes"]))
    for code in plain["sizes"]:
        w.list(code)
    w.integers(len(plain["slots"]))
    for slot in plain["slots"]:
        w.blob(slot["name"])
        w.blob(slot["dtype"])
        w.list(slot["shape"])
        w.integers(slot["view_of"], slot["constant"] is not None)
        w.blob(slot["constant"])
    w.integers(len(plain["weights"]))
    for weight in plain["weights"]:
        w.blob(weight["type"])
        w.integers(weight["n"], weight["k"])
    w.integers(len(plain["ops"]))
    for op in plain["ops"]:
        w.blob(op["kind"])
        for slots in (op["inputs"], op["outputs"], op["weights"]):
            w.list(slots)
        w.integers(len(op["ints"]))
        for name, values in op["ints"].items():
            w.blob(name)
            w.list(values)
        w.integers(len(op["floats"]))
        for name, values in op["floats"].items():
            w.blob(name)
            w.integers(len(values))
            w.bytes += struct.pack(f"<{len(values)}d", *values)
        w.integers(len(op["names"]))
        for name, values in op["names"].items():
            w.blob(name)
            w.integers(len(values))
            for value in values:
                w.blob(value)
        w.integers(len(op["sizes"]))
        for name, values in op["sizes"].items():
            w.blob(name)
            w.list(values)
    w.integers(len(plain["caches"]))
    for cache in plain["caches"]:
        w.list(cache[key] for key in ("kv_heads", "head_dim", "value_dim", "plain"))
    w.list(plain["inputs"])
    w.list(plain["outputs"])
    w.integers(*(plain[name] for name in ("row_local", "batch", "sequence", "kept", "past")))
    packed = [part for number in range(len(executable.weights)) for part in weight_rows(number, executable)]
    w.integers(len(packed))
    for part in packed:
        minimum = None if part.min is None else part.min - 8 * part.scale
        dest = part.first_row + np.arange(part.rows)
        if part.role != "all":  # panels of gate and up alternate
            dest = dest // LANES * 2 * LANES + dest % LANES + (LANES if part.role == "up" else 0)
        w.integers(part.weight)
        for array in (part.q, part.scale, minimum):
            w.blob(array)
        w.integers(part.rows, part.block)
        w.list(dest)
    w.integers(len(prompts) + steps)
    state, ids, hashes = engine.new_state(), np.empty((1, 0), np.int64), []
    for given in [*prompts, *[None] * steps]:
        ids = ids if given is None else given
        row = engine._inputs_of({"input_ids": ids, "logits_to_keep": 1}, state)
        batch, sequence = executable.rows
        values = {batch: 1, sequence: ids.shape[1], "kept": 1, executable.past: state.length, "logits_to_keep": 1}
        w.integers(ids.shape[1], 1)
        w.list(values[name] for name in plain["symbols"])
        w.integers(len(row))
        for array in row:
            w.blob(array)
        logits = engine.forward([({"input_ids": ids, "logits_to_keep": 1}, state)])[0]["logits"]
        hashes.append(fnv(logits.tobytes()))
        ids = logits[:, -1].argmax(-1)[None].astype(np.int64)
    out.write_bytes(w.bytes)
    return hashes


def fnv(data: bytes) -> str:
    """FNV-1a, 64 bits, as the runners print it."""
    value = 14695981039346656037
    for byte in data:
        value = (value ^ byte) * 1099511628211 % 2**64
    return f"{value:016x}"
