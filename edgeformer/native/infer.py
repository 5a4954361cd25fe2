"""Types, shapes and, for sizes, values of everything in a graph, in one walk (`infer`).

Integer tensors of rank 0 and 1 carry their elements as sizes, so Shape -> Gather -> Concat -> Reshape chains end as
the shapes they compute and the chain's nodes can go. Operators follow the ONNX operator specification.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from edgeformer.errors import EngineUnavailable
from edgeformer.native.dims import Shape, Size, clip, evaluate, floor_div, function, product
from edgeformer.native.graph import DTYPES, INSIDE, Graph, Info, Node

Rule = Callable[[Graph, Node], list[Info]]
RULES: dict[str, Rule] = {}
KEEP_VALUES = 64  # an integer tensor longer than this is data, not a shape


def rule(*ops: str) -> Callable[[Rule], Rule]:
    """Register the shape rule of some operators."""

    def register(f: Rule) -> Rule:
        RULES.update(dict.fromkeys(ops, f))
        return f

    return register


def infer(g: Graph) -> list[Node]:
    """Fill `g.info` for the outputs of every node; returns the nodes whose operator or shapes are beyond us.

    Values behind such a node have no entry, and the nodes that read them are skipped, not reported.
    """
    unsupported = []
    for node in g.nodes:
        if all(o in g.info for o in node.outputs if o):
            continue
        if any(i and i not in g.info for i in node.inputs):
            continue
        try:
            infos = RULES[node.op](g, node)
        except (KeyError, EngineUnavailable, IndexError, TypeError, ValueError):
            unsupported.append(node)
            continue
        for name, info in zip(node.outputs, infos, strict=False):
            if name:
                g.info[name] = info
    return unsupported


def values(g: Graph, name: str) -> tuple[Size, ...]:
    """The elements of an integer tensor that must be known as sizes; EngineUnavailable when they are not."""
    info = g.info[name]
    if info.value is None:
        raise EngineUnavailable(f"{name} is needed as a shape but is only known at run time")
    return info.value


def ints(g: Graph, node: Node, i: int, attr: str) -> tuple[int, ...] | None:
    """Constant integers that stand in input `i` (newer operator sets) or in an attribute; None when absent."""
    if node.input(i):
        found = values(g, node.input(i))
        if not all(isinstance(v, int) for v in found):
            raise EngineUnavailable(f"{node.op}: {attr} must be constant")
        return found  # type: ignore[return-value]
    return tuple(node.attrs[attr]) if attr in node.attrs else None


def broadcast(*shapes: Shape) -> Shape:
    """The shape of an elementwise result. Two different symbolic sizes are taken as equal if neither is 1."""
    rank = max(map(len, shapes))
    out: list[Size] = []
    for axis in range(rank):
        size: Size = 1
        for s in shapes:
            d = s[axis - rank + len(s)] if axis >= rank - len(s) else 1
            if size == 1 or (isinstance(d, int) and d != 1):
                size = d if d != 1 or size == 1 else size
        out.append(size)
    return tuple(out)


def _elementwise(g: Graph, node: Node, dtype: str | None = None) -> Info:
    infos = [g.info[i] for i in node.inputs if i]
    return Info(dtype or infos[0].dtype, broadcast(*(i.shape for i in infos)))


def _pairs(g: Graph, node: Node) -> list[tuple[Size, ...]] | None:
    """The inputs' elements side by side when all are known sizes of rank <= 1."""
    found = [g.info[i].value for i in node.inputs]
    if any(v is None for v in found):
        return None
    n = max(len(v) for v in found if v is not None)
    return list(zip(*(v * n if len(v) == 1 else v for v in found if v is not None), strict=False))


@rule("Add", "Sub", "Mul", "Div", "Mod", "Min", "Max")
def _arithmetic(g: Graph, node: Node) -> list[Info]:
    out = _elementwise(g, node)
    pairs = _pairs(g, node) if out.dtype == "int64" and len(node.inputs) == 2 else None
    if pairs is not None and node.op != "Mod":
        f: dict[str, Callable[[Size, Size], Size]] = {
            "Add": lambda a, b: a + b,
            "Sub": lambda a, b: a - b,
            "Mul": lambda a, b: a * b,
            "Div": floor_div,
            "Min": lambda a, b: a if a == b else function("min", a, b),
            "Max": lambda a, b: a if a == b else function("max", a, b),
        }
        out.value = tuple(f[node.op](a, b) for a, b in pairs)
    return [out]


