"""Helpers for passes: find nodes, read constants, replace nodes and values."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common
from onnx_ir.tape import Tape


def constant(model: ir.Model, name: str, array: np.ndarray) -> ir.Value:
    """The initializer `name` with this content: a new one, or the existing one if it is equal.

    Raises:
        ValueError: an initializer of that name has other content.
    """
    graph = model.graph
    if name in graph.initializers:
        value = graph.initializers[name]
        assert value.const_value is not None
        if np.array_equal(value.const_value.numpy(), array):
            return value
        raise ValueError(f"initializer {name} exists with other content; expected equal content")
    return initializer(model, name, ir.Tensor(array, name=name))


def initializer(model: ir.Model, name: str, tensor: ir.TensorProtocol) -> ir.Value:
    """A new initializer `name` with the content of `tensor`."""
    value = ir.Value(
        name=name, shape=ir.Shape(tensor.shape.numpy()), type=ir.TensorType(tensor.dtype), const_value=tensor
    )
    tensor.name = name
    model.graph.register_initializer(value)
    return value


def replace(model: ir.Model, node: ir.Node, tape: Tape, new: ir.Value) -> None:
    """Inserts the tape's nodes in place of `node`; every use of its first output becomes a use of `new`."""
    old = node.outputs[0]
    new.shape = new.shape if new.shape is not None else old.shape
    new.type = new.type or old.type
    model.graph.insert_before(node, tape.nodes)
    redirect(old, new)
    model.graph.remove(node, safe=True)


def redirect(old: ir.Value, new: ir.Value) -> None:
    """Every use of `old`, as a node's input or as output of the graph, becomes a use of `new`; outputs keep names."""
    if old.is_graph_output():
        name, old.name = old.name, f"{old.name}.replaced"
        new.name, new.shape, new.type = name, old.shape, old.type
    old.replace_all_uses_with(new, replace_graph_outputs=True)


def infer_shapes(model: ir.Model) -> None:
    """Runs ONNX shape inference on the graph, in place."""
    common.ShapeInferencePass()(model)


def array(value: ir.Value | None) -> np.ndarray | None:
    """The content of an initializer; None for graph inputs and computed values."""
    if value is None or value.const_value is None or value.is_graph_input():
        return None
    return value.const_value.numpy()


def integers(node: ir.Node, name: str, default: int = 0) -> int:
    """The integer attribute `name`, or `default`."""
    attribute = node.attributes.get(name)
    return default if attribute is None else int(attribute.value)


def producer(value: ir.Value | None, *op_types: str) -> ir.Node | None:
    """The node that computes `value`, if it is one of `op_types` in the default domain; else None."""
    node = None if value is None else value.producer()
    return node if node is not None and node.domain == "" and node.op_type in op_types else None


def ancestors(ends: Iterable[ir.Node], without: Collection[str] = ()) -> set[ir.Node]:
    """The nodes `ends` and all that they depend on; nodes of the types `without` are left out and not followed."""
    found: set[ir.Node] = set()
    queue = list(ends)
    while queue:
        node = queue.pop()
        if node not in found and node.op_type not in without:
            found.add(node)
            queue.extend(node.predecessors())
    return found


def consumers(value: ir.Value) -> list[ir.Node]:
    """Every node that reads `value`."""
    return [use.node for use in value.uses()]


def nodes(model: ir.Model, *op_types: str, domain: str = "") -> Iterator[ir.Node]:
    """The nodes of these types, in order; the graph may be changed during the iteration."""
    for node in tuple(model.graph):
        if node.op_type in op_types and node.domain == domain:
            yield node
