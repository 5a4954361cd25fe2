"""Linears whose weights have a scale for 128 columns take activations with a scale for 128 columns too.

A block then ends after 32 dot products instead of 8: conversions, scales and sums cost a quarter.
"""

from __future__ import annotations

from dataclasses import replace

from edgeformer.native.graph import Graph, Node
from edgeformer.native.program import Weight

WIDE = 128  # csrc/kernels/kernels.h: kWide


def wide_blocks(g: Graph) -> None:
    """Weights become "q8x128" where every quantized Linear of their input can: an input is quantized in one way."""
    readers: dict[str, list[Weight]] = {}
    for node in g.nodes:
        if node.op == "Linears":
            readers.setdefault(node.inputs[0], []).extend(w for w in weights_of(node) if w.type != "f32")
    narrow: set[str] = set()  # names of stored weights
    while (
        stay := {
            weight.q
            for weights in readers.values()
            if not all(_fits(weight) and weight.q not in narrow for weight in weights)
            for weight in weights
        }
        - narrow
    ):
        narrow |= stay
    chosen = {weight.q for weights in readers.values() for weight in weights} - narrow

    def widened(weight: Weight | None) -> Weight | None:
        return replace(weight, type="q8x128") if weight is not None and weight.q in chosen else weight

    for node in g.nodes:
        if node.op == "Linears":
            for part in node.attrs["parts"]:
                part["weight"], part["gate"] = widened(part["weight"]), widened(part["gate"])
        elif node.op == "Embed":  # the table that a head shares is packed once
            node.attrs["weight"] = widened(node.attrs["weight"])


def weights_of(node: Node) -> list[Weight]:
    """The weights of a Linears node, gates too."""
    return [weight for part in node.attrs["parts"] for weight in (part["weight"], part["gate"]) if weight is not None]


def _fits(weight: Weight) -> bool:
    return weight.type == "q8" and weight.block % WIDE == 0 and weight.k % WIDE == 0
