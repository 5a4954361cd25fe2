"""The few moves that passes are made of."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common
from onnx_ir.tape import Tape


def constant(model: ir.Model, name: str, array: np.ndarray) -> ir.Value:
    """An initializer called `name`; the one already there if it has the same content."""
    graph = model.graph
    if name in graph.initializers:
        value = graph.initializers[name]
        assert value.const_value is not None
        if np.array_equal(value.const_value.numpy(), array):
            return value
        raise ValueError(f"initializer {name} exists with other content")
    return initializer(model, name, ir.Tensor(array, name=name))


def initializer(model: ir.Model, name: str, tensor: ir.TensorProtocol) -> ir.Value:
    """A new initializer `name` holding `tensor`."""
    value = ir.Value(
        name=name, shape=ir.Shape(tensor.shape.numpy()), type=ir.TensorType(tensor.dtype), const_value=tensor
    )
    tensor.name = name
    model.graph.register_initializer(value)
    return value


def replace(model: ir.Model, node: ir.Node, tape: Tape, new: ir.Value) -> None:
    """Puts the tape's nodes where `node` stands and `new` where its first output was used; removes `node`."""
    old = node.outputs[0]
    new.shape = new.shape if new.shape is not None else old.shape
    new.type = new.type or old.type
    model.graph.insert_before(node, tape.nodes)
    redirect(model, old, new)
    model.graph.remove(node, safe=True)


def redirect(model: ir.Model, old: ir.Value, new: ir.Value) -> None:
    """Every use of `old`, as input or as output of the graph, becomes a use of `new`; an output keeps its name."""
    if old.is_graph_output():
        name, old.name = old.name, f"{old.name}.replaced"
        new.name, new.shape, new.type = name, old.shape, old.type
    old.replace_all_uses_with(new, replace_graph_outputs=True)


def infer_shapes(model: ir.Model) -> None:
    """Gives every value the type and shape that follow from the inputs'."""
    common.ShapeInferencePass()(model)


def array(value: ir.Value | None) -> np.ndarray | None:
    """The content of a constant, or None for anything computed or fed."""
    if value is None or value.const_value is None or value.is_graph_input():
        return None
    return value.const_value.numpy()


def integers(node: ir.Node, name: str, default: int = 0) -> int:
    """The integer attribute `name`."""
    attribute = node.attributes.get(name)
    return default if attribute is None else int(attribute.value)


def producer(value: ir.Value | None, *op_types: str) -> ir.Node | None:
    """The node that makes `value`, if it is one of `op_types` of the default domain."""
    node = None if value is None else value.producer()
    return node if node is not None and node.domain == "" and node.op_type in op_types else None


def ancestors(ends: Iterable[ir.Node]) -> set[ir.Node]:
    """The nodes `ends` and all that they are computed from."""
    found: set[ir.Node] = set()
    queue = list(ends)
    while queue:
        node = queue.pop()
        if node not in found:
            found.add(node)
            queue.extend(node.predecessors())
    return found


def consumers(value: ir.Value) -> list[ir.Node]:
    """Every node that reads `value`."""
    return [use.node for use in value.uses()]


def nodes(model: ir.Model, *op_types: str, domain: str = "") -> Iterator[ir.Node]:
    """The nodes of these types, in order; safe against changes during the iteration."""
    for node in tuple(model.graph):
        if node.op_type in op_types and node.domain == domain:
            yield node
