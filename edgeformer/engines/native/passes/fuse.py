"""Fewer, larger operations: what follows a Linear is done on its fresh output, what shares its input runs beside it.

A Linear gains the attributes `gate` (the Weight of an activated gate whose product with the output is taken), `fn`
(an activation), `factor` and, as a second input, a residual that is added last: y = fn(x W^T + bias) * factor + r,
or y = fn(x G^T) * (x W^T).
"""

from __future__ import annotations

from edgeformer.engines.native.ir.dims import product, symbol
from edgeformer.engines.native.ir.graph import Graph, Info, Node
from edgeformer.engines.native.ir.rows import row_symbols

LINEAR_DEFAULTS = {"bias": "", "gate": None, "gate_bias": "", "fn": "", "factor": 1.0}


def keep_rows(g: Graph) -> None:
    """Slice of the rows from -logits_to_keep on becomes Keep: the engine keeps the last rows of every sequence.

    Only values [batch, sequence, ...] have a row for each token; another axis 1 stays a Slice.
    """
    rows = tuple(symbol(name) for name in row_symbols(g))
    for node in list(g.nodes):
        if node.op != "Slice" or node.attrs["axes"] != (1,) or node.attrs["steps"] != (1,):
            continue
        if g.shape(node.inputs[0])[:2] != rows:
            continue
        (start,), (end,) = node.attrs["starts"], node.attrs["ends"]
        for name in g.inputs:
            if g.inputs[name].value and start == -symbol(name) and end == 2**63 - 1:
                node.op, node.attrs = "Keep", {"count": name}
                shape = g.shape(node.outputs[0])
                _set_size(g, shape[1], symbol("kept"))
                dtype = g.info[node.inputs[0]].dtype
                g.info[node.outputs[0]] = Info(dtype, (shape[0], symbol("kept"), *shape[2:]))
                break
    g.finish()


ROW_BY_ROW = ("View", "Linear", "Norm", "Unary", "Add", "Sub", "Mul", "Div")


def early_rows(g: Graph) -> None:
    """What only the kept rows need is computed for them alone: Keep moves up, as far as the last attention.

    A prompt whose last logits are wanted then takes the last layer's feed-forward part for one row; the numbers are the
    same, for each row has its own.
    """
    moved = True
    while moved:
        moved = any(_move_up(g, keep) for keep in [n for n in g.nodes if n.op == "Keep"])
        g.finish()


def _move_up(g: Graph, keep: Node) -> bool:
    """Keep(f(x, y)) becomes f(Keep(x), Keep(y)) where f works row by row and nobody else reads what it makes."""
    name = keep.inputs[0]
    node = g.producers.get(name)
    if node is None or node.op not in ROW_BY_ROW or len(node.outputs) != 1 or g.only_user(name) is not keep:
        return False
    rows = g.shape(name)[:2]
    if node.op == "Norm" and len(g.shape(name)) < 3:
        return False  # it runs along the rows
    read = [i for i in dict.fromkeys(node.inputs) if i and i not in g.constants]
    ranks = {len(g.shape(i)) for i in read} if node.op != "View" else set()  # an operand of a lower rank is no row
    if any(g.shape(i)[:2] != rows for i in read) or ranks - {len(g.shape(name))}:
        return False
    kept = {}
    for i in read:
        there = next((n for n in g.users.get(i, []) if n.op == "Keep" and n is not keep), None)
        info = Info(g.info[i].dtype, (rows[0], symbol("kept"), *g.shape(i)[2:]))
        kept[i] = there.outputs[0] if there else g.emit("Keep", [i], info, i, **keep.attrs)
    node.inputs = [kept.get(i, i) for i in node.inputs]
    node.outputs = list(keep.outputs)
    g.nodes.remove(keep)
    g.index()
    return True


def _set_size(g: Graph, old: object, new: object) -> None:
    """Replace one size by a symbol in every shape that has it."""
    for info in g.info.values():
        if old in info.shape:
            info.shape = tuple(new if d == old else d for d in info.shape)  # type: ignore[misc]


def linear_inputs(g: Graph) -> None:
    """A Linear reads the value behind a View that leaves the last axis alone: equal inputs get equal names."""
    for node in g.nodes:
        if node.op == "Linear":
            view = g.producer(node.inputs[0], "View")
            if view is not None and g.shape(view.inputs[0])[-1:] == (node.attrs["weight"].k,):
                node.inputs[0] = view.inputs[0]
            node.attrs = {**LINEAR_DEFAULTS, **node.attrs}
    g.finish()


