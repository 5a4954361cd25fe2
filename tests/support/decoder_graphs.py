"""Graphs as exporters write them, built node by node: quantized linears, a decoder layer, rotations and masks."""

from __future__ import annotations

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from edgeformer.engines.native.ir.dims import INT64_MAX
from edgeformer.engines.native.ir.graph import graph_of
from edgeformer.engines.native.program.lowering import build

RNG = np.random.default_rng(0)


class Builder:
    """Collects nodes; calling an operator's name adds a node and returns its output."""

    def __init__(self):
        self.nodes, self.constants, self.count = [], [], 0

    def __call__(self, op, *inputs, outputs=1, **attrs):
        self.count += 1
        names = [f"{op}_{self.count}_{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(op, [self.value(i) for i in inputs], names, **attrs))
        return names[0] if outputs == 1 else names

    def value(self, x):
        if isinstance(x, str):
            return x
        self.count += 1
        array = np.asarray(x, np.float32) if isinstance(x, float) else np.asarray(x)
        self.constants.append(numpy_helper.from_array(array, f"c{self.count}"))
        return f"c{self.count}"

    def int4(self, q):
        self.count += 1
        u = (q.astype(np.uint8) & 15).reshape(-1)
        packed = (u[0::2] | (u[1::2] << 4)).astype(np.uint8)
        self.constants.append(
            helper.make_tensor(f"c{self.count}", TensorProto.INT4, q.shape, packed.tobytes(), raw=True)
        )
        return f"c{self.count}"

    def model(self, inputs, outputs):
        infos = [helper.make_tensor_value_info(n, t, s) for n, (t, s) in inputs.items()]
        outs = [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in outputs]
        graph = helper.make_graph(self.nodes, "test", infos, outs, self.constants)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)


F, I64 = TensorProto.FLOAT, TensorProto.INT64
ROWS = {"x": (F, ["batch", "sequence", 64])}


def program(g, inputs, *outputs):
    return build(graph_of(g.model(inputs, outputs)))


def kinds(p):
    return [op.kind for op in p.ops]


def fp16(x):
    return np.asarray(x, np.float16).astype(np.float32)


