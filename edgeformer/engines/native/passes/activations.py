"""Decomposed activations, recognized by their values at test points."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from edgeformer.bundle.signature import Array
from edgeformer.engines.native.ir.graph import Graph, Node

DEPTH = 10  # most elementwise steps of one activation
POINTS = np.concatenate([np.linspace(-6, 6, 61), [-20.0, 20.0, 1e-3, -1e-3]])

Function = Callable[[Array], Array]
_erf = np.vectorize(math.erf)


def _sigmoid(x: Array) -> Array:
    return np.asarray(1 / (1 + np.exp(-x)))


RECOGNIZED: dict[str, Function] = {
    "silu": lambda x: x * _sigmoid(x),
    "gelu": lambda x: 0.5 * x * (1 + _erf(x / math.sqrt(2))),
    "gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "quick_gelu": lambda x: x * _sigmoid(1.702 * x),
    "relu2": lambda x: np.maximum(x, 0) ** 2,
}
# What their steps may be: functions of Unary nodes, and operators of two inputs.
STEPS_OF_ONE: dict[str, Function] = {
    "sigmoid": _sigmoid, "tanh": np.tanh, "erf": lambda x: np.asarray(_erf(x)), "exp": np.exp, "sqrt": np.sqrt,
    "relu": lambda x: np.maximum(x, 0), "neg": np.negative, "reciprocal": np.reciprocal, "abs": np.abs,
}  # fmt: skip
STEPS_OF_TWO: dict[str, Callable[[Any, Any], Any]] = {
    "Add": np.add, "Sub": np.subtract, "Mul": np.multiply, "Div": np.divide, "Pow": np.power,
}  # fmt: skip


def decomposed_activations(g: Graph) -> None:
    """Mul(x, Sigmoid(x)) and other decomposed forms of silu, gelu, ... -> Unary.

    A subgraph of one input is an activation if it gives the same numbers at POINTS.
    """
    for node in list(g.nodes):
        if node.op not in ("Mul", "Pow") or node.outputs[0] not in g.producers:
            continue
        for x in _candidates(g, node):
            name = _recognize(g, node, x)
            if name:
                node.op, node.inputs, node.attrs = "Unary", [x], {"fn": name}
                break
    g.finish()


def _candidates(g: Graph, root: Node) -> list[str]:
    """Values that `root` may be a function of, nearest first: those of its own shape, up to DEPTH steps away."""
    found: list[str] = []
    frontier = list(root.inputs)
    for _ in range(DEPTH):
        deeper: list[str] = []
        for name in frontier:
            if name in g.constants or name in found or g.shape(name) != g.shape(root.outputs[0]):
                continue
            found.append(name)
            n = g.producers.get(name)
            if n is not None and (n.op in STEPS_OF_TWO or n.op == "Unary"):
                deeper += n.inputs
        frontier = deeper
    return found


def _recognize(g: Graph, root: Node, x: str) -> str | None:
    """The activation that `root` computes of `x`; None if none of RECOGNIZED."""
    cache: dict[str, Any] = {x: POINTS}

    def value(name: str, depth: int) -> Any:
        if name in cache:
            return cache[name]
        scalar = g.scalar(name)
        if scalar is not None:
            return scalar
        n = g.producers.get(name)
        if n is None or depth == 0 or not (n.op in STEPS_OF_TWO or (n.op == "Unary" and n.attrs["fn"] in STEPS_OF_ONE)):
            return None
        args = [value(i, depth - 1) for i in n.inputs]
        if any(a is None for a in args):
            return None
        cache[name] = STEPS_OF_TWO[n.op](*args) if n.op in STEPS_OF_TWO else STEPS_OF_ONE[n.attrs["fn"]](args[0])
        return cache[name]

    with np.errstate(all="ignore"):
        y = value(root.outputs[0], DEPTH)
        if y is None or np.shape(y) != POINTS.shape:
            return None
        for name, f in RECOGNIZED.items():
            # 1e-6 of the value: constants such as sqrt(2 / pi) are float32 in the graph.
            if np.allclose(y, f(POINTS), rtol=1e-6, atol=1e-7):
                return name
    return None