@rule("Pow", "PRelu")
def _like_both(g: Graph, node: Node) -> list[Info]:
    return [_elementwise(g, node)]


@rule("Neg", "Abs", "Sign")
def _negative(g: Graph, node: Node) -> list[Info]:
    info = g.info[node.inputs[0]]
    value = tuple(-v for v in info.value) if info.value is not None and node.op == "Neg" else None
    return [Info(info.dtype, info.shape, value)]


UNARY = (
    "Sqrt",
    "Exp",
    "Log",
    "Reciprocal",
    "Sigmoid",
    "Tanh",
    "Erf",
    "Sin",
    "Cos",
    "Relu",
    "Gelu",
    "Softplus",
    "Floor",
    "Ceil",
    "Round",
    "Clip",
    "Elu",
    "HardSwish",
    "HardSigmoid",
    "LeakyRelu",
    "Softmax",
    "LogSoftmax",
    "Trilu",
    "CumSum",
    "Identity",
    "Dropout",
    "Mish",
    "Softsign",
    "Swish",
    "Silu",
    "QuickGelu",
    "Unary",
)


@rule(*UNARY)
def _like_first(g: Graph, node: Node) -> list[Info]:
    info = g.info[node.inputs[0]]
    return [Info(info.dtype, info.shape, info.value if node.op == "Identity" else None)] * 2


@rule("Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual", "And", "Or", "Xor", "Not", "IsNaN")
def _logical(g: Graph, node: Node) -> list[Info]:
    out = _elementwise(g, node, "bool")
    pairs = _pairs(g, node) if node.op == "Equal" else None
    if pairs is not None and all(a == b or _sizes_differ(a, b) for a, b in pairs):
        out.value = tuple(int(a == b) for a, b in pairs)
    return [out]


def _sizes_differ(a: Size, b: Size) -> bool:
    """A size of an input is never -1, the marker that Expand and Reshape chains compare with."""
    return -1 in (a, b) or (isinstance(a, int) and isinstance(b, int))


@rule("Where")
def _where(g: Graph, node: Node) -> list[Info]:
    cond, a, b = (g.info[i] for i in node.inputs)
    value = None
    if cond.value is not None and a.value is not None and b.value is not None:
        n = max(len(cond.value), len(a.value), len(b.value))
        c, x, y = (v * n if len(v) == 1 else v for v in (cond.value, a.value, b.value))
        value = tuple(x[i] if c[i] else y[i] for i in range(n))
    return [Info(a.dtype, broadcast(cond.shape, a.shape, b.shape), value)]


@rule("Cast")
def _cast(g: Graph, node: Node) -> list[Info]:
    info = g.info[node.inputs[0]]
    dtype = DTYPES[node.attrs["to"]]
    dtype = INSIDE.get(dtype, dtype)
    return [Info(dtype, info.shape, info.value if dtype == "int64" else None)]


@rule("CastLike")
def _cast_like(g: Graph, node: Node) -> list[Info]:
    return [Info(g.info[node.inputs[1]].dtype, g.shape(node.inputs[0]))]


@rule("Shape")
def _shape(g: Graph, node: Node) -> list[Info]:
    shape = g.shape(node.inputs[0])[slice(node.attrs.get("start", 0), node.attrs.get("end"))]
    return [Info("int64", (len(shape),), shape)]


@rule("Size")
def _size(g: Graph, node: Node) -> list[Info]:
    return [Info("int64", (), (product(g.shape(node.inputs[0])),))]


@rule("Gather")
def _gather(g: Graph, node: Node) -> list[Info]:
    data, index = (g.info[i] for i in node.inputs)
    axis = node.attrs.get("axis", 0) % len(data.shape)
    value = None
    if data.value is not None and index.value is not None and all(isinstance(i, int) for i in index.value):
        value = tuple(data.value[i] for i in index.value)  # type: ignore[index]
    return [Info(data.dtype, (*data.shape[:axis], *index.shape, *data.shape[axis + 1 :]), value)]