def _linear_behind(g: Graph, name: str, user: Node) -> Node | None:
    """The Linear whose output `name` is, perhaps through Views, when `user` alone reads it."""
    while g.only_user(name) is user:
        node = g.producers.get(name)
        if node is None or node.op == "Linear":
            return node
        if node.op != "View":
            return None
        name, user = node.inputs[0], node
    return None


def _absorb(g: Graph, node: Node, linear: Node) -> None:
    """`node` is now another shape of what `linear` computes."""
    name = linear.outputs[0]
    for i in set(node.inputs):
        g.users[i] = [u for u in g.users.get(i, []) if u is not node]
    node.op, node.inputs, node.attrs = "View", [name], {}
    g.users[name] = [node]


def activations(g: Graph) -> None:
    """An activation after a Linear."""
    for node in list(g.nodes):
        if node.op != "Unary":
            continue
        linear = _linear_behind(g, node.inputs[0], node)
        if linear is not None and _untouched(linear):
            linear.attrs["fn"] = node.attrs["fn"]
            _absorb(g, node, linear)
    g.finish()


def _untouched(linear: Node) -> bool:
    return linear.attrs["fn"] == "" and linear.attrs["factor"] == 1.0 and len(linear.inputs) == 1


def gates(g: Graph) -> None:
    """fn(x G^T + a) * (x W^T + b) is one Linear with a gate."""
    for node in list(g.nodes):
        if node.op != "Mul":
            continue
        sides = [_linear_behind(g, i, node) for i in node.inputs]
        for gate, up in (sides, sides[::-1]):
            if gate is None or up is None or gate is up or not gate.attrs["fn"] or gate.inputs != up.inputs:
                continue
            a, b = gate.attrs["weight"], up.attrs["weight"]
            if (a.type, a.n, a.k) != (b.type, b.n, b.k) or gate.attrs["gate"] or up.attrs["gate"]:
                continue
            if not _untouched(up) or gate.attrs["factor"] != 1.0 or len(gate.inputs) != 1:
                continue
            up.attrs.update(gate=a, gate_bias=gate.attrs["bias"], fn=gate.attrs["fn"])
            _absorb(g, node, up)
            break
    g.finish()


def factors(g: Graph) -> None:
    """A constant factor after a Linear, and a Linear's own constant divisor."""
    for node in list(g.nodes):
        if node.op not in ("Mul", "Div"):
            continue
        pairs = (node.inputs, node.inputs[::-1]) if node.op == "Mul" else (node.inputs,)
        for x, c in pairs:
            value, linear = g.scalar(c), _linear_behind(g, x, node)
            if value is None or linear is None or linear.attrs["gate"] or len(linear.inputs) != 1:
                continue
            if node.op == "Div" and (value == 0.0 or value not in (2.0**e for e in range(-20, 21))):
                continue  # x * (1 / c) is not x / c unless c is a power of two
            linear.attrs["factor"] *= value if node.op == "Mul" else 1.0 / value
            _absorb(g, node, linear)
            break
    g.finish()


def residuals(g: Graph) -> None:
    """Add of a value of the same shape after a Linear: added as the output is written."""
    rank = {id(n): i for i, n in enumerate(g.nodes)}
    for node in list(g.nodes):
        if node.op != "Add":
            continue
        shape = g.shape(node.outputs[0])
        for x, other in (node.inputs[::-1], node.inputs):
            linear = _linear_behind(g, x, node)
            if linear is None or linear.attrs["gate"] or len(linear.inputs) != 1 or other in g.constants:
                continue
            if g.shape(other) != shape or product(g.shape(x)) != product(shape) or _depends(g, other, linear, rank):
                continue
            linear.inputs.append(other)
            g.users.setdefault(other, []).append(linear)
            _absorb(g, node, linear)
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


def share_inputs(g: Graph) -> None:
    """Linears of one input without a residual become one operation Linears: one quantization, one barrier.

    attrs `parts`: the attributes of each, in the order of the outputs; inputs: x, then each part's residual or "".
    """
    groups: dict[str, list[Node]] = {}
    for node in g.nodes:
        if node.op == "Linear" and len(node.inputs) == 1:
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
            residuals = [n.inputs[1] if len(n.inputs) > 1 else "" for n in group]
            nodes.append(Node("Linears", [node.inputs[0], *residuals], outputs, {"parts": [n.attrs for n in group]}))
    g.nodes = nodes
    g.finish()
