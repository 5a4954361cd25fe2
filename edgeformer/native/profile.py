"""Where the time of a program goes."""

from __future__ import annotations

from dataclasses import dataclass, field

from edgeformer.native.program import Op, PackedWeight, Program

# Bytes of 16 rows x 32 columns, as csrc/kernels/kernels.h packs them.
_TILE_BYTES = {"q4a": 320, "q4": 288, "q8": 544, "q8x16": 576, "f32": 2048}


@dataclass(slots=True)
class Profile:
    """Nanoseconds in each operation of `program`, summed over `runs` passes. `str()` is a table by kind."""

    program: Program
    nanoseconds: list[int] = field(default_factory=list)
    runs: int = 0

    def weight_bytes(self, op: Op) -> int:
        """Packed bytes that one pass of the operation reads; an embedding reads single rows only."""
        if op.kind != "linear":
            return 0
        return sum(_packed_bytes(self.program.weights[w]) for w in op.weights)

    def __str__(self) -> str:
        if not self.runs or not self.nanoseconds:
            return "nothing was run"
        groups: dict[str, list[int]] = {}  # name -> [operations, ns, bytes]
        for op, ns in zip(self.program.ops, self.nanoseconds, strict=True):
            row = groups.setdefault(f"{op.kind} {op.note}".strip(), [0, 0, 0])
            row[0], row[1], row[2] = row[0] + 1, row[1] + ns, row[2] + self.weight_bytes(op)
        total = max(1, sum(self.nanoseconds))
        lines = [f"{'operation':<64} {'count':>5} {'us/pass':>9} {'share':>6} {'GB/s':>6}"]
        for name, (count, ns, size) in sorted(groups.items(), key=lambda item: -item[1][1]):
            rate = f"{size * self.runs / ns:6.1f}" if size and ns else ""
            shown = name if len(name) <= 64 else name[:61] + "..."
            lines.append(f"{shown:<64} {count:>5} {ns / self.runs / 1e3:>9.1f} {ns / total:>6.1%} {rate:>6}")
        lines.append(f"{'total':<64} {len(self.program.ops):>5} {total / self.runs / 1e3:>9.1f}")
        return "\n".join(lines)


def _packed_bytes(w: PackedWeight) -> int:
    return -(-w.n // 16) * -(-w.k // 32) * _TILE_BYTES[w.type]
