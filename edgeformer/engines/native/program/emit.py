"""Nodes to operations: slots, weights, and every operation that computes on plain tensors.

A method `_op_NAME` adds the operations of one node of the operator NAME; it returns False for an unsupported form.
Linears, norms and attention are in `lowering`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from edgeformer.bundle.signature import Array
from edgeformer.engines.native.ir.cache import Cache
from edgeformer.engines.native.ir.dims import Dim, Size
from edgeformer.engines.native.ir.functions import UNARY_FUNCTIONS
from edgeformer.engines.native.ir.graph import Graph, Info, Node
from edgeformer.engines.native.ir.infer import conv_geometry
from edgeformer.engines.native.ir.rows import is_batch_local, is_row_local, row_symbols
from edgeformer.engines.native.ir.weight import Weight
from edgeformer.engines.native.passes import unsupported_nodes
from edgeformer.engines.native.program.program import LANES, Op, PackedWeight, Program, Slot

ELEMENTWISE = {
    "Add": "add", "Sub": "sub", "Mul": "mul", "Div": "div", "Pow": "pow", "Min": "min", "Max": "max", "Mod": "mod",
    "Equal": "equal", "Less": "less", "LessOrEqual": "less_equal", "Greater": "greater",
    "GreaterOrEqual": "greater_equal", "And": "and", "Or": "or", "Xor": "xor",
}  # fmt: skip

# Functions that the engine knows by these names; a test compares them with those of csrc/program/names.h.
REDUCTIONS = ("mean", "sum", "max", "min", "prod", "l2", "sumsquare", "l1")
SCATTERS = ("none", "add", "mul")


class Emitter:
    """Fills a Program; `g` is the lowered graph."""

    def __init__(self, g: Graph, caches: list[Cache]) -> None:
        self.g = g
        batch, sequence = row_symbols(g)
        names = {str(d) for i in g.inputs.values() for d in i.shape if isinstance(d, Dim)}
        names |= {n for n, i in g.inputs.items() if i.value is not None}
        # The engine sets `kept` (rows that Keep keeps) and the caches' length; no input's shape gives them.
        past = {str(g.info[c.past_value].shape[2]) for c in caches}
        self.p = Program(sorted(names | past | {"kept"}), caches=caches)
        self.p.row_symbols = (batch, sequence)
        self.p.past_symbol = min(past, default="")
        self.p.row_local = bool(batch) and is_row_local(g, batch, sequence)
        self.p.batch_local = bool(batch) and not caches and is_batch_local(g, batch)
        self.slot_of: dict[str, int] = {}
        self.quant_of: dict[str, int] = {}
        self.weight_of: dict[tuple[Any, ...], int] = {}

    # -- slots and weights -------------------------------------------------------------------------------------------

    def new_slot(self, name: str, info: Info, view_of: int = -1) -> int:
        """Add a slot; returns its number."""
        dtype = {"float32": "f32", "int64": "i64", "bool": "bool"}.get(info.dtype)
        if dtype is None:
            raise unsupported_nodes([Node(f"{info.dtype} tensor", [], [name])])
        self.p.slots.append(Slot(name, dtype, info.shape, view_of))
        self.slot_of[name] = len(self.p.slots) - 1
        return self.slot_of[name]

    def slot(self, name: str) -> int:
        """The slot of a value; a constant gets one when first used; "" is -1."""
        if not name:
            return -1
        if name in self.slot_of:
            return self.slot_of[name]
        c = self.g.constants[name]
        inside = {"float16": "float32", "int32": "int64", "uint8": "int64", "int8": "int64", "int4": "int64"}
        dtype = inside.get(c.dtype, c.dtype)
        index = self.new_slot(name, Info(dtype, c.shape))
        self.p.slots[index].constant = np.ascontiguousarray(c.array(), dtype)
        return index

    def out(self, node: Node) -> int:
        """A new slot for the first output of `node`."""
        return self.new_slot(node.outputs[0], self.g.info[node.outputs[0]])

    def add(self, kind: str, node: Node, inputs: list[str], **numbers: Any) -> None:
        """Add an operation with one output; `numbers`: its numbers and names by keyword, and a note for people."""
        op = Op(kind, [self.slot(i) for i in inputs], [self.out(node)])
        for key, value in numbers.items():
            values = list(value) if isinstance(value, list | tuple) else [value]
            if key == "note":
                op.note = value
            elif any(isinstance(v, Dim) for v in values) or key in ("start", "starts", "ends", "pads", "sizes"):
                op.sizes[key] = values
            elif any(isinstance(v, float) for v in values):
                op.floats[key] = [float(v) for v in values]
            elif any(isinstance(v, str) for v in values):
                op.names[key] = values
            else:
                op.ints[key] = [int(v) for v in values]
        self.p.ops.append(op)

    def weight(self, parts: list[tuple[Weight, str]]) -> int:
        """The number of the weight that is packed from `parts`, one for equal parts."""
        key = tuple((w.type, w.q, w.scale, w.min, w.transposed, w.selected, role) for w, role in parts)
        if key not in self.weight_of:
            first = parts[0][0]
            n = first.n if parts[0][1] == "all" else 2 * round_up(first.n, LANES)
            self.p.weights.append(PackedWeight(first.type, n, first.k, parts))
            self.weight_of[key] = len(self.p.weights) - 1
        return self.weight_of[key]

    def constant_slot(self, hint: str, array: Array) -> int:
        """The slot of a new constant."""
        return self.slot(self.g.add_constant(hint, array))

    # -- operations on plain tensors ---------------------------------------------------------------------------------

    def _op_view(self, node: Node) -> None:
        source = self.slot(node.inputs[0])
        self.new_slot(node.outputs[0], self.g.info[node.outputs[0]], source)

    def _op_unary(self, node: Node) -> bool | None:
        if node.attrs["fn"] not in UNARY_FUNCTIONS or (
            self.g.info[node.inputs[0]].dtype != "float32" and node.attrs["fn"] not in ("neg", "abs")
        ):
            return False
        self.add("unary", node, node.inputs, fn=node.attrs["fn"], note=node.attrs["fn"])
        return None

    def _op_pointwise(self, node: Node) -> bool | None:
        fn, numbers = node.attrs["fn"], list(node.attrs["numbers"])
        if self.g.info[node.inputs[0]].dtype != "float32" and (fn, self.g.info[node.inputs[0]].dtype) != (
            "sign",
            "int64",
        ):
            return False
        self.add("pointwise", node, node.inputs, fn=fn, numbers=numbers, note=fn)
        return None

    def elementwise(self, node: Node) -> None:
        """Add a binary operation, or a chain of them: Min and Max take any number of inputs."""
        if len(node.inputs) == 1:
            self.add("tile", node, node.inputs)
            return
        name = ELEMENTWISE[node.op]
        acc = node.inputs[0]
        for i, other in enumerate(node.inputs[1:]):
            last = i == len(node.inputs) - 2
            step = node if last else Node(node.op, [], [self.g.fresh(acc)])
            if not last:
                self.g.info[step.outputs[0]] = self.g.info[node.outputs[0]]
            self.add("binary", step, [acc, other], fn=name, note=name)
            acc = step.outputs[0]

    def _op_not(self, node: Node) -> None:
        self.add("not", node, node.inputs)

    def _op_where(self, node: Node) -> None:
        self.add("where", node, node.inputs)

    def _op_cast(self, node: Node) -> None:
        self.add("cast", node, node.inputs)

    def _op_expand(self, node: Node) -> None:
        self.add("expand", node, node.inputs)

    def _op_tile(self, node: Node) -> None:
        self.add("tile", node, node.inputs)

    def _op_concat(self, node: Node) -> None:
        self.add("concat", node, node.inputs, axis=node.attrs["axis"] % len(self.g.shape(node.outputs[0])))

    def _op_slice(self, node: Node) -> None:
        a = node.attrs
        self.add("slice", node, node.inputs, starts=a["starts"], ends=a["ends"], axes=a["axes"], steps=a["steps"])

    def _op_transpose(self, node: Node) -> None:
        rank = len(self.g.shape(node.inputs[0]))
        self.add("transpose", node, node.inputs, perm=list(node.attrs.get("perm") or range(rank)[::-1]))

    def _op_gather(self, node: Node) -> None:
        self.add("gather", node, node.inputs, axis=node.attrs.get("axis", 0) % len(self.g.shape(node.inputs[0])))

    def _op_gatherelements(self, node: Node) -> None:
        axis = node.attrs.get("axis", 0) % len(self.g.shape(node.inputs[0]))
        self.add("gather_elements", node, node.inputs, axis=axis)

    def _op_gathernd(self, node: Node) -> None:
        self.add("gather_nd", node, node.inputs, batch=node.attrs.get("batch_dims", 0))

    def _op_reduce(self, node: Node) -> bool | None:
        fn = node.attrs["fn"]
        if fn not in REDUCTIONS or (self.g.info[node.inputs[0]].dtype == "bool" and fn not in ("max", "min")):
            return False
        self.add("reduce", node, node.inputs, fn=fn, axes=node.attrs["axes"], note=fn)
        return None

    def _op_argmax(self, node: Node) -> bool | None:
        if node.attrs.get("select_last_index", 0):
            return False
        axis = node.attrs.get("axis", 0) % len(self.g.shape(node.inputs[0]))
        self.add("argmax", node, node.inputs, axis=axis, smallest=int(node.op == "ArgMin"))
        return None

    _op_argmin = _op_argmax

    def _op_topk(self, node: Node) -> None:
        axis = node.attrs.get("axis", -1) % len(self.g.shape(node.inputs[0]))
        outputs = [self.new_slot(o or self.g.fresh("unused"), self.g.info[o]) for o in node.outputs if o]
        if len(outputs) == 1:  # the graph reads one of the two; the operation writes both
            missing = 0 if not node.outputs[0] else 1
            dtype = self.g.info[node.inputs[0]].dtype if missing == 0 else "int64"
            shape = self.p.slots[outputs[0]].shape
            outputs.insert(missing, self.new_slot(self.g.fresh("unused"), Info(dtype, shape)))
        ints = {"axis": [axis], "largest": [int(node.attrs.get("largest", 1))]}
        self.p.ops.append(Op("topk", [self.slot(node.inputs[0])], outputs, ints))

    def _op_scatterelements(self, node: Node) -> bool | None:
        axis = node.attrs.get("axis", 0) % len(self.g.shape(node.inputs[0]))
        reduction = node.attrs.get("reduction", "none")
        if reduction not in SCATTERS:
            return False
        self.add("scatter_elements", node, node.inputs, axis=axis, fn=reduction)
        return None

    def _op_scatternd(self, node: Node) -> bool | None:
        if node.attrs.get("reduction", "none") != "none":
            return False
        self.add("scatter_nd", node, node.inputs)
        return None

    def _op_history(self, node: Node) -> None:
        self.add("history", node, node.inputs, layer=node.attrs["layer"])

    def _op_softmax(self, node: Node) -> None:
        axis = node.attrs.get("axis", -1) % len(self.g.shape(node.inputs[0]))
        self.add("softmax", node, node.inputs, axis=axis, log=0)

    def _op_logsoftmax(self, node: Node) -> None:
        axis = node.attrs.get("axis", -1) % len(self.g.shape(node.inputs[0]))
        self.add("softmax", node, node.inputs, axis=axis, log=1)

    def _op_matmul(self, node: Node) -> bool | None:
        if any(len(self.g.shape(i)) < 2 for i in node.inputs):
            return False
        self.add("matmul", node, node.inputs)
        return None

    def _op_gemm(self, node: Node) -> None:
        a = node.attrs
        self.add(
            "gemm", node, node.inputs + [""] * (3 - len(node.inputs)), trans_a=int(a.get("transA", 0)),
            trans_b=int(a.get("transB", 0)), alpha=float(a.get("alpha", 1.0)), beta=float(a.get("beta", 1.0)),
        )  # fmt: skip

    def _op_conv(self, node: Node) -> None:
        _, strides, dilations, pads = conv_geometry(self.g, node)
        inputs = node.inputs + [""] * (3 - len(node.inputs))
        op_pads = [int(v) for v in pads]
        self.add("conv", node, inputs, strides=strides, dilations=dilations, group=node.attrs.get("group", 1))
        self.p.ops[-1].ints["pads"] = op_pads

    def _op_pad(self, node: Node) -> bool | None:
        a = node.attrs
        if a["mode"] != "constant" or a["value"] is None:
            return False
        self.add("pad", node, node.inputs, pads=a["pads"], axes=a["axes"], value=float(a["value"]))
        return None

    def _op_trilu(self, node: Node) -> bool | None:
        k: Size = 0
        if node.input(1):
            found = self.g.info[node.input(1)].value
            if found is None:
                return False
            k = found[0]
        self.add("trilu", node, node.inputs[:1], start=k, upper=node.attrs.get("upper", 1))
        return None

    def _op_cumsum(self, node: Node) -> bool | None:
        axis = self.g.info[node.inputs[1]].value
        if axis is None or not isinstance(axis[0], int):
            return False
        rank = len(self.g.shape(node.inputs[0]))
        flags = {k: node.attrs.get(k, 0) for k in ("exclusive", "reverse")}
        self.add("cumsum", node, node.inputs[:1], axis=axis[0] % rank, **flags)
        return None

    def _op_clip(self, node: Node) -> None:
        low, high = (self.g.scalar(i) if i else None for i in (node.input(1), node.input(2)))
        if (node.input(1) and low is None) or (node.input(2) and high is None):
            self.clip_between(node)
            return
        low, high = (-np.inf if low is None else low), (np.inf if high is None else high)
        self.add("clip", node, node.inputs[:1], bounds=[float(low), float(high)])

    def clip_between(self, node: Node) -> None:
        """Clip with computed bounds: min(max(x, low), high)."""
        x = node.inputs[0]
        steps = [(op, bound) for op, bound in (("Max", node.input(1)), ("Min", node.input(2))) if bound]
        for i, (op, bound) in enumerate(steps):
            step = Node(op, [x, bound], [node.outputs[0] if i == len(steps) - 1 else self.g.fresh(x)])
            self.g.info[step.outputs[0]] = self.g.info[node.outputs[0]]
            self.elementwise(step)
            x = step.outputs[0]

    def _op_range(self, node: Node) -> bool | None:
        if node.inputs:
            return False
        self.add("range", node, [], start=node.attrs["start"], step=int(node.attrs["step"]))
        return None

    def _op_fill(self, node: Node) -> None:
        self.add("fill", node, [], value=float(node.attrs["value"]))

    def _op_sizes(self, node: Node) -> None:
        self.add("sizes", node, [], sizes=list(node.attrs["sizes"]))


def round_up(x: int, to: int) -> int:
    """`x` or the next multiple of `to`."""
    return -(-x // to) * to
