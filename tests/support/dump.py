"""A bundle's lowered program, its weights and some calls in one file, for `engine_runner.cpp` (C++ without Python)."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from edgeformer.engines.native.engine import NativeEngine
from edgeformer.engines.native.program.packing import pieces
from edgeformer.engines.native.program.prepared import prepare

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
    prepared = prepare(bundle / "model.onnx")
    plain = prepared.program
    w = Writer()
    w.integers(kv == "float32")
    w.integers(len(plain["symbols"]))
    for name in plain["symbols"]:
        w.blob(name)
    w.integers(len(plain["sizes"]))
    for code in plain["sizes"]:
        w.list(code)
    w.integers(len(plain["slots"]))
    for name, dtype, shape, view_of, constant in plain["slots"]:
        w.blob(name)
        w.integers(dtype)
        w.list(shape)
        w.integers(view_of, constant is not None)
        w.blob(constant)
    w.integers(len(plain["weights"]))
    for weight in plain["weights"]:
        w.list(weight)
    w.integers(len(plain["ops"]))
    for kind, inputs, outputs, weights, ints, floats, sizes in plain["ops"]:
        w.blob(kind)
        for slots in (inputs, outputs, weights):
            w.list(slots)
        w.integers(len(ints))
        for name, values in ints.items():
            w.blob(name)
            w.list(values)
        w.integers(len(floats))
        for name, values in floats.items():
            w.blob(name)
            w.integers(len(values))
            w.bytes += struct.pack(f"<{len(values)}d", *values)
        w.integers(len(sizes))
        for name, values in sizes.items():
            w.blob(name)
            w.list(values)
    w.integers(len(plain["caches"]))
    for cache in plain["caches"]:
        w.list(cache)
    w.list(plain["inputs"])
    w.list(plain["outputs"])
    w.integers(*(plain[name] for name in ("row_local", "batch", "sequence", "kept", "past")))
    packed = [piece for number in range(len(prepared.weights)) for piece in pieces(number, prepared)]
    w.integers(len(packed))
    for number, _, q, scale, minimum, rows, block, first, half, _ in packed:
        if minimum is not None:
            minimum = minimum - 8 * scale
        dest = first + np.arange(rows)
        if half:  # panels of gate and up in turn
            dest = dest // LANES * 2 * LANES + dest % LANES + (LANES if half == 2 else 0)
        w.integers(number)
        for array in (q, scale, minimum):
            w.blob(array)
        w.integers(rows, block)
        w.list(dest)
    w.integers(len(prompts) + steps)
    state, ids, hashes = engine.new_state(), np.empty((1, 0), np.int64), []
    for given in [*prompts, *[None] * steps]:
        ids = ids if given is None else given
        row, keep = engine._arrays({"input_ids": ids, "logits_to_keep": 1}, state)
        batch, sequence = prepared.rows
        values = {batch: 1, sequence: ids.shape[1], "kept": 1, prepared.past: state.length, "logits_to_keep": 1}
        w.integers(ids.shape[1], keep)
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
