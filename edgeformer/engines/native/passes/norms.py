"""Norms: ONNX's four operators and their decomposed forms, in terms of the one Norm that has a kernel.

Norm(x, weight, bias) is over the last axis. attrs: kind ("rms" or "layer"), eps. weight and bias name constants of the
axis' size, or are "".
"""

from __future__ import annotations

import numpy as np

from edgeformer.engines.native.ir.dims import Shape, floor_div, product
from edgeformer.engines.native.ir.graph import Graph, Info, Node


def norm_variants(g: Graph) -> None:
    """Norms that Norm does not cover -> View to one normalized axis, Norm, View, Mul by the scale, Add of the bias.

    These are GroupNormalization, InstanceNormalization, and RMSNormalization and LayerNormalization over several axes
    or with a computed scale. A norm whose mean or deviation is an output too stays as it is.
    """
    for node in list(g.nodes):
        if any(node.outputs[1:]):
            continue
        shape = g.shape(node.outputs[0]) if node.op in NORM_OPS else ()
        if node.op in ("RMSNormalization", "LayerNormalization") and not _has_kernel(g, node):
            axis = node.attrs.get("axis", -1) % len(shape)
            kind = "rms" if node.op == "RMSNormalization" else "layer"
            _replace(g, node, kind, (*shape[:axis], product(shape[axis:])))
        elif node.op == "InstanceNormalization":
            _replace(g, node, "layer", (*shape[:2], product(shape[2:])), channels=True)
        elif node.op == "GroupNormalization" and g.shape(node.inputs[1]) == (shape[1],):  # before opset 21: per group
            groups = node.attrs["num_groups"]
            _replace(g, node, "layer", (shape[0], groups, floor_div(product(shape[1:]), groups)), channels=True)
    g.finish()


NORM_OPS = ("RMSNormalization", "LayerNormalization", "GroupNormalization", "InstanceNormalization")


def _has_kernel(g: Graph, node: Node) -> bool:
    shape = g.shape(node.inputs[0])
    vectors = [i for i in node.inputs[1:] if i]
    last = node.attrs.get("axis", -1) % len(shape) == len(shape) - 1
    return last and all(i in g.constants and g.constants[i].size == shape[-1] for i in vectors)


def _replace(g: Graph, node: Node, kind: str, flat: Shape, channels: bool = False) -> None:
    shape = g.shape(node.outputs[0])
    x = g.emit("View", node.inputs[:1], Info("float32", flat), node.inputs[0])
    eps = node.attrs.get("epsilon", 1e-5)
    y = g.emit("Norm", [x, "", ""], Info("float32", flat), node.outputs[0], kind=kind, eps=eps)
    y = g.emit("View", [y], Info("float32", shape), node.outputs[0])
    for op, name in (("Mul", node.input(1)), ("Add", node.input(2))):
        if not name or _is_neutral(g, name, op):
            continue
        if channels:  # one number a channel, axis 1
            spread = (*g.shape(name), *(1 for _ in shape[2:]))
            name = g.emit("View", [name], Info("float32", spread), name)
        y = g.emit(op, [y, name], Info("float32", shape), node.outputs[0])
    node.op, node.inputs, node.attrs = "View", [y], {}


def _is_neutral(g: Graph, name: str, op: str) -> bool:
    """Whether `name` is a scale of ones or a bias of zeros, which the exporter writes where a module has none."""
    neutral = 1.0 if op == "Mul" else 0.0
    fill = g.producer(name, "Fill")
    c = g.constant(name)
    return (fill is not None and fill.attrs["value"] == neutral) or (c is not None and bool(np.all(c == neutral)))


def norms(g: Graph) -> None:
    """RMSNormalization, LayerNormalization, and decomposed x / sqrt(mean(x^2) + eps) -> Norm(x, weight, bias)."""
    for node in list(g.nodes):
        if node.op in ("RMSNormalization", "LayerNormalization"):
            _standard(g, node)
        elif node.op in ("Mul", "Div"):
            _decomposed(g, node)
    g.finish()
    for node in list(g.nodes):
        if node.op in ("Mul", "Add"):
            _weight_or_bias(g, node)
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
    _layer_norm_of_centred(g, node)


def _layer_norm_of_centred(g: Graph, node: Node) -> None:
    """Norm(x - mean(x)) of kind "rms" becomes Norm(x) of kind "layer"."""
    sub = g.producer(node.inputs[0], "Sub")
    if node.attrs["kind"] == "rms" and sub is not None and _mean_last(g, sub.inputs[1]) == sub.inputs[0]:
        node.inputs[0], node.attrs["kind"] = sub.inputs[0], "layer"
        g.users.setdefault(sub.inputs[0], []).append(node)


def _mean_last(g: Graph, name: str) -> str | None:
    """The value of whose last axis `name` is the mean, kept as an axis of size 1; None if it is no such mean."""
    n = g.producer(name, "Reduce")
    if n is None or n.attrs["fn"] != "mean" or n.attrs["axes"] != (len(g.shape(n.inputs[0])) - 1,):
        return None
    return n.inputs[0] if len(g.shape(name)) == len(g.shape(n.inputs[0])) else None


def _square(g: Graph, name: str) -> str | None:
    """The value whose square is `name`; None if it is no square."""
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


def _decomposed(g: Graph, node: Node) -> None:
    a, b = node.inputs
    pairs = [(a, _root(g, b))] if node.op == "Div" else [(a, _inverse_root(g, b)), (b, _inverse_root(g, a))]
    for x, found in pairs:
        if found is None or found[0] != x:
            continue
        node.op, node.inputs, node.attrs = "Norm", [x, "", ""], {"kind": "rms", "eps": found[1]}
        g.users.setdefault(x, []).append(node)
        _layer_norm_of_centred(g, node)
        return


def _weight_or_bias(g: Graph, node: Node) -> None:
    """Mul or Add of a constant vector after a Norm becomes its weight or bias, if it has none."""
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
