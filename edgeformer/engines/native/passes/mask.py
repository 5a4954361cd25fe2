"""Attention masks that are only a rule of positions (causal, sliding window) become attributes of the Attention."""

from __future__ import annotations

from dataclasses import dataclass

from edgeformer.engines.native.ir.dims import Size
from edgeformer.engines.native.ir.graph import Graph, Node

Linear = tuple[dict[int, int], Size]  # index along axis -i -> coefficient, and the rest


@dataclass
class Rule:
    """Keys seen by the query at position p (counted from the first cached token): p - window < key <= p + ahead."""

    window: Size | None = None
    causal: bool = False


def position_masks(g: Graph) -> None:
    """Drop a mask that says `key <= query` and / or `query - key < window`; set `is_causal` and `window` instead."""
    for node in g.nodes:
        if node.op != "Attention" or not node.input(3):
            continue
        found = _rule(g, node.input(3), _past(g, node))
        if found is None:
            continue
        if found.window is not None and not isinstance(found.window, int):
            continue
        if found.window is not None and not (found.causal or node.attrs.get("is_causal")):
            continue  # a window on one side only, without causality, has no attribute
        node.inputs[3] = ""
        if found.causal:
            node.attrs.update(is_causal=1, at_end=1)
        node.attrs["window"] = found.window or 0
    g.finish()


def _past(g: Graph, node: Node) -> Size:
    q, k = (g.shape(i)[-2] for i in node.inputs[:2])
    return g.shape(node.input(4))[2] if node.input(4) else k - q


def _rule(g: Graph, name: str, past: Size) -> Rule | None:
    n = g.producers.get(name)
    if n is None:
        return None
    if n.op in ("View", "Expand", "Cast"):
        return _rule(g, n.inputs[0], past) if _same_tail(g, n) else None
    if n.op == "Where":  # a float mask: 0 where seen, very negative elsewhere
        seen, hidden = g.scalar(n.inputs[1]), g.scalar(n.inputs[2])
        return _rule(g, n.inputs[0], past) if seen == 0.0 and hidden is not None and hidden <= -1e30 else None
    if n.op == "And":
        left, right = (_rule(g, i, past) for i in n.inputs)
        if left is None or right is None:
            return None
        if left.window is not None and right.window is not None and left.window != right.window:
            return None
        return Rule(left.window if left.window is not None else right.window, left.causal or right.causal)
    if n.op not in ("Less", "LessOrEqual", "Greater", "GreaterOrEqual"):
        return None
    a, b = (_linear(g, i) for i in n.inputs)
    if a is None or b is None:
        return None
    if n.op.startswith("Greater"):
        a, b = b, a
    # a < b (or a <= b) as: coefficients of (b - a) . index + slack > 0, integers
    axes = {k: b[0].get(k, 0) - a[0].get(k, 0) for k in {*a[0], *b[0]}}
    slack = b[1] - a[1] + (1 if n.op.endswith("OrEqual") else 0)
    axes = {k: c for k, c in axes.items() if c}
    if axes == {2: 1, 1: -1} and slack - past == 1:  # q + past + 1 - k > 0
        return Rule(causal=True)
    if axes == {2: -1, 1: 1}:  # k - q + slack > 0, query position = q + past
        return Rule(window=slack + past)
    return None


def _same_tail(g: Graph, n: Node) -> bool:
    """The last two axes (query, key) are the same before and after; an axis of size 1 may be spread."""
    before, after = g.shape(n.inputs[0])[-2:], g.shape(n.outputs[0])[-2:]
    return len(before) == 2 and (before == after or n.op == "Cast")


def _linear(g: Graph, name: str) -> Linear | None:
    """An integer tensor as a linear function of its indices; axis 1 is the last, 2 the one before."""
    info = g.info[name]
    if info.value is not None and len(info.value) == 1:
        return {}, info.value[0]
    if name in g.constants:
        c = g.scalar(name)
        return ({}, int(c)) if c is not None and c == int(c) else None
    n = g.producers.get(name)
    if n is None:
        return None
    if n.op == "Range":
        return ({1: n.attrs["step"]}, n.attrs["start"]) if isinstance(n.attrs.get("step"), int) else None
    if n.op == "Sizes":
        return ({}, n.attrs["sizes"][0]) if len(n.attrs["sizes"]) == 1 else None
    if n.op in ("View", "Expand"):
        inner = _linear(g, n.inputs[0])
        return _moved(inner, g.shape(n.inputs[0]), g.shape(n.outputs[0])) if inner is not None else None
    if n.op == "Cast":
        return _linear(g, n.inputs[0])
    if n.op in ("Add", "Sub"):
        a, b = (_linear(g, i) for i in n.inputs)
        if a is None or b is None:
            return None
        sign = 1 if n.op == "Add" else -1
        coefficients = {k: a[0].get(k, 0) + sign * b[0].get(k, 0) for k in {*a[0], *b[0]}}
        return coefficients, a[1] + b[1] if sign == 1 else a[1] - b[1]
    return None


def _moved(inner: Linear, before: tuple[Size, ...], after: tuple[Size, ...]) -> Linear | None:
    """The same function after axes of size 1 were added, dropped or spread."""
    live = [(len(before) - i, d) for i, d in enumerate(before) if d != 1]
    places = [(len(after) - i, d) for i, d in enumerate(after)]
    out: dict[int, int] = {}
    for axis, size in live:
        match = [p for p in places if p[1] == size]
        if len(match) != 1:
            match = [p for p in places if p == (axis, size)]
        if not match:
            return None
        out[match[0][0]] = inner[0].get(axis, 0)
    return out, inner[1]
