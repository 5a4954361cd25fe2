"""Operations after a Linear become part of it, and Linears of one input become one operation.

See `LinearSpec`: y = fn(x W^T + bias) * factor + residual, or y = fn(x G^T + gate_bias) * (x W^T + bias). The residual
is the Linear's second input.
"""

from __future__ import annotations

from dataclasses import replace

from edgeformer.engines.native.ir.dims import product
from edgeformer.engines.native.ir.graph import Graph, Node
from edgeformer.engines.native.ir.ops import LinearSpec


def linear_inputs(g: Graph) -> None:
    """Linear(View(x)) -> Linear(x) where the last axis is the same, so that equal inputs have equal names."""
    for node in g.nodes:
        if node.op == "Linear":
            view = g.producer(node.inputs[0], "View")
            if view is not None and g.shape(view.inputs[0])[-1:] == (node.attrs["linear"].weight.k,):
                node.inputs[0] = view.inputs[0]
    g.finish()


def _linear_behind(g: Graph, name: str, user: Node) -> Node | None:
    """The Linear whose output is `name`, perhaps through Views; None if a node other than `user` reads it."""
    while g.only_user(name) is user:
        node = g.producers.get(name)
        if node is None or node.op == "Linear":
            return node
        if node.op != "View":
            return None
        name, user = node.inputs[0], node
    return None


def _absorb(g: Graph, node: Node, linear: Node, spec: LinearSpec) -> None:
    """`linear` gets `spec`, and so computes what `node` did; `node` becomes a View of it."""
    linear.attrs["linear"] = spec
    name = linear.outputs[0]
    for i in set(node.inputs):
        g.users[i] = [u for u in g.users.get(i, []) if u is not node]
    node.op, node.inputs, node.attrs = "View", [name], {}
    g.users[name] = [node]


def _has_residual(linear: Node) -> bool:
    return len(linear.inputs) > 1


def linear_activations(g: Graph) -> None:
    """Unary(Linear(x)) -> Linear(x) with `fn`."""
    for node in list(g.nodes):
        if node.op != "Unary":
            continue
        linear = _linear_behind(g, node.inputs[0], node)
        if linear is not None and linear.attrs["linear"].is_plain and not _has_residual(linear):
            _absorb(g, node, linear, replace(linear.attrs["linear"], fn=node.attrs["fn"]))
    g.finish()


def gates(g: Graph) -> None:
    """Mul(fn(x G^T + a), x W^T + b), both Linears of one x -> one Linear with a gate."""
    for node in list(g.nodes):
        if node.op != "Mul":
            continue
        sides = [_linear_behind(g, i, node) for i in node.inputs]
        for first, second in (sides, sides[::-1]):
            if first is None or second is None or first is second or first.inputs != second.inputs:
                continue
            gate, up = first.attrs["linear"], second.attrs["linear"]
            a, b = gate.weight, up.weight
            if not gate.fn or (a.type, a.n, a.k) != (b.type, b.n, b.k) or gate.gate or up.gate:
                continue
            if not up.is_plain or gate.factor != 1.0 or _has_residual(first):
                continue
            _absorb(g, node, second, replace(up, gate=a, gate_bias=gate.bias, fn=gate.fn))
            break
    g.finish()


def linear_factors(g: Graph) -> None:
    """Mul(Linear(x), c) and Div(Linear(x), c) with a constant number c -> Linear(x) with `factor`."""
    for node in list(g.nodes):
        if node.op not in ("Mul", "Div"):
            continue
        pairs = (node.inputs, node.inputs[::-1]) if node.op == "Mul" else (node.inputs,)
        for x, c in pairs:
            value, linear = g.scalar(c), _linear_behind(g, x, node)
            if value is None or linear is None or linear.attrs["linear"].gate or _has_residual(linear):
                continue
            if node.op == "Div" and (value == 0.0 or value not in (2.0**e for e in range(-20, 21))):
                continue  # x * (1 / c) is not x / c unless c is a power of two
            spec = linear.attrs["linear"]
            factor = spec.factor * (value if node.op == "Mul" else 1.0 / value)
            _absorb(g, node, linear, replace(spec, factor=factor))
            break
    g.finish()


def residuals(g: Graph) -> None:
    """Add(Linear(x), r) with r of the same shape -> Linear(x, r): r is added as the output is written."""
    rank = {id(n): i for i, n in enumerate(g.nodes)}
    for node in list(g.nodes):
        if node.op != "Add":
            continue
        shape = g.shape(node.outputs[0])
        for x, other in (node.inputs[::-1], node.inputs):
            linear = _linear_behind(g, x, node)
            if linear is None or linear.attrs["linear"].gate or _has_residual(linear) or other in g.constants:
                continue
            if g.shape(other) != shape or product(g.shape(x)) != product(shape) or _depends(g, other, linear, rank):
                continue
            linear.inputs.append(other)
            g.users.setdefault(other, []).append(linear)
            _absorb(g, node, linear, linear.attrs["linear"])
            rank[id(linear)] = rank[id(node)]
            break
    g.finish()


def _depends(g: Graph, name: str, node: Node, rank: dict[int, int]) -> bool:
    """Whether `name` is computed from `node`'s output; only nodes that run after `node` can be."""
    stack, seen = [name], set()
    while stack:
        producer = g.producers.get(stack.pop())
        if producer is node:
            return True
        if producer is not None and id(producer) not in seen and rank[id(producer)] > rank[id(node)]:
            seen.add(id(producer))
            stack += [i for i in producer.inputs if i]
    return False


def group_linears(g: Graph) -> None:
    """Linear(x), Linear(x), ... without residuals -> one Linears(x): one quantization of x, one barrier.

    A Linear with a residual becomes a Linears of its own. attrs["parts"]: a LinearSpec for each output; inputs: x, then
    each part's residual or "".
    """
    groups: dict[str, list[Node]] = {}
    for node in g.nodes:
        if node.op == "Linear" and not _has_residual(node):
            groups.setdefault(node.inputs[0], []).append(node)
    merged = {id(n): group for group in groups.values() for n in group}
    nodes: list[Node] = []
    for node in g.nodes:
        if node.op != "Linear":
            nodes.append(node)
            continue
        group = merged.get(id(node), [node])
        if group[0] is node:
            outputs = [n.outputs[0] for n in group]
            residual = [n.inputs[1] if _has_residual(n) else "" for n in group]
            parts = tuple(n.attrs["linear"] for n in group)
            nodes.append(Node("Linears", [node.inputs[0], *residual], outputs, {"parts": parts}))
    g.nodes = nodes
    g.finish()
