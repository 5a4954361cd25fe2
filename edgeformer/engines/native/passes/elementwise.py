"""Norms and activations that a graph spells out in small steps."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from edgeformer.engines.native.ir.graph import Array, Graph, Info, Node

DEPTH = 10  # elementwise steps that one activation may be spelled in
POINTS = np.concatenate([np.linspace(-6, 6, 61), [-20.0, 20.0, 1e-3, -1e-3]])

Function = Callable[[Array], Array]
_erf = np.vectorize(math.erf)


def _sigmoid(x: Array) -> Array:
    return np.asarray(1 / (1 + np.exp(-x)))


ACTIVATIONS: dict[str, Function] = {
    "silu": lambda x: x * _sigmoid(x),
    "gelu": lambda x: 0.5 * x * (1 + _erf(x / math.sqrt(2))),
    "gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "quick_gelu": lambda x: x * _sigmoid(1.702 * x),
    "relu2": lambda x: np.maximum(x, 0) ** 2,
}
UNARY: dict[str, Function] = {
    "sigmoid": _sigmoid, "tanh": np.tanh, "erf": lambda x: np.asarray(_erf(x)), "exp": np.exp, "sqrt": np.sqrt,
    "relu": lambda x: np.maximum(x, 0), "neg": np.negative, "reciprocal": np.reciprocal, "abs": np.abs,
}  # fmt: skip
BINARY: dict[str, Callable[[Any, Any], Any]] = {
    "Add": np.add, "Sub": np.subtract, "Mul": np.multiply, "Div": np.divide, "Pow": np.power,
}  # fmt: skip


def activations(g: Graph) -> None:
    """Any spelling of silu, gelu, ... becomes one Unary: a subgraph of one input is compared with them by numbers."""
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
            if n is not None and (n.op in BINARY or n.op == "Unary"):
                deeper += n.inputs
        frontier = deeper
    return found


def _recognize(g: Graph, root: Node, x: str) -> str | None:
    """The activation that `root` computes of `x`."""
    cache: dict[str, Any] = {x: POINTS}

    def value(name: str, depth: int) -> Any:
        if name in cache:
            return cache[name]
        scalar = g.scalar(name)
        if scalar is not None:
            return scalar
        n = g.producers.get(name)
        if n is None or depth == 0 or not (n.op in BINARY or (n.op == "Unary" and n.attrs["fn"] in UNARY)):
            return None
        args = [value(i, depth - 1) for i in n.inputs]
        if any(a is None for a in args):
            return None
        cache[name] = BINARY[n.op](*args) if n.op in BINARY else UNARY[n.attrs["fn"]](args[0])
        return cache[name]

    with np.errstate(all="ignore"):
        y = value(root.outputs[0], DEPTH)
        if y is None or np.shape(y) != POINTS.shape:
            return None
        for name, f in ACTIVATIONS.items():
            # 1e-6 of the value: constants such as sqrt(2 / pi) are float32 in the graph.
            if np.allclose(y, f(POINTS), rtol=1e-6, atol=1e-7):
                return name
    return None


def norms(g: Graph) -> None:
    """RMSNormalization, LayerNormalization and their spelled-out forms become Norm(x, weight, bias) of the last axis.

    attrs: kind "rms" or "layer", eps. weight and bias are constants of the axis' size, or "".
    """
    for node in list(g.nodes):
        if node.op in ("RMSNormalization", "LayerNormalization"):
            _standard(g, node)
        elif node.op in ("Mul", "Div"):
            _spelled(g, node)
    g.finish()
    for node in list(g.nodes):
        if node.op in ("Mul", "Add"):
            _affine(g, node)
    g.finish()


def _standard(g: Graph, node: Node) -> None:
    shape = g.shape(node.inputs[0])
    if node.attrs.get("axis", -1) % len(shape) != len(shape) - 1 or any(node.outputs[1:]):
        return
    vectors = [i for i in node.inputs[1:] if i]
    if not all(i in g.constants and g.constants[i].size == shape[-1] for i in vectors):
        return
    kind = "rms" if node.op == "RMSNormalization" else "layer"
    eps = node.attrs.get("epsilon", 1e-5)
    node.op, node.inputs, node.attrs = (
        "Norm",
        [node.inputs[0], node.input(1), node.input(2)],
        {"kind": kind, "eps": eps},
    )
    del node.outputs[1:]
    _centred(g, node)


def _centred(g: Graph, node: Node) -> None:
    """The rms norm of x - mean(x) is the layer norm of x."""
    sub = g.producer(node.inputs[0], "Sub")
    if node.attrs["kind"] == "rms" and sub is not None and _mean_last(g, sub.inputs[1]) == sub.inputs[0]:
        node.inputs[0], node.attrs["kind"] = sub.inputs[0], "layer"
        g.users.setdefault(sub.inputs[0], []).append(node)


def _mean_last(g: Graph, name: str) -> str | None:
    """X when `name` is the mean of x over its last axis, kept as an axis of size 1."""
    n = g.producer(name, "Reduce")
    if n is None or n.attrs["fn"] != "mean" or n.attrs["axes"] != (len(g.shape(n.inputs[0])) - 1,):
        return None
    return n.inputs[0] if len(g.shape(name)) == len(g.shape(n.inputs[0])) else None


def _square(g: Graph, name: str) -> str | None:
    """X when `name` is x * x."""
    n = g.producers.get(name)
    if n is not None and n.op == "Mul" and n.inputs[0] == n.inputs[1]:
        return n.inputs[0]
    return n.inputs[0] if n is not None and n.op == "Pow" and g.scalar(n.inputs[1]) == 2.0 else None


def _root(g: Graph, name: str) -> tuple[str, float] | None:
    """(x, eps) when `name` is sqrt(mean(x^2) + eps)."""
    root = g.producer(name, "Unary")
    if root is not None and root.attrs["fn"] == "sqrt":
        inner = root.inputs[0]
    else:
        root = g.producer(name, "Pow")
        if root is None or g.scalar(root.inputs[1]) != 0.5:
            return None
        inner = root.inputs[0]
    add = g.producer(inner, "Add")
    for mean, eps in (add.inputs, add.inputs[::-1]) if add is not None else ():
        squares, e = _mean_last(g, mean), g.scalar(eps)
        x = _square(g, squares) if squares is not None else None
        if x is not None and e is not None:
            return x, e
    return None


def _inverse_root(g: Graph, name: str) -> tuple[str, float] | None:
    """(x, eps) when `name` is 1 / sqrt(mean(x^2) + eps)."""
    n = g.producers.get(name)
    if n is not None and n.op == "Unary" and n.attrs["fn"] == "reciprocal":
        return _root(g, n.inputs[0])
    if n is not None and n.op == "Div" and g.scalar(n.inputs[0]) == 1.0:
        return _root(g, n.inputs[1])
    if n is not None and n.op == "Pow" and g.scalar(n.inputs[1]) == -0.5:
        add = g.producer(n.inputs[0], "Add")
        for mean, eps in (add.inputs, add.inputs[::-1]) if add is not None else ():
            squares, e = _mean_last(g, mean), g.scalar(eps)
            x = _square(g, squares) if squares is not None else None
            if x is not None and e is not None:
                return x, e
    return None


def _spelled(g: Graph, node: Node) -> None:
    a, b = node.inputs
    pairs = [(a, _root(g, b))] if node.op == "Div" else [(a, _inverse_root(g, b)), (b, _inverse_root(g, a))]
    for x, found in pairs:
        if found is None or found[0] != x:
            continue
        node.op, node.inputs, node.attrs = "Norm", [x, "", ""], {"kind": "rms", "eps": found[1]}
        g.users.setdefault(x, []).append(node)
        _centred(g, node)
        return


def _affine(g: Graph, node: Node) -> None:
    """A constant vector after a bare Norm is its weight (Mul) or bias (Add)."""
    for x, c in (node.inputs, node.inputs[::-1]):
        norm, vector = g.producer(x, "Norm"), g.constants.get(c)
        if norm is None or vector is None or vector.shape[-1:] != (vector.size,) or g.shape(x)[-1] != vector.size:
            continue
        slot = 1 if node.op == "Mul" else 2
        if g.only_user(x) is not node or norm.inputs[slot] or (slot == 1 and norm.inputs[2]):
            continue
        if slot == 2 and norm.attrs["kind"] == "rms":
            continue
        norm.inputs[slot] = c
        g.rewire(node.outputs[0], x)
        return


def scalar_vectors(g: Graph) -> None:
    """Norm weights as flat float32 vectors."""
    for node in g.nodes:
        if node.op != "Norm":
            continue
        for i in (1, 2):
            name = node.inputs[i]
            c = g.constants.get(name)
            if c is not None and (len(c.shape) != 1 or c.dtype != "float32"):
                node.inputs[i] = g.add_constant(name, c.data.reshape(-1).astype(np.float32))
                g.info[node.inputs[i]] = Info("float32", (c.size,))
    g.finish()
