"""From a graph to its program: the operations on rows (norms, Linears, attention), and the whole."""

from __future__ import annotations

import traceback
from pathlib import Path

import numpy as np

from edgeformer.bundle.signature import Array
from edgeformer.engines.native.ir.cache import Cache
from edgeformer.engines.native.ir.graph import Graph, Node, read_graph
from edgeformer.engines.native.ir.ops import AttendSpec, LinearSpec
from edgeformer.engines.native.ir.weight import Weight
from edgeformer.engines.native.passes import lower, unsupported_nodes
from edgeformer.engines.native.passes.wide import SPANS, weights_of
from edgeformer.engines.native.program.emit import ELEMENTWISE, Emitter, round_up
from edgeformer.engines.native.program.program import LANES, Op, Program, Slot
from edgeformer.errors import EdgeformerError, EngineUnavailable

PAST = "past_key_values."  # inputs that are the KV cache of a state
ENCODER = ".encoder."  # in such a name: made by the encoder, a plain input that never grows


def lower_bundle(path: Path) -> tuple[Program, Graph]:
    """The program of the graph file `path`.

    Raises:
        BundleError: the file cannot be read.
        EngineUnavailable: some nodes cannot be lowered; the message names all of them.
    """
    try:
        graph = read_graph(path)
        return build(graph), graph
    except (EdgeformerError, MemoryError):
        raise
    except Exception as error:
        # Passes expect what exporters write; a damaged graph that is still valid ONNX may break any such expectation.
        frames = traceback.extract_tb(error.__traceback__)
        place = next((f for f in reversed(frames) if "native" in Path(f.filename).parts), frames[-1])
        raise EngineUnavailable(
            f"the native engine cannot lower the graph {path}: {type(error).__name__} in {Path(place.filename).stem}."
            f"{place.name}: {error}. The graph is damaged or of an unknown form; engine='cpu' may run it"
        ) from error


def build(g: Graph) -> Program:
    """Lower a graph and turn it into a program. The graph is changed."""
    return emit_program(g, lower(g))


def emit_program(g: Graph, caches: list[Cache]) -> Program:
    """The program of a graph that `lower` has rewritten."""
    return _Lowering(g, caches).build()