def quantized(g, x, scheme, n=48, k=64, block=32):
    """x @ W.T in the bundle's pattern for the scheme; random integers, scales that float16 holds exactly."""
    blocks = -(-k // block)
    s = fp16(RNG.uniform(0.01, 0.1, (n, blocks)))
    q = RNG.integers(-7, 8, (n, k)).astype(np.int8)
    stored = g.int4(q) if scheme in ("q4", "q4a") else g.value(q)
    w = g(
        "DequantizeLinear",
        g("Transpose", stored, perm=[1, 0]),
        g("Transpose", s, perm=[1, 0]),
        axis=0,
        block_size=block,
    )
    y = g("MatMul", x, w)
    if scheme != "q4a":
        return y
    m = fp16(RNG.uniform(-0.5, 0.0, (n, blocks))) + 8 * s
    sums = g("ReduceSum", g("Reshape", x, np.array([0, 0, blocks, block])), np.array([-1]), keepdims=0)
    return g("Add", y, g("MatMul", sums, g("Transpose", m, perm=[1, 0])))


LM = {
    "x": (F, ["batch", "sequence", 64]),
    "cos": (F, ["batch", "sequence", 8]),
    "sin": (F, ["batch", "sequence", 8]),
    "pk": (F, ["batch", 2, "past", 16]),
    "pv": (F, ["batch", 2, "past", 16]),
}


def heads(g, x, n):
    return g("Transpose", g("Reshape", x, np.array([0, 0, n, 16])), perm=[0, 2, 1, 3])


def decoder_layer(g, mask="", rotate=lambda g, x: g("RotaryEmbedding", x, "cos", "sin"), norm=False, **attrs):
    def linear(x, n, k=64):
        return quantized(g, x, "q4a", n=n, k=k)

    def part(n):
        rows = g("Reshape", linear(normed, n * 16), np.array([0, 0, n, 16]))
        if norm:
            rows = g("RMSNormalization", rows, np.ones(16, np.float32), epsilon=1e-6)
        return rotate(g, g("Transpose", rows, perm=[0, 2, 1, 3]))

    normed = g("RMSNormalization", "x", np.ones(64, np.float32), epsilon=1e-6)
    q, k, v = part(4), part(2), heads(g, linear(normed, 32), 2)
    y, key, value = g("Attention", q, k, v, mask, "pk", "pv", outputs=3, is_causal=1, **attrs)
    o = linear(g("Reshape", g("Transpose", y, perm=[0, 2, 1, 3]), np.array([0, 0, 64])), 64)
    h = g("Add", "x", o)
    normed2 = g("RMSNormalization", h, np.ones(64, np.float32), epsilon=1e-6)
    gate, up = linear(normed2, 96), linear(normed2, 96)
    down = linear(g("Mul", g("Mul", gate, g("Sigmoid", gate)), up), 64, 96)
    return g("Add", h, down), key, value


def partial(g, x):
    end = np.array([INT64_MAX])
    head = g("Slice", x, np.array([0]), np.array([8]), np.array([3]))
    rest = g("Slice", x, np.array([8]), end, np.array([3]))
    cos, sin = (g("Slice", t, np.array([0]), np.array([4]), np.array([2])) for t in ("cos", "sin"))
    return g("Concat", g("RotaryEmbedding", head, cos, sin), rest, axis=-1)


def window_mask(g, window=5, swap=False, op="Less"):
    """(query - key) < window as the exporter writes it; `swap`: (key - query) < window, which means something else."""
    past = g("Squeeze", g("Shape", "pk", start=2, end=3), np.array([0]))
    total = g("Add", past, g("Squeeze", g("Shape", "x", start=1, end=2), np.array([0])))
    q, k = g("Range", past, total, np.array(1)), g("Range", np.array(0), total, np.array(1))
    q, k = g("Unsqueeze", q, np.array([1])), g("Unsqueeze", k, np.array([0]))
    return g(op, g("Sub", k, q) if swap else g("Sub", q, k), np.array(window))


def decomposed_attention(g, q, k, v, mask=None, divide=4.0):
    scores = g("Div", g("MatMul", q, g("Transpose", k, perm=[0, 1, 3, 2])), divide)
    return g("MatMul", g("Softmax", g("Add", scores, mask) if mask else scores, axis=-1), v)


def table(g, interleaved):
    """Cosines and sines of angles [batch, sequence, 8], each number twice, as [batch, 1, sequence, 16]."""
    if interleaved:
        wide = g("Expand", g("Unsqueeze", "angle", np.array([3])), np.array([1, 1, 1, 2]))
        twice = g("Reshape", wide, np.array([0, 0, 16]))
    else:
        twice = g("Concat", "angle", "angle", axis=-1)
    return [g("Unsqueeze", g(f, twice), np.array([1])) for f in ("Cos", "Sin")]


def cut(g, x, start, stop, step=1):
    return g("Slice", x, np.array([start]), np.array([stop]), np.array([3]), np.array([step]))


def quarter_rotation(g, x, interleaved, wrong=False):
    """x rotated by 90 degrees in each plane; `wrong`: the other way."""
    if not interleaved:
        first, second = cut(g, x, 0, 8), cut(g, x, 8, 16)
        return g("Concat", first, g("Neg", second), axis=-1) if wrong else g("Concat", g("Neg", second), first, axis=-1)
    even, odd = cut(g, x, 0, 16, 2), cut(g, x, 1, 16, 2)
    pairs = [g("Unsqueeze", g("Neg", odd), np.array([4])), g("Unsqueeze", even, np.array([4]))]
    heads = [d.input[0] for d in g.nodes if d.output[0] == x]
    stacked = g("Concat", *(pairs[::-1] if wrong else pairs), axis=-1)
    return g("Reshape", stacked, g("Shape", x)) if heads else stacked
