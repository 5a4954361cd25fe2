"""Norms in other forms than over a last axis with constant weights, said with the bare Norm that has a kernel."""

from __future__ import annotations

import numpy as np

from edgeformer.engines.native.ir.dims import Shape, floor_div, product
from edgeformer.engines.native.ir.graph import Graph, Info, Node


def norm_forms(g: Graph) -> None:
    """Layer and rms norms over several axes, without a scale or with a computed one; group and instance norms.

    x -> View with the normalized axes as one -> Norm -> View -> Mul scale -> Add bias. A norm that also gives its mean
    or deviation stays as it is.
    """
    for node in list(g.nodes):
        if any(node.outputs[1:]):
            continue
        shape = g.shape(node.outputs[0]) if node.op in FORMS else ()
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


FORMS = ("RMSNormalization", "LayerNormalization", "GroupNormalization", "InstanceNormalization")


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
        if not name or _is_one(g, name, op):
            continue
        if channels:  # one number a channel, axis 1
            spread = (*g.shape(name), *(1 for _ in shape[2:]))
            name = g.emit("View", [name], Info("float32", spread), name)
        y = g.emit(op, [y, name], Info("float32", shape), node.outputs[0])
    node.op, node.inputs, node.attrs = "View", [y], {}


def _is_one(g: Graph, name: str, op: str) -> bool:
    """A scale of ones, a bias of zeros: what the exporter writes where a module has none."""
    neutral = 1.0 if op == "Mul" else 0.0
    fill = g.producer(name, "Fill")
    c = g.constant(name)
    return (fill is not None and fill.attrs["value"] == neutral) or (c is not None and bool(np.all(c == neutral)))