@rule("GatherElements")
def _gather_elements(g: Graph, node: Node) -> list[Info]:
    return [Info(g.info[node.inputs[0]].dtype, g.shape(node.inputs[1]))]


@rule("GatherND")
def _gather_nd(g: Graph, node: Node) -> list[Info]:
    data, index = (g.info[i] for i in node.inputs)
    b, last = node.attrs.get("batch_dims", 0), index.shape[-1]
    if not isinstance(last, int):
        raise EngineUnavailable("GatherND: the index tuple must have a known length")
    return [Info(data.dtype, index.shape[:-1] + data.shape[b + last :])]


@rule("Concat")
def _concat(g: Graph, node: Node) -> list[Info]:
    infos = [g.info[i] for i in node.inputs]
    axis = node.attrs["axis"] % len(infos[0].shape)
    total: Size = 0
    for i in infos:
        total = total + i.shape[axis]
    shape = list(broadcast(*((*i.shape[:axis], 1, *i.shape[axis + 1 :]) for i in infos)))
    shape[axis] = total
    value: tuple[Size, ...] | None = ()
    for i in infos:
        value = None if value is None or i.value is None else value + i.value
    if value is not None and len(value) > KEEP_VALUES:
        value = None
    return [Info(infos[0].dtype, tuple(shape), value)]


@rule("Slice")
def _slice(g: Graph, node: Node) -> list[Info]:
    info = g.info[node.inputs[0]]
    starts, ends, axes, steps = slice_bounds(g, node)
    shape, value = list(info.shape), info.value
    for s, e, axis, step in zip(starts, ends, axes, steps, strict=True):
        if step == 1:
            shape[axis] = clip(e, shape[axis]) - clip(s, shape[axis])
        elif isinstance(shape[axis], int) and isinstance(s, int) and isinstance(e, int):
            shape[axis] = len(range(shape[axis])[s:e:step])  # type: ignore[arg-type]
        elif step == 2 and s in (0, 1) and isinstance(e, int) and e >= 2**31:
            shape[axis] = floor_div(shape[axis] + (1 - s), 2)
        else:
            raise EngineUnavailable("Slice with a step needs known bounds")
        if value is not None:
            value = value[s:e:step] if isinstance(s, int) and isinstance(e, int) else None
    return [Info(info.dtype, tuple(shape), value)]


def slice_bounds(g: Graph, node: Node) -> tuple[tuple[Size, ...], tuple[Size, ...], tuple[int, ...], tuple[int, ...]]:
    """starts, ends, non-negative axes and steps of a Slice."""
    rank = len(g.shape(node.inputs[0]))
    starts, ends = values(g, node.inputs[1]), values(g, node.inputs[2])
    axes = ints(g, node, 3, "axes") or tuple(range(len(starts)))
    steps = ints(g, node, 4, "steps") or (1,) * len(starts)
    return starts, ends, tuple(a % rank for a in axes), steps


@rule("Split")
def _split(g: Graph, node: Node) -> list[Info]:
    info = g.info[node.inputs[0]]
    axis = node.attrs.get("axis", 0) % len(info.shape)
    return [Info(info.dtype, (*info.shape[:axis], s, *info.shape[axis + 1 :])) for s in split_sizes(g, node)]


