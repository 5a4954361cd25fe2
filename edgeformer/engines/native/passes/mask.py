"""Attention masks that depend on positions only (causal, sliding window) become attributes of the Attention."""

from __future__ import annotations

from dataclasses import dataclass

from edgeformer.engines.native.ir.dims import Size
from edgeformer.engines.native.ir.graph import Graph, Node


@dataclass(frozen=True, slots=True)
class IndexSum:
    """An integer tensor as a linear function of its indices: constant + sum of coefficient * index."""

    coefficients: dict[int, int]  # axis, counted from the end (1 is the last) -> coefficient
    constant: Size


@dataclass(frozen=True, slots=True)
class PositionMask:
    """The query at position p (counted from the first cached token) sees keys > p - window and, if causal, <= p."""

    window: Size | None = None
    causal: bool = False


def position_masks(g: Graph) -> None:
    """Attention(q, k, v, mask) where mask is `key <= query` and / or `query - key < window` -> Attention(q, k, v).

    Sets its attributes `is_causal`, `at_end` (bottom-right alignment) and `window` instead.
    """
    for node in g.nodes:
        if node.op != "Attention" or not node.input(3):
            continue
        found = _position_mask(g, node.input(3), _past(g, node))
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


def _position_mask(g: Graph, name: str, past: Size) -> PositionMask | None:
    n = g.producers.get(name)
    if n is None:
        return None
    if n.op in ("View", "Expand", "Cast"):
        return _position_mask(g, n.inputs[0], past) if _same_tail(g, n) else None
    if n.op == "Where":  # a float mask: 0 where seen, very negative elsewhere
        seen, hidden = g.scalar(n.inputs[1]), g.scalar(n.inputs[2])
        if seen != 0.0 or hidden is None or hidden > -1e30:
            return None
        return _position_mask(g, n.inputs[0], past)
    if n.op == "And":
        left, right = (_position_mask(g, i, past) for i in n.inputs)
        if left is None or right is None:
            return None
        if left.window is not None and right.window is not None and left.window != right.window:
            return None
        window = left.window if left.window is not None else right.window
        return PositionMask(window, left.causal or right.causal)
    if n.op not in ("Less", "LessOrEqual", "Greater", "GreaterOrEqual"):
        return None
    a, b = (_index_sum(g, i) for i in n.inputs)
    if a is None or b is None:
        return None
    if n.op.startswith("Greater"):
        a, b = b, a
    # a < b (or a <= b), in integers, as: coefficients of (b - a) . index + slack > 0
    difference = _combine(b, a, -1)
    slack = difference.constant + (1 if n.op.endswith("OrEqual") else 0)
    axes = {k: c for k, c in difference.coefficients.items() if c}
    if axes == {2: 1, 1: -1} and slack - past == 1:  # query + past + 1 - key > 0
        return PositionMask(causal=True)
    if axes == {2: -1, 1: 1}:  # key - query + slack > 0, position of the query = query + past
        return PositionMask(window=slack + past)
    return None


def _same_tail(g: Graph, n: Node) -> bool:
    """The last two axes (query, key) are the same before and after; an axis of size 1 may be spread."""
    before, after = g.shape(n.inputs[0])[-2:], g.shape(n.outputs[0])[-2:]
    return len(before) == 2 and (before == after or n.op == "Cast")


def _index_sum(g: Graph, name: str) -> IndexSum | None:
    """The integer tensor `name` as a linear function of its indices; None if it is not known to be one."""
    info = g.info[name]
    if info.value is not None and len(info.value) == 1:
        return IndexSum({}, info.value[0])
    if name in g.constants:
        c = g.scalar(name)
        return IndexSum({}, int(c)) if c is not None and c == int(c) else None
    n = g.producers.get(name)
    if n is None:
        return None
    if n.op == "Range":
        return IndexSum({1: n.attrs["step"]}, n.attrs["start"]) if isinstance(n.attrs.get("step"), int) else None
    if n.op == "Sizes":
        return IndexSum({}, n.attrs["sizes"][0]) if len(n.attrs["sizes"]) == 1 else None
    if n.op in ("View", "Expand"):
        inner = _index_sum(g, n.inputs[0])
        return _reshaped(inner, g.shape(n.inputs[0]), g.shape(n.outputs[0])) if inner is not None else None
    if n.op == "Cast":
        return _index_sum(g, n.inputs[0])
    if n.op in ("Add", "Sub"):
        a, b = (_index_sum(g, i) for i in n.inputs)
        if a is None or b is None:
            return None
        return _combine(a, b, 1 if n.op == "Add" else -1)
    return None


def _combine(a: IndexSum, b: IndexSum, sign: int) -> IndexSum:
    """The function a + sign * b."""
    axes = {*a.coefficients, *b.coefficients}
    coefficients = {k: a.coefficients.get(k, 0) + sign * b.coefficients.get(k, 0) for k in axes}
    return IndexSum(coefficients, a.constant + b.constant if sign == 1 else a.constant - b.constant)


def _reshaped(inner: IndexSum, before: tuple[Size, ...], after: tuple[Size, ...]) -> IndexSum | None:
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
        out[match[0][0]] = inner.coefficients.get(axis, 0)
    return IndexSum(out, inner.constant)