class _Lowering(Emitter):
    def build(self) -> Program:
        g, p = self.g, self.p
        for name, info in g.inputs.items():
            p.inputs[name] = self.new_slot(name, info)
        unsupported = [
            Node("a KV-cache input with an unsupported consumer", [], [name])
            for name in g.inputs
            if name.startswith(PAST) and ENCODER not in name
        ]
        for node in g.nodes:
            emit = getattr(self, f"_op_{node.op.lower()}", None)
            if node.op in ELEMENTWISE:
                self.elementwise(node)
            elif emit is None or emit(node) is False:
                unsupported.append(node)
                self.slot_of |= dict.fromkeys(node.outputs, -1)  # its consumers are checked too: the error names all
        if unsupported:
            raise unsupported_nodes(unsupported)
        p.outputs = {name: self.slot(name) for name in g.outputs}
        return p

    def quant_users(self, name: str) -> tuple[bool, bool]:
        """(a Linear reads `name` quantized, something reads it as floats)."""
        quant = floats = False
        for user in self.g.users.get(name, []):
            if user.op == "Linears" and name not in user.inputs[1:]:
                types = {part.weight.type for part in user.attrs["parts"]}
                quant, floats = quant or types != {"f32"}, floats or "f32" in types
            else:
                floats = True
        return quant, floats or name in self.g.outputs

    def row_outputs(self, name: str) -> list[int]:
        """[float slot or -1, quantized slot or -1] of a row operation's result: those that its consumers read."""
        quant, floats = self.quant_users(name)
        info = self.g.info[name]
        slots = [self.new_slot(name, info) if floats or not quant else -1, -1]
        if quant:
            slots[1] = self.quant_slot(name)
        return slots

    def quant_slot(self, name: str) -> int:
        spans = {
            SPANS.get(weight.type)
            for user in self.g.users.get(name, [])
            if user.op == "Linears" and user.inputs[0] == name
            for weight in weights_of(user)
            if weight.type != "f32"
        }
        (span,) = spans  # wide.wide_blocks makes them equal
        self.p.slots.append(Slot(f"q({name})", f"quant{span or ''}", self.g.shape(name)))
        self.quant_of[name] = len(self.p.slots) - 1
        return self.quant_of[name]

    def _op_norm(self, node: Node) -> None:
        x, w, b = node.inputs
        outputs = self.row_outputs(node.outputs[0])
        kind, floats = node.attrs["kind"], {"eps": [float(node.attrs["eps"])]}
        ins = [self.slot(x), self.slot(w), self.slot(b)]
        self.p.ops.append(Op("norm", ins, outputs, floats=floats, names={"kind": [kind]}, note=kind))

    def _op_linears(self, node: Node) -> None:
        x, parts = node.inputs[0], node.attrs["parts"]
        types = {part.weight.type for part in parts}
        if types != {"f32"} and x not in self.quant_of:
            self.p.ops.append(Op("quantize", [self.slot(x)], [self.quant_slot(x)]))
        op = Op("linear", [self.quant_of.get(x, -1), self.slot(x) if "f32" in types else -1], [])
        notes = []
        for part, name, residual in zip(parts, node.outputs, node.inputs[1:], strict=True):
            w, gate = part.weight, part.gate
            both = [(gate, "gate"), (w, "up")] if gate else [(w, "all")]
            op.weights.append(self.weight(both))
            op.inputs += [self.bias(part, w), self.slot(residual)]
            op.outputs += self.row_outputs(name)
            op.ints.setdefault("gated", []).append(int(gate is not None))
            op.ints.setdefault("columns", []).append(w.n)
            op.names.setdefault("activation", []).append(part.fn or "identity")
            op.floats.setdefault("factor", []).append(float(part.factor))
            note = f"{w.type}[{w.n}, {w.k}]"
            if gate:
                note += f" {part.fn}(gate) * up"
            elif part.fn:
                note += f" {part.fn}"
            notes.append(note + " + residual" * bool(residual))
        op.note = "; ".join(notes)
        self.p.ops.append(op)

    def bias(self, part: LinearSpec, w: Weight) -> int:
        """The slot of the bias in the order of the packed rows: of a gated product, panels of gate and up alternate."""

        def vector(name: str) -> Array:
            if not name:
                return np.zeros(w.n, np.float32)
            return self.g.constants[name].array().reshape(-1).astype(np.float32)

        if not part.bias and not part.gate_bias:
            return -1
        if part.gate is None:
            return self.constant_slot(part.bias, vector(part.bias))
        panels = np.zeros((round_up(w.n, LANES) // LANES, 2, LANES), np.float32)
        for side, name in enumerate((part.gate_bias, part.bias)):
            padded = np.zeros(panels.shape[0] * LANES, np.float32)
            padded[: w.n] = vector(name)
            panels[:, side] = padded.reshape(-1, LANES)
        return self.constant_slot("gated bias", panels.reshape(-1))

    def _op_embed(self, node: Node) -> None:
        op = Op("embed", [self.slot(node.inputs[0])], [self.out(node)], floats={"scale": [node.attrs["scale"]]})
        w = node.attrs["weight"]
        op.weights = [self.weight([(w, "all")])]
        op.note = f"{w.type}[{w.n}, {w.k}]"
        self.p.ops.append(op)

    def _op_attend(self, node: Node) -> None:
        a: AttendSpec = node.attrs["attend"]
        outputs = self.row_outputs(node.outputs[0])
        ints = {k: [int(getattr(a, k))] for k in ("heads", "kv_heads", "head_dim", "value_dim", "layer", "causal")}
        ints |= {"window": [a.window], "at_end": [int(a.at_end)]}
        ints["integers"] = [int(self.attends_in_integers(node))]
        ints |= {"rotary": [a.q.rotary], "interleaved": [int(a.q.interleaved)]}
        ints |= {"rotary_k": [a.k.rotary], "interleaved_k": [int(a.k.interleaved)]}
        names = {"q_norm": [a.q.norm], "k_norm": [a.k.norm]}
        floats = {"scale": [a.scale], "softcap": [a.softcap], "q_eps": [float(a.q.eps)], "k_eps": [float(a.k.eps)]}
        note = f"heads {a.heads}/{a.kv_heads} x {a.head_dim}"
        note += f" rope {a.q.rotary}" if a.q.rotary else ""
        note += " q/k norm" if a.q.norm else ""
        note += " causal" if a.causal else ""
        note += f" window {a.window}" if a.window else ""
        note += f" softcap {a.softcap:g}" if a.softcap else ""
        note += " int8" if ints["integers"][0] else ""
        self.p.ops.append(Op("attend", [self.slot(i) for i in node.inputs], outputs, ints, floats, names, note=note))

    def attends_in_integers(self, node: Node) -> bool:
        """Whether keys and values without a cache are int8 (unless kv="float32"), as those of a cache are.

        True for self-attention whose queries, keys and values come from quantized weights. Not for cross-attention:
        each decode step would pack the source again, which takes longer than the products save.
        """
        q, k, v = node.inputs[:3]
        if node.attrs["attend"].layer >= 0 or self.g.shape(q)[1] != self.g.shape(k)[1]:
            return False
        for name in (q, k, v):
            made = self.g.producers.get(name)
            while made is not None and made.op == "View":
                made = self.g.producers.get(made.inputs[0])
            if made is None or made.op != "Linears" or any(p.weight.type == "f32" for p in made.attrs["parts"]):
                return False
        return True

    def _op_rope(self, node: Node) -> None:
        a = node.attrs
        self.add("rope", node, node.inputs, rotary=a["rotary"], interleaved=int(a["interleaved"]))

    def _op_keep(self, node: Node) -> None:
        self.add("keep", node, node.inputs)