def split_sizes(g: Graph, node: Node) -> tuple[int, ...]:
    """Sizes of the parts of a Split."""
    given = ints(g, node, 1, "split")
    if given is not None:
        return given
    info = g.info[node.inputs[0]]
    total = info.shape[node.attrs.get("axis", 0) % len(info.shape)]
    n = len(node.outputs)
    if not isinstance(total, int):
        raise EngineUnavailable("Split of an axis of unknown size")
    part = -(-total // n)
    return tuple(min(part, total - i * part) for i in range(n))


@rule("Reshape")
def _reshape(g: Graph, node: Node) -> list[Info]:
    info = g.info[node.inputs[0]]
    target = list(values(g, node.inputs[1]))
    for i, d in enumerate(target):
        if d == 0 and not node.attrs.get("allowzero", 0):
            target[i] = info.shape[i]
    if -1 in target:
        i = target.index(-1)
        target[i] = 1
        target[i] = floor_div(product(info.shape), product(tuple(target)))
    return [Info(info.dtype, tuple(target), info.value if len(target) <= 1 else None)]


@rule("Flatten")
def _flatten(g: Graph, node: Node) -> list[Info]:
    info = g.info[node.inputs[0]]
    axis = node.attrs.get("axis", 1)
    return [Info(info.dtype, (product(info.shape[:axis]), product(info.shape[axis:])))]


@rule("Transpose")
def _transpose(g: Graph, node: Node) -> list[Info]:
    info = g.info[node.inputs[0]]
    perm = node.attrs.get("perm") or list(range(len(info.shape)))[::-1]
    return [Info(info.dtype, tuple(info.shape[p] for p in perm), info.value if len(perm) <= 1 else None)]


@rule("Unsqueeze")
def _unsqueeze(g: Graph, node: Node) -> list[Info]:
    info = g.info[node.inputs[0]]
    axes = ints(g, node, 1, "axes") or ()
    rank = len(info.shape) + len(axes)
    shape, rest = [], list(info.shape)
    for i in range(rank):
        shape.append(1 if i in [a % rank for a in axes] else rest.pop(0))
    return [Info(info.dtype, tuple(shape), info.value if rank <= 1 else None)]


@rule("Squeeze")
def _squeeze(g: Graph, node: Node) -> list[Info]:
    info = g.info[node.inputs[0]]
    axes = ints(g, node, 1, "axes")
    gone = [a % len(info.shape) for a in axes] if axes else [i for i, d in enumerate(info.shape) if d == 1]
    shape = tuple(d for i, d in enumerate(info.shape) if i not in gone)
    return [Info(info.dtype, shape, info.value)]


@rule("Expand")
def _expand(g: Graph, node: Node) -> list[Info]:
    info = g.info[node.inputs[0]]
    shape = broadcast(info.shape, values(g, node.inputs[1]))
    value = info.value
    if value is not None and len(shape) == 1 and isinstance(shape[0], int) and shape[0] <= KEEP_VALUES:
        value = value * shape[0] if len(value) == 1 else value
    return [Info(info.dtype, shape, value if len(shape) <= 1 and value and shape in ((), (len(value),)) else None)]


@rule("Tile")
def _tile(g: Graph, node: Node) -> list[Info]:
    info = g.info[node.inputs[0]]
    return [Info(info.dtype, tuple(a * b for a, b in zip(info.shape, values(g, node.inputs[1]), strict=True)))]


@rule("ConstantOfShape")
def _constant_of_shape(g: Graph, node: Node) -> list[Info]:
    shape = values(g, node.inputs[0])
    fill = node.attrs.get("value")
    dtype = INSIDE.get(fill.dtype, fill.dtype) if fill is not None else "float32"
    number = fill.array().reshape(-1)[0] if fill is not None else 0
    value = None
    if dtype in ("int64", "bool") and (shape == () or (len(shape) == 1 and isinstance(shape[0], int))):
        n = shape[0] if shape else 1
        if isinstance(n, int) and n <= KEEP_VALUES:
            value = (int(number),) * n
    return [Info(dtype, shape, value)]


@rule("Range")
def _range(g: Graph, node: Node) -> list[Info]:
    info = g.info[node.inputs[0]]
    if info.dtype != "int64":
        start, stop, step = (g.scalar(i) for i in node.inputs)
        if start is None or stop is None or step is None:
            raise EngineUnavailable("Range of floats needs constant bounds")
        return [Info(info.dtype, (max(0, int(np.ceil((stop - start) / step))),))]
    (first,), (last,), (stride,) = (values(g, i) for i in node.inputs)
    if stride != 1:
        if not (isinstance(first, int) and isinstance(last, int) and isinstance(stride, int)):
            raise EngineUnavailable("Range with a step needs constant bounds")
        return [Info("int64", (len(range(first, last, stride)),))]
    return [Info("int64", (last - first,))]


@rule("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceL2", "ReduceSumSquare", "ArgMax", "All")
def _reduce(g: Graph, node: Node) -> list[Info]:
    info = g.info[node.inputs[0]]
    rank = len(info.shape)
    axes = reduce_axes(g, node)
    keep = node.attrs.get("keepdims", 1)
    shape = tuple(1 if i in axes else d for i, d in enumerate(info.shape) if keep or i not in axes)
    value = None
    if info.value is not None and rank == 1 and node.op == "ReduceProd":
        value = (product(info.value),)
    return [Info("int64" if node.op == "ArgMax" else info.dtype, shape, value)]


def reduce_axes(g: Graph, node: Node) -> tuple[int, ...]:
    """The non-negative axes that a Reduce* or ArgMax node reduces."""
    rank = len(g.shape(node.inputs[0]))
    if node.op == "ArgMax":
        return (node.attrs.get("axis", 0) % rank,)
    axes = ints(g, node, 1, "axes")
    if not axes:
        return () if node.attrs.get("noop_with_empty_axes", 0) else tuple(range(rank))
    return tuple(a % rank for a in axes)


@rule("TopK")
def _top_k(g: Graph, node: Node) -> list[Info]:
    info = g.info[node.inputs[0]]
    axis = node.attrs.get("axis", -1) % len(info.shape)
    (count,) = values(g, node.inputs[1])
    shape = (*info.shape[:axis], count, *info.shape[axis + 1 :])
    return [Info(info.dtype, shape), Info("int64", shape)]


@rule("ScatterElements", "ScatterND")
def _scatter(g: Graph, node: Node) -> list[Info]:
    info = g.info[node.inputs[0]]
    return [Info(info.dtype, info.shape)]


@rule("MatMul")
def _matmul(g: Graph, node: Node) -> list[Info]:
    a, b = g.shape(node.inputs[0]), g.shape(node.inputs[1])
    a2, b2 = (a if len(a) > 1 else (1, *a)), (b if len(b) > 1 else (*b, 1))
    shape = broadcast(a2[:-2], b2[:-2]) if len(a2) > 2 or len(b2) > 2 else ()
    shape += (a2[-2],) * (len(a) > 1) + (b2[-1],) * (len(b) > 1)
    return [Info("float32", shape)]


@rule("Gemm")
def _gemm(g: Graph, node: Node) -> list[Info]:
    a, b = g.shape(node.inputs[0]), g.shape(node.inputs[1])
    rows = a[1] if node.attrs.get("transA") else a[0]
    return [Info("float32", (rows, b[0] if node.attrs.get("transB") else b[1]))]


@rule("DequantizeLinear")
def _dequantize(g: Graph, node: Node) -> list[Info]:
    return [Info("float32", g.shape(node.inputs[0]))]


@rule("RMSNormalization", "LayerNormalization", "RotaryEmbedding")
def _norm(g: Graph, node: Node) -> list[Info]:
    return [g.info[node.inputs[0]]]


@rule("Attention")
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


@rule("Conv")
def _conv(g: Graph, node: Node) -> list[Info]:
    x, w = g.shape(node.inputs[0]), g.shape(node.inputs[1])
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


@rule("Pad")
def _pad(g: Graph, node: Node) -> list[Info]:
    info = g.info[node.inputs[0]]
    pads, axes = pad_amounts(g, node)
    shape = list(info.shape)
    for i, axis in enumerate(axes):
        shape[axis] = shape[axis] + pads[i] + pads[i + len(axes)]
    return [Info(info.dtype, tuple(shape))]


def pad_amounts(g: Graph, node: Node) -> tuple[tuple[Size, ...], tuple[int, ...]]:
    """Amounts (all begins, then all ends) and non-negative axes of a Pad."""
    rank = len(g.shape(node.inputs[0]))
    axes = ints(g, node, 3, "axes") or tuple(range(rank))
    return values(g, node.inputs[1]), tuple(a % rank for a in axes)
