"""The lowered graph as a program: a list of operations on numbered slots, printable, and all that C++ needs to run it.

A slot is a tensor whose sizes are expressions of a few symbols (`batch`, `sequence`, `kept`, ...); a view shares
another slot's memory. Weights are matrices to be packed; operations name them by number.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from edgeformer.native.dims import Atom, Dim, Shape, Size, evaluate, symbol
from edgeformer.native.graph import Array, Graph, Info, Node, read_graph
from edgeformer.native.passes import lower, unsupported_nodes
from edgeformer.native.passes.attention import Cache
from edgeformer.native.passes.linear import Weight
from edgeformer.native.rows import is_row_local

PAST = "past_key_values."  # the bundle format's name for what a state holds
ENCODER = ".encoder."  # but these are what an encoder made: plain inputs that never grow
LANES = 16  # rows of a weight panel, as csrc/kernels/kernels.h packs them
ELEMENTWISE = {
    "Add": "add", "Sub": "sub", "Mul": "mul", "Div": "div", "Pow": "pow", "Min": "min", "Max": "max", "Mod": "mod",
    "Equal": "equal", "Less": "less", "LessOrEqual": "less_equal", "Greater": "greater",
    "GreaterOrEqual": "greater_equal", "And": "and", "Or": "or", "Xor": "xor",
}  # fmt: skip


@dataclass(slots=True)
class Slot:
    """A tensor of the program. dtype: "f32", "i64", "bool", or "quant" (int8 rows with their block scales)."""

    name: str
    dtype: str
    shape: Shape
    view_of: int = -1
    constant: Array | None = None


@dataclass(slots=True)
class Op:
    """One operation: slot numbers (-1: not given), weight numbers, and its own numbers by name."""

    kind: str
    inputs: list[int]
    outputs: list[int]
    ints: dict[str, list[int]] = field(default_factory=dict)
    floats: dict[str, list[float]] = field(default_factory=dict)
    sizes: dict[str, list[Size]] = field(default_factory=dict)
    weights: list[int] = field(default_factory=list)
    note: str = ""


@dataclass(slots=True)
class PackedWeight:
    """A matrix to be packed: its parts, each with the first packed row of every 16 rows or, for None, in order."""

    type: str
    n: int
    k: int
    parts: list[tuple[Weight, str]]  # "all", "gate" or "up": which panels the part fills


@dataclass
class Program:
    """What `NativeEngine` runs. `caches` in layer order; `inputs` and `outputs` map names to slots."""

    symbols: list[str]
    slots: list[Slot] = field(default_factory=list)
    weights: list[PackedWeight] = field(default_factory=list)
    ops: list[Op] = field(default_factory=list)
    caches: list[Cache] = field(default_factory=list)
    inputs: dict[str, int] = field(default_factory=dict)
    outputs: dict[str, int] = field(default_factory=dict)
    row_local: bool = False
    row_symbols: tuple[str, str] = ("", "")
    past_symbol: str = ""  # the caches' length


def lower_bundle(path: Path) -> tuple[Program, Graph]:
    """The program of the graph file `path`.

    Raises:
        BundleError: the file cannot be read.
        EngineUnavailable: some nodes cannot be lowered; the message names all of them.
    """
    graph = read_graph(path)
    return build(graph), graph


def build(g: Graph) -> Program:
    """Lower a graph and turn it into a program. The graph is changed."""
    caches = lower(g)
    return _Builder(g, caches).build()


class _Builder:
    def __init__(self, g: Graph, caches: list[Cache]) -> None:
        self.g = g
        batch, sequence = _row_symbols(g)
        names = {str(d) for i in g.inputs.values() for d in i.shape if isinstance(d, Dim)}
        names |= {n for n, i in g.inputs.items() if i.value is not None}
        # `kept` (rows that Keep keeps) and the caches' length are bound by the engine, not by an input's shape.
        past = {str(g.info[c.past_value].shape[2]) for c in caches}
        self.p = Program(sorted(names | past | {"kept"}), caches=caches)
        self.p.row_symbols = (batch, sequence)
        self.p.past_symbol = min(past, default="")
        self.p.row_local = bool(batch) and is_row_local(g, batch, sequence)
        self.slot_of: dict[str, int] = {}
        self.quant_of: dict[str, int] = {}
        self.weight_of: dict[tuple[Any, ...], int] = {}

    def build(self) -> Program:
        g, p = self.g, self.p
        for name, info in g.inputs.items():
            p.inputs[name] = self.new_slot(name, info)
        unsupported = [
            Node("a cache that is read in a form of its own", [], [name])
            for name in g.inputs
            if name.startswith(PAST) and ENCODER not in name
        ]
        for node in g.nodes:
            emit = getattr(self, f"op_{node.op.lower()}", None)
            if node.op in ELEMENTWISE:
                self.elementwise(node)
            elif emit is None or emit(node) is False:
                unsupported.append(node)
        if unsupported:
            raise unsupported_nodes(unsupported)
        p.outputs = {name: self.slot(name) for name in g.outputs}
        return p

    # -- slots and weights -------------------------------------------------------------------------------------------

    def new_slot(self, name: str, info: Info, view_of: int = -1) -> int:
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
        self.p.slots[index].constant = np.ascontiguousarray(c.array().astype(dtype))
        return index

    def out(self, node: Node) -> int:
        return self.new_slot(node.outputs[0], self.g.info[node.outputs[0]])

    def add(self, kind: str, node: Node, inputs: list[str], **numbers: Any) -> None:
        """An operation with one output, its numbers sorted by type."""
        op = Op(kind, [self.slot(i) for i in inputs], [self.out(node)])
        for key, value in numbers.items():
            values = list(value) if isinstance(value, list | tuple) else [value]
            if any(isinstance(v, Dim) for v in values) or key in ("start", "starts", "ends", "pads", "sizes"):
                op.sizes[key] = values
            elif any(isinstance(v, float) for v in values):
                op.floats[key] = [float(v) for v in values]
            elif all(isinstance(v, str) for v in values) and values:
                op.note = " ".join(values)
            else:
                op.ints[key] = [int(v) for v in values]
        self.p.ops.append(op)

    def weight(self, parts: list[tuple[Weight, str]]) -> int:
        key = tuple((w.type, w.q, w.scale, w.min, w.transposed, w.selected, role) for w, role in parts)
        if key not in self.weight_of:
            first = parts[0][0]
            n = first.n if parts[0][1] == "all" else 2 * _round_up(first.n, LANES)
            self.p.weights.append(PackedWeight(first.type, n, first.k, parts))
            self.weight_of[key] = len(self.p.weights) - 1
        return self.weight_of[key]

    def constant_slot(self, hint: str, array: Array) -> int:
        return self.slot(self.g.add_constant(hint, array))

    # -- rows --------------------------------------------------------------------------------------------------------

    def quant_users(self, name: str) -> tuple[bool, bool]:
        """(some Linear wants `name` quantized, something wants it as floats)."""
        quant = floats = False
        for user in self.g.users.get(name, []):
            if user.op == "Linears" and name not in user.inputs[1:]:
                types = {part["weight"].type for part in user.attrs["parts"]}
                quant, floats = quant or types != {"f32"}, floats or "f32" in types
            else:
                floats = True
        return quant, floats or name in self.g.outputs

    def row_outputs(self, name: str) -> list[int]:
        """[float slot or -1, quantized slot or -1] for a value that a row operation makes, as its readers want it."""
        quant, floats = self.quant_users(name)
        info = self.g.info[name]
        slots = [self.new_slot(name, info) if floats or not quant else -1, -1]
        if quant:
            slots[1] = self.quant_slot(name)
        return slots

    def quant_slot(self, name: str) -> int:
        self.p.slots.append(Slot(f"q({name})", "quant", self.g.shape(name)))
        self.quant_of[name] = len(self.p.slots) - 1
        return self.quant_of[name]

    def op_norm(self, node: Node) -> None:
        x, w, b = node.inputs
        outputs = self.row_outputs(node.outputs[0])
        ints = {"layer": [int(node.attrs["kind"] == "layer")]}
        floats = {"eps": [float(node.attrs["eps"])]}
        ins = [self.slot(x), self.slot(w), self.slot(b)]
        self.p.ops.append(Op("norm", ins, outputs, ints, floats, note=node.attrs["kind"]))

    def op_linears(self, node: Node) -> None:
        x, parts = node.inputs[0], node.attrs["parts"]
        types = {part["weight"].type for part in parts}
        if types != {"f32"} and x not in self.quant_of:
            self.p.ops.append(Op("quantize", [self.slot(x)], [self.quant_slot(x)]))
        op = Op("linear", [self.quant_of.get(x, -1), self.slot(x) if "f32" in types else -1], [])
        notes = []
        for part, name, residual in zip(parts, node.outputs, node.inputs[1:], strict=True):
            w, gate = part["weight"], part["gate"]
            both = [(gate, "gate"), (w, "up")] if gate else [(w, "all")]
            op.weights.append(self.weight(both))
            op.inputs += [self.bias(part, w), self.slot(residual)]
            op.outputs += self.row_outputs(name)
            op.ints.setdefault("gated", []).append(int(gate is not None))
            op.ints.setdefault("columns", []).append(w.n)
            op.ints.setdefault("activation", []).append(ACTIVATIONS.index(part["fn"] or "identity"))
            op.floats.setdefault("factor", []).append(float(part["factor"]))
            note = f"{w.type}[{w.n}, {w.k}]"
            if gate:
                note += f" {part['fn']}(gate) * up"
            elif part["fn"]:
                note += f" {part['fn']}"
            notes.append(note + " + residual" * bool(residual))
        op.note = "; ".join(notes)
        self.p.ops.append(op)

    def bias(self, part: dict[str, Any], w: Weight) -> int:
        """The bias as the packed rows stand: for a gated product, panels of gate and up in turn."""

        def vector(name: str) -> Array:
            if not name:
                return np.zeros(w.n, np.float32)
            return self.g.constants[name].array().reshape(-1).astype(np.float32)

        if not part["bias"] and not part["gate_bias"]:
            return -1
        if part["gate"] is None:
            return self.constant_slot(part["bias"], vector(part["bias"]))
        panels = np.zeros((_round_up(w.n, LANES) // LANES, 2, LANES), np.float32)
        for side, name in enumerate((part["gate_bias"], part["bias"])):
            padded = np.zeros(panels.shape[0] * LANES, np.float32)
            padded[: w.n] = vector(name)
            panels[:, side] = padded.reshape(-1, LANES)
        return self.constant_slot("gated bias", panels.reshape(-1))

    def op_embed(self, node: Node) -> None:
        op = Op("embed", [self.slot(node.inputs[0])], [self.out(node)], floats={"scale": [node.attrs["scale"]]})
        w = node.attrs["weight"]
        op.weights = [self.weight([(w, "all")])]
        op.note = f"{w.type}[{w.n}, {w.k}]"
        self.p.ops.append(op)

    def op_attend(self, node: Node) -> None:
        a = node.attrs
        outputs = self.row_outputs(node.outputs[0])
        ints = {k: [int(a[k])] for k in ("heads", "kv_heads", "head_dim", "value_dim", "layer", "causal", "window")}
        ints["at_end"] = [int(a["at_end"])]
        ints |= {k: [int(a[k])] for k in ("rotary", "interleaved", "rotary_k", "interleaved_k")}
        ints["q_norm"], ints["k_norm"] = ([{"": 0, "rms": 1, "layer": 2}[a[k]]] for k in ("q_norm", "k_norm"))
        floats = {k: [float(a[k])] for k in ("scale", "softcap", "q_eps", "k_eps")}
        note = f"heads {a['heads']}/{a['kv_heads']} x {a['head_dim']}"
        note += f" rope {a['rotary']}" if a["rotary"] else ""
        note += " q/k norm" if a["q_norm"] else ""
        note += " causal" if a["causal"] else ""
        note += f" window {a['window']}" if a["window"] else ""
        note += f" softcap {a['softcap']:g}" if a["softcap"] else ""
        self.p.ops.append(Op("attend", [self.slot(i) for i in node.inputs], outputs, ints, floats, note=note))

    def op_rope(self, node: Node) -> None:
        a = node.attrs
        self.add("rope", node, node.inputs, rotary=a["rotary"], interleaved=int(a["interleaved"]))

    def op_keep(self, node: Node) -> None:
        self.add("keep", node, node.inputs)

    # -- everything else ---------------------------------------------------------------------------------------------

    def op_view(self, node: Node) -> None:
        source = self.slot(node.inputs[0])
        self.new_slot(node.outputs[0], self.g.info[node.outputs[0]], source)

    def op_unary(self, node: Node) -> bool | None:
        if node.attrs["fn"] not in ACTIVATIONS or (
            self.g.info[node.inputs[0]].dtype != "float32" and node.attrs["fn"] not in ("neg", "abs")
        ):
            return False
        self.add("unary", node, node.inputs, fn=ACTIVATIONS.index(node.attrs["fn"]), note=node.attrs["fn"])
        return None

    def elementwise(self, node: Node) -> None:
        if len(node.inputs) == 1:
            self.add("tile", node, node.inputs)
            return
        name = ELEMENTWISE[node.op]
        acc = node.inputs[0]
        for i, other in enumerate(node.inputs[1:]):  # Min and Max take any number of inputs
            last = i == len(node.inputs) - 2
            step = node if last else Node(node.op, [], [self.g.fresh(acc)])
            if not last:
                self.g.info[step.outputs[0]] = self.g.info[node.outputs[0]]
            self.add("binary", step, [acc, other], fn=list(ELEMENTWISE.values()).index(name), note=name)
            acc = step.outputs[0]

    def op_not(self, node: Node) -> None:
        self.add("not", node, node.inputs)

    def op_where(self, node: Node) -> None:
        self.add("where", node, node.inputs)

    def op_cast(self, node: Node) -> None:
        self.add("cast", node, node.inputs)

    def op_expand(self, node: Node) -> None:
        self.add("expand", node, node.inputs)

    def op_tile(self, node: Node) -> None:
        self.add("tile", node, node.inputs)

    def op_concat(self, node: Node) -> None:
        self.add("concat", node, node.inputs, axis=node.attrs["axis"] % len(self.g.shape(node.outputs[0])))

    def op_slice(self, node: Node) -> None:
        a = node.attrs
        self.add("slice", node, node.inputs, starts=a["starts"], ends=a["ends"], axes=a["axes"], steps=a["steps"])

    def op_transpose(self, node: Node) -> None:
        rank = len(self.g.shape(node.inputs[0]))
        self.add("transpose", node, node.inputs, perm=list(node.attrs.get("perm") or range(rank)[::-1]))

    def op_gather(self, node: Node) -> None:
        self.add("gather", node, node.inputs, axis=node.attrs.get("axis", 0) % len(self.g.shape(node.inputs[0])))

    def op_gatherelements(self, node: Node) -> None:
        axis = node.attrs.get("axis", 0) % len(self.g.shape(node.inputs[0]))
        self.add("gather_elements", node, node.inputs, axis=axis)

    def op_gathernd(self, node: Node) -> None:
        self.add("gather_nd", node, node.inputs, batch=node.attrs.get("batch_dims", 0))

    def op_reduce(self, node: Node) -> bool | None:
        kinds = ("mean", "sum", "max", "min", "prod", "l2", "sumsquare")
        fn = node.attrs["fn"]
        self.add("reduce", node, node.inputs, fn=kinds.index(fn), axes=node.attrs["axes"], note=fn)
        return None

    def op_argmax(self, node: Node) -> bool | None:
        if node.attrs.get("select_last_index", 0):
            return False
        self.add("argmax", node, node.inputs, axis=node.attrs.get("axis", 0) % len(self.g.shape(node.inputs[0])))
        return None

    def op_topk(self, node: Node) -> None:
        axis = node.attrs.get("axis", -1) % len(self.g.shape(node.inputs[0]))
        outputs = [self.new_slot(o or self.g.fresh("unused"), self.g.info[o]) for o in node.outputs if o]
        if len(outputs) == 1:  # one of the two is not wanted: it needs a place all the same
            missing = 0 if not node.outputs[0] else 1
            dtype = self.g.info[node.inputs[0]].dtype if missing == 0 else "int64"
            shape = self.p.slots[outputs[0]].shape
            outputs.insert(missing, self.new_slot(self.g.fresh("unused"), Info(dtype, shape)))
        ints = {"axis": [axis], "largest": [int(node.attrs.get("largest", 1))]}
        self.p.ops.append(Op("topk", [self.slot(node.inputs[0])], outputs, ints))

    def op_scatterelements(self, node: Node) -> bool | None:
        axis = node.attrs.get("axis", 0) % len(self.g.shape(node.inputs[0]))
        reductions = ("none", "add", "mul")
        if node.attrs.get("reduction", "none") not in reductions:
            return False
        self.add(
            "scatter_elements", node, node.inputs, axis=axis, fn=reductions.index(node.attrs.get("reduction", "none"))
        )
        return None

    def op_scatternd(self, node: Node) -> bool | None:
        if node.attrs.get("reduction", "none") != "none":
            return False
        self.add("scatter_nd", node, node.inputs)
        return None

    def op_history(self, node: Node) -> None:
        self.add("history", node, node.inputs, layer=node.attrs["layer"])

    def op_softmax(self, node: Node) -> None:
        axis = node.attrs.get("axis", -1) % len(self.g.shape(node.inputs[0]))
        self.add("softmax", node, node.inputs, axis=axis, log=0)

    def op_logsoftmax(self, node: Node) -> None:
        axis = node.attrs.get("axis", -1) % len(self.g.shape(node.inputs[0]))
        self.add("softmax", node, node.inputs, axis=axis, log=1)

    def op_matmul(self, node: Node) -> bool | None:
        if any(len(self.g.shape(i)) < 2 for i in node.inputs):
            return False
        self.add("matmul", node, node.inputs)
        return None

    def op_gemm(self, node: Node) -> None:
        a = node.attrs
        self.add(
            "gemm", node, node.inputs + [""] * (3 - len(node.inputs)), trans_a=int(a.get("transA", 0)),
            trans_b=int(a.get("transB", 0)), alpha=float(a.get("alpha", 1.0)), beta=float(a.get("beta", 1.0)),
        )  # fmt: skip

    def op_conv(self, node: Node) -> None:
        from edgeformer.native.infer import conv_geometry

        _, strides, dilations, pads = conv_geometry(self.g, node)
        inputs = node.inputs + [""] * (3 - len(node.inputs))
        op_pads = [int(v) for v in pads]
        self.add("conv", node, inputs, strides=strides, dilations=dilations, group=node.attrs.get("group", 1))
        self.p.ops[-1].ints["pads"] = op_pads

    def op_pad(self, node: Node) -> bool | None:
        a = node.attrs
        if a["mode"] != "constant" or a["value"] is None:
            return False
        self.add("pad", node, node.inputs, pads=a["pads"], axes=a["axes"], value=float(a["value"]))
        return None

    def op_trilu(self, node: Node) -> bool | None:
        k: Size = 0
        if node.input(1):
            found = self.g.info[node.input(1)].value
            if found is None:
                return False
            k = found[0]
        self.add("trilu", node, node.inputs[:1], start=k, upper=node.attrs.get("upper", 1))
        return None

    def op_cumsum(self, node: Node) -> bool | None:
        axis = self.g.info[node.inputs[1]].value
        if axis is None or not isinstance(axis[0], int):
            return False
        rank = len(self.g.shape(node.inputs[0]))
        flags = {k: node.attrs.get(k, 0) for k in ("exclusive", "reverse")}
        self.add("cumsum", node, node.inputs[:1], axis=axis[0] % rank, **flags)
        return None

    def op_clip(self, node: Node) -> bool | None:
        low, high = (self.g.scalar(i) if i else None for i in (node.input(1), node.input(2)))
        if (node.input(1) and low is None) or (node.input(2) and high is None):
            return False
        low, high = (-np.inf if low is None else low), (np.inf if high is None else high)
        self.add("clip", node, node.inputs[:1], bounds=[float(low), float(high)])
        return None

    def op_range(self, node: Node) -> bool | None:
        if node.inputs:
            return False
        self.add("range", node, [], start=node.attrs["start"], step=int(node.attrs["step"]))
        return None

    def op_fill(self, node: Node) -> None:
        self.add("fill", node, [], value=float(node.attrs["value"]))

    def op_sizes(self, node: Node) -> None:
        self.add("sizes", node, [], sizes=list(node.attrs["sizes"]))


# csrc/kernels/kernels.h: enum class Unary, in its order.
ACTIVATIONS = (
    "identity",
    "exp",
    "sigmoid",
    "tanh",
    "erf",
    "sqrt",
    "sin",
    "cos",
    "log",
    "softplus",
    "relu",
    "relu2",
    "silu",
    "gelu",
    "gelu_tanh",
    "quick_gelu",
    "neg",
    "abs",
    "reciprocal",
    "rsqrt",
)


def _round_up(x: int, to: int) -> int:
    return -(-x // to) * to


def _row_symbols(g: Graph) -> tuple[str, str]:
    """Names of the axes [batch, sequence] that token ids, else any input, begin with; ("", "") without one."""
    for info in sorted(g.inputs.values(), key=lambda i: (i.dtype != "int64", len(i.shape))):
        lead, rest = info.shape[:2], info.shape[2:]
        if len(lead) == 2 and all(isinstance(d, Dim) for d in lead) and all(isinstance(d, int) for d in rest):
            return str(lead[0]), str(lead[1])
    return "", ""


def postfix(size: Size, symbols: list[str]) -> list[int]:
    """A size as a program for C++: pairs (code, number); codes 0 number, 1 symbol, then + * div min max clip."""
    codes = {"div": 4, "min": 5, "max": 6, "clip": 7}
    if isinstance(size, int):
        return [0, size]

    def atom(a: Atom) -> list[int]:
        if a.op == "sym":
            return [1, symbols.index(a.key)]
        return [x for arg in a.args for x in postfix(arg, symbols)] + [codes[a.op], 0]  # type: ignore[arg-type]

    out: list[int] = []
    for i, (monomial, c) in enumerate(size.terms):
        factors = [atom(a) for a in monomial]
        if c != 1 or not factors:
            factors.insert(0, [0, c])
        for j, f in enumerate(factors):
            out += [*f, 3, 0] if j else f
        out += [2, 0] if i else []
    return out


def describe(program: Program, sample: dict[str, int] | None = None) -> str:
    """The program as text: one line an operation, with its shapes; then weights, caches and inputs."""
    del sample
    slots = program.slots

    def show(i: int) -> str:
        return f"{slots[i].name}:{slots[i].dtype}[{', '.join(map(str, slots[i].shape))}]" if i >= 0 else ""

    lines = [
        f"program: {len(program.ops)} operations, {len(program.weights)} weights, {len(program.caches)} caches, "
        + ("states run together" if program.row_local else "states run one by one")
    ]
    lines += [f"input  {show(i)}" for i in program.inputs.values()]
    for number, op in enumerate(program.ops):
        outs = " ".join(show(i) for i in op.outputs if i >= 0)
        ins = " ".join(slots[i].name for i in op.inputs if i >= 0)
        cache = op.ints["layer"][0] if op.kind == "attend" else -1
        detail = op.note + (f" cache {cache}" if cache >= 0 else "")
        note = f"  ({detail})" if detail else ""
        lines.append(f"{number:4d}  {op.kind:<9} {ins} -> {outs}{note}")
    lines += [f"output {show(i)}" for i in program.outputs.values()]
    return "\n".join(lines)


def size_at(size: Size, **symbols: int) -> int:
    """A size for given symbols, for predictions of memory."""
    return evaluate(size, symbols)


__all__ = ["Op", "Program", "Slot", "build", "describe", "lower_bundle", "postfix", "size_at", "symbol"]
