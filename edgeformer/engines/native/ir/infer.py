"""Types, shapes and, for sizes, values of everything in a graph, in one walk (`infer`).

The rules of operators that compute are here, those of operators that only move data in `shape_rules`.
"""

from __future__ import annotations

from collections.abc import Callable

from edgeformer.engines.native.ir.dims import Shape, Size, evaluate, floor_div, function, product
from edgeformer.engines.native.ir.functions import POINTWISE_OPS, UNARY_OPS
from edgeformer.engines.native.ir.graph import COMPUTE_DTYPES, ONNX_DTYPES, Graph, Info, Node
from edgeformer.engines.native.ir.shape_rules import SHAPE_RULES, broadcast, ints, shape_rule, values
from edgeformer.errors import EngineUnavailable


def infer(g: Graph) -> list[Node]:
    """Fill `g.info` for the outputs of every node; returns the nodes whose operator or shapes are unsupported.

    Outputs of such a node have no entry, and the nodes that read them are skipped, not reported.
    """
    unsupported = []
    for node in g.nodes:
        if all(o in g.info for o in node.outputs if o):
            continue
        if any(i and i not in g.info for i in node.inputs):
            continue
        try:
            infos = SHAPE_RULES[node.op](g, node)
        except (KeyError, EngineUnavailable, IndexError, TypeError, ValueError, ZeroDivisionError):
            unsupported.append(node)
            continue
        for name, info in zip(node.outputs, infos, strict=False):
            if name:
                g.info[name] = info
    return unsupported


def _elementwise(g: Graph, node: Node, dtype: str | None = None) -> Info:
    infos = [g.info[i] for i in node.inputs if i]
    return Info(dtype or infos[0].dtype, broadcast(*(i.shape for i in infos)))


def _pairs(g: Graph, node: Node) -> list[tuple[Size, ...]] | None:
    """The inputs' elements, concatenated, when all are known sizes of rank <= 1."""
    found = [g.info[i].value for i in node.inputs]
    if any(v is None for v in found):
        return None
    n = max(len(v) for v in found if v is not None)
    return list(zip(*(v * n if len(v) == 1 else v for v in found if v is not None), strict=False))


@shape_rule("Add", "Sub", "Mul", "Div", "Mod", "Min", "Max")
def _arithmetic(g: Graph, node: Node) -> list[Info]:
    out = _elementwise(g, node)
    pairs = _pairs(g, node) if out.dtype == "int64" and len(node.inputs) == 2 else None
    if pairs is not None and not node.attrs.get("fmod"):
        f: dict[str, Callable[[Size, Size], Size]] = {
            "Add": lambda a, b: a + b,
            "Sub": lambda a, b: a - b,
            "Mul": lambda a, b: a * b,
            "Div": floor_div,
            "Mod": lambda a, b: a - b * floor_div(a, b),
            "Min": lambda a, b: a if a == b else function("min", a, b),
            "Max": lambda a, b: a if a == b else function("max", a, b),
        }
        out.value = tuple(f[node.op](a, b) for a, b in pairs)
    return [out]


@shape_rule("Pow", "PRelu")
def _like_both(g: Graph, node: Node) -> list[Info]:
    return [_elementwise(g, node)]


@shape_rule("Neg", "Abs", "Sign")
def _negative(g: Graph, node: Node) -> list[Info]:
    info = g.info[node.inputs[0]]
    value = tuple(-v for v in info.value) if info.value is not None and node.op == "Neg" else None
    return [Info(info.dtype, info.shape, value)]


LIKE_FIRST = (
    *UNARY_OPS, *POINTWISE_OPS, "Gelu", "Clip", "Softmax", "LogSoftmax", "Trilu", "CumSum", "Identity", "Dropout",
)  # fmt: skip
OTHER_RULES = ("Neg", "Abs", "Sign", "IsNaN", "IsInf")


@shape_rule(*(op for op in LIKE_FIRST if op not in OTHER_RULES))
def _like_first(g: Graph, node: Node) -> list[Info]:
    info = g.info[node.inputs[0]]
    return [Info(info.dtype, info.shape, info.value if node.op == "Identity" else None)] * 2


@shape_rule("Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual", "And", "Or", "Xor", "Not", "IsNaN", "IsInf")
def _logical(g: Graph, node: Node) -> list[Info]:
    out = _elementwise(g, node, "bool")
    pairs = _pairs(g, node) if node.op == "Equal" else None
    if pairs is not None and all(a == b or _sizes_differ(a, b) for a, b in pairs):
        out.value = tuple(int(a == b) for a, b in pairs)
    return [out]


def _sizes_differ(a: Size, b: Size) -> bool:
    """A size of an input is never -1, the marker that Expand and Reshape chains compare with."""
    return -1 in (a, b) or (isinstance(a, int) and isinstance(b, int))


@shape_rule("Where")
def _where(g: Graph, node: Node) -> list[Info]:
    cond, a, b = (g.info[i] for i in node.inputs)
    value = None
    if cond.value is not None and a.value is not None and b.value is not None:
        n = max(len(cond.value), len(a.value), len(b.value))
        c, x, y = (v * n if len(v) == 1 else v for v in (cond.value, a.value, b.value))
        value = tuple(x[i] if c[i] else y[i] for i in range(n))
    return [Info(a.dtype, broadcast(cond.shape, a.shape, b.shape), value)]


@shape_rule("Cast")
def _cast(g: Graph, node: Node) -> list[Info]:
    info = g.info[node.inputs[0]]
    dtype = ONNX_DTYPES[node.attrs["to"]]
    dtype = COMPUTE_DTYPES.get(dtype, dtype)
    return [Info(dtype, info.shape, info.value if dtype == "int64" else None)]


