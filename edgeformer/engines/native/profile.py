"""Where the time of a program goes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from edgeformer.engines.native.ir.dims import evaluate, product
from edgeformer.engines.native.program.program import Op, PackedWeight, Program

# Bytes of 16 rows x 32 columns, as csrc/kernels/kernels.h packs them.
_TILE_BYTES = {"q4a": 320, "q4": 288, "q4x64": 272, "q8": 544, "q8x16": 576, "q8x128": 528, "f32": 2048}
_NAME = 60  # characters of an operation's name that are printed


@dataclass(slots=True)
class Profile:
    """Nanoseconds in each operation of `program`, summed over `runs` passes."""

    program: Program
    nanoseconds: list[int] = field(default_factory=list)
    runs: int = 0

    def weight_bytes(self, op: Op) -> int:
        """Packed bytes that one pass of the operation reads; an embedding reads single rows only."""
        if op.kind != "linear":
            return 0
        return sum(_packed_bytes(self.program.weights[w]) for w in op.weights)

    def products(self, op: Op, sizes: Mapping[str, int]) -> int:
        """Multiply-adds of one pass of a linear operation; `sizes` gives the pass's batch, sequence, kept, ..."""
        if op.kind != "linear":
            return 0
        shape = self.program.slots[next(slot for slot in op.inputs[:2] if slot >= 0)].shape
        rows = evaluate(product(shape[:-1]), sizes)
        return rows * sum(self.program.weights[w].n * self.program.weights[w].k for w in op.weights)

    def table(self, sizes: Mapping[str, int] | None = None, limit: float | None = None) -> str:
        """One line a kind of operation, the slowest first, and the whole.

        GB/s are of packed weights; with `limit`, the GB/s that memory gives, also as a share of it. With `sizes`, the
        numbers that a pass's symbols stand for, a linear's multiply-adds a second.
        """
        if not self.runs or not self.nanoseconds:
            return "nothing was run"
        groups: dict[str, list[int]] = {}  # name -> [operations, ns, bytes, multiply-adds]
        for op, ns in zip(self.program.ops, self.nanoseconds, strict=True):
            row = groups.setdefault(f"{op.kind} {op.note}".strip(), [0, 0, 0, 0])
            macs = self.products(op, sizes) if sizes else 0
            for i, value in enumerate((1, ns, self.weight_bytes(op), macs)):
                row[i] += value
        whole = [sum(column) for column in zip(*groups.values(), strict=True)]
        head = f"{'operation':<{_NAME}} {'count':>5} {'us/pass':>9} {'share':>6} {'GB/s':>6}"
        lines = [head + (f" {'limit':>6}" if limit else "") + (f" {'GMAC/s':>7}" if sizes else "")]
        rows = sorted(groups.items(), key=lambda item: -item[1][1])
        for name, (count, ns, size, macs) in [*rows, ("total", whole)]:
            shown = name if len(name) <= _NAME else name[: _NAME - 3] + "..."
            line = f"{shown:<{_NAME}} {count:>5} {ns / self.runs / 1e3:>9.1f} {ns / max(1, whole[1]):>6.1%}"
            speed = size * self.runs / ns if ns else 0.0
            line += f" {speed:>6.1f}" if size else f" {'':>6}"
            if limit:
                line += f" {speed / limit:>6.0%}" if size else f" {'':>6}"
            if sizes:
                line += f" {macs * self.runs / max(1, ns):>7.1f}" if macs else ""
            lines.append(line.rstrip())
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.table()


def _packed_bytes(w: PackedWeight) -> int:
    return -(-w.n // 16) * -(-w.k // 32) * _TILE_BYTES[w.type]
