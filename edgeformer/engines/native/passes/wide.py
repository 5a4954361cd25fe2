"""Weights with one scale for 64 columns (4 bits) or 128 (8 bits), where activations can have such blocks too.

A block then ends after 16 or 32 dot products instead of 8: conversions, scales and sums cost a half or a quarter. In 4
bits the weights are smaller as well, 4.25 bits instead of 4.5.
"""

from __future__ import annotations

from dataclasses import replace

from edgeformer.engines.native.ir.graph import Graph, Node
from edgeformer.engines.native.ir.weight import Weight

WIDE = {"q4": ("q4x64", 64), "q8": ("q8x128", 128)}  # csrc/kernels/kernels.h: WeightType, span_of
SPANS = dict(WIDE.values())


def wide_blocks(g: Graph) -> None:
    """Weights of Linears and Embed: q4 -> q4x64, q8 -> q8x128, where every quantized Linear of an input can be so.

    All Linears of an input must agree, for it is quantized once.
    """
    readers: dict[str, list[Weight]] = {}
    for node in g.nodes:
        if node.op == "Linears":
            readers.setdefault(node.inputs[0], []).extend(w for w in weights_of(node) if w.type != "f32")
    narrow: set[str] = set()  # names of stored weights
    while (
        stay := {
            weight.q
            for weights in readers.values()
            if not _alike([None if weight.q in narrow else _span(weight) for weight in weights])
            for weight in weights
        }
        - narrow
    ):
        narrow |= stay
    chosen = {weight.q for weights in readers.values() for weight in weights} - narrow

    def widened(weight: Weight) -> Weight:
        return replace(weight, type=WIDE[weight.type][0]) if weight.q in chosen else weight

    for node in g.nodes:
        if node.op == "Linears":
            node.attrs["parts"] = tuple(
                replace(part, weight=widened(part.weight), gate=widened(part.gate) if part.gate else None)
                for part in node.attrs["parts"]
            )
        elif node.op == "Embed":  # the table that a head shares is packed once
            node.attrs["weight"] = widened(node.attrs["weight"])


def weights_of(node: Node) -> list[Weight]:
    """The weights of a Linears node, gates too."""
    return [weight for part in node.attrs["parts"] for weight in (part.weight, part.gate) if weight is not None]


def _alike(spans: list[int | None]) -> bool:
    return None not in spans and len(set(spans)) == 1


def _span(weight: Weight) -> int | None:
    """Columns of its wide blocks; None where it has none."""
    span = WIDE[weight.type][1] if weight.type in WIDE else 0
    return span if span and weight.block % span == 0 and weight.k % span == 0 else None