@shape_rule("CastLike")
def _cast_like(g: Graph, node: Node) -> list[Info]:
    return [Info(g.info[node.inputs[1]].dtype, g.shape(node.inputs[0]))]


@shape_rule(
    "ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceL1", "ReduceL2", "ReduceSumSquare",
    "ArgMax", "ArgMin",
)  # fmt: skip
def _reduce(g: Graph, node: Node) -> list[Info]:
    info = g.info[node.inputs[0]]
    rank = len(info.shape)
    axes = reduce_axes(g, node)
    keep = node.attrs.get("keepdims", 1)
    shape = tuple(1 if i in axes else d for i, d in enumerate(info.shape) if keep or i not in axes)
    value = None
    if info.value is not None and rank == 1 and node.op == "ReduceProd":
        value = (product(info.value),)
    return [Info("int64" if node.op in ("ArgMax", "ArgMin") else info.dtype, shape, value)]


def reduce_axes(g: Graph, node: Node) -> tuple[int, ...]:
    """The non-negative axes that a Reduce*, ArgMax or ArgMin node reduces."""
    rank = len(g.shape(node.inputs[0]))
    if node.op in ("ArgMax", "ArgMin"):
        return (node.attrs.get("axis", 0) % rank,)
    axes = ints(g, node, 1, "axes")
    if not axes:
        return () if node.attrs.get("noop_with_empty_axes", 0) else tuple(range(rank))
    return tuple(a % rank for a in axes)


@shape_rule("TopK")
def _top_k(g: Graph, node: Node) -> list[Info]:
    info = g.info[node.inputs[0]]
    axis = node.attrs.get("axis", -1) % len(info.shape)
    (count,) = values(g, node.inputs[1])
    shape = (*info.shape[:axis], count, *info.shape[axis + 1 :])
    return [Info(info.dtype, shape), Info("int64", shape)]


@shape_rule("ScatterElements", "ScatterND")
def _scatter(g: Graph, node: Node) -> list[Info]:
    info = g.info[node.inputs[0]]
    return [Info(info.dtype, info.shape)]


@shape_rule("MatMul")
def _matmul(g: Graph, node: Node) -> list[Info]:
    a, b = g.shape(node.inputs[0]), g.shape(node.inputs[1])
    a2, b2 = (a if len(a) > 1 else (1, *a)), (b if len(b) > 1 else (*b, 1))
    shape = broadcast(a2[:-2], b2[:-2]) if len(a2) > 2 or len(b2) > 2 else ()
    shape += (a2[-2],) * (len(a) > 1) + (b2[-1],) * (len(b) > 1)
    return [Info("float32", shape)]


@shape_rule("Gemm")
def _gemm(g: Graph, node: Node) -> list[Info]:
    a, b = g.shape(node.inputs[0]), g.shape(node.inputs[1])
    rows = a[1] if node.attrs.get("transA") else a[0]
    return [Info("float32", (rows, b[0] if node.attrs.get("transB") else b[1]))]


@shape_rule("DequantizeLinear")
def _dequantize(g: Graph, node: Node) -> list[Info]:
    return [Info("float32", g.shape(node.inputs[0]))]


@shape_rule("RMSNormalization", "LayerNormalization", "GroupNormalization", "InstanceNormalization", "RotaryEmbedding")
def _norm(g: Graph, node: Node) -> list[Info]:
    info = g.info[node.inputs[0]]
    if len(node.outputs) == 1:
        return [info]
    axis = node.attrs.get("axis", -1) % len(info.shape)  # mean and inverse deviation come too
    return [info] + [Info("float32", tuple(1 if i >= axis else d for i, d in enumerate(info.shape)))] * 2


@shape_rule("Attention")
def _attention(g: Graph, node: Node) -> list[Info]:
    q, k, v = (g.shape(i) for i in node.inputs[:3])
    if len(q) == 3:
        heads, kv = node.attrs["q_num_heads"], node.attrs["kv_num_heads"]
        v_dim, k_dim = floor_div(v[2], kv), floor_div(k[2], kv)
        out: Shape = (q[0], q[1], v_dim * heads)
        k4: Shape = (k[0], kv, k[1], k_dim)
        v4: Shape = (v[0], kv, v[1], v_dim)
    else:
        out = (*q[:3], v[3])
        k4, v4 = k, v
    infos = [Info("float32", out)]
    if node.input(4):
        past = g.shape(node.input(4))[2]
        infos += [Info("float32", (*s[:2], s[2] + past, s[3])) for s in (k4, v4)]
    return infos


@shape_rule("Conv")
def _conv(g: Graph, node: Node) -> list[Info]:
    x, w = g.shape(node.inputs[0]), g.shape(node.inputs[1])
    if len(x) < 3 or len(x) != len(w):
        raise EngineUnavailable(f"Conv of {len(x)} axes with weights of {len(w)}")
    kernel, stride, dilation, pads = conv_geometry(g, node)
    out: list[Size] = [x[0], w[0]]
    for i, k in enumerate(kernel):
        reach = dilation[i] * (k - 1) + 1
        out.append(floor_div(x[2 + i] + (pads[i] + pads[i + len(kernel)] - reach), stride[i]) + 1)
    return [Info("float32", tuple(out))]


def conv_geometry(g: Graph, node: Node) -> tuple[list[int], list[int], list[int], list[int]]:
    """Kernel sizes, strides, dilations and pads (all begins, then all ends) of a Conv."""
    kernel = [evaluate(d, {}) for d in g.shape(node.inputs[1])[2:]]
    n = len(kernel)
    if node.attrs.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        raise EngineUnavailable(f"Conv with auto_pad={node.attrs['auto_pad']}")
    a = node.attrs
    return kernel, a.get("strides") or [1] * n, a.get("dilations") or [1] * n, a.get("pads") or [0] * 2 * n
