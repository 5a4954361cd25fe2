"""Shape rules of the operators that only move or measure data, and the registry that `infer` uses.

Integer tensors of rank 0 and 1 carry their elements as sizes. So the result of Shape -> Gather -> Concat -> Reshape is
known, and the chain's nodes are not needed. Operators follow the ONNX operator specification.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from edgeformer.engines.native.ir.dims import Dim, Shape, Size, clip, floor_div, product
from edgeformer.engines.native.ir.graph import COMPUTE_DTYPES, Graph, Info, Node
from edgeformer.errors import EngineUnavailable

ShapeRule = Callable[[Graph, Node], list[Info]]
SHAPE_RULES: dict[str, ShapeRule] = {}
KEEP_VALUES = 64  # an integer tensor longer than this is data, not a shape


def shape_rule(*ops: str) -> Callable[[ShapeRule], ShapeRule]:
    """Register the shape rule of some operators."""

    def register(f: ShapeRule) -> ShapeRule:
        SHAPE_RULES.update(dict.fromkeys(ops, f))
        return f

    return register


def values(g: Graph, name: str) -> tuple[Size, ...]:
    """The elements of an integer tensor that must be known as sizes; EngineUnavailable when they are not."""
    info = g.info[name]
    if info.value is None:
        raise EngineUnavailable(f"{name} is needed as a shape but is only known at run time")
    return info.value


def ints(g: Graph, node: Node, i: int, attr: str) -> tuple[int, ...] | None:
    """Constant integers of input `i` (newer operator sets) or of an attribute; None when absent."""
    if node.input(i):
        found = values(g, node.input(i))
        if not all(isinstance(v, int) for v in found):
            raise EngineUnavailable(f"{node.op}: {attr} must be constant")
        return found  # type: ignore[return-value]
    return tuple(node.attrs[attr]) if attr in node.attrs else None


def broadcast(*shapes: Shape) -> Shape:
    """The shape of an elementwise result.

    Two different symbolic sizes are taken as equal if neither is 1; the engine checks it when it runs. A plain symbol
    is preferred: `sequence` rather than an expression of padding and slicing.
    """
    rank = max(map(len, shapes))
    out: list[Size] = []
    for axis in range(rank):
        size: Size = 1
        for s in shapes:
            d = s[axis - rank + len(s)] if axis >= rank - len(s) else 1
            if size == 1 or (isinstance(d, int) and d != 1):
                size = d if d != 1 or size == 1 else size
            elif isinstance(size, Dim) and isinstance(d, Dim) and d.is_symbol() and not size.is_symbol():
                size = d
        out.append(size)
    return tuple(out)


@shape_rule("Shape")
def _shape(g: Graph, node: Node) -> list[Info]:
    shape = g.shape(node.inputs[0])[slice(node.attrs.get("start", 0), node.attrs.get("end"))]
    return [Info("int64", (len(shape),), shape)]


@shape_rule("Size")
def _size(g: Graph, node: Node) -> list[Info]:
    return [Info("int64", (), (product(g.shape(node.inputs[0])),))]


@shape_rule("Gather")
def _gather(g: Graph, node: Node) -> list[Info]:
    data, index = (g.info[i] for i in node.inputs)
    axis = node.attrs.get("axis", 0) % len(data.shape)
    value = None
    if data.value is not None and index.value is not None and all(isinstance(i, int) for i in index.value):
        value = tuple(data.value[i] for i in index.value)  # type: ignore[index]
    return [Info(data.dtype, (*data.shape[:axis], *index.shape, *data.shape[axis + 1 :]), value)]


@shape_rule("GatherElements")
def _gather_elements(g: Graph, node: Node) -> list[Info]:
    return [Info(g.info[node.inputs[0]].dtype, g.shape(node.inputs[1]))]


@shape_rule("GatherND")
def _gather_nd(g: Graph, node: Node) -> list[Info]:
    data, index = (g.info[i] for i in node.inputs)
    b, last = node.attrs.get("batch_dims", 0), index.shape[-1]
    if not isinstance(last, int):
        raise EngineUnavailable("GatherND: the index tuple must have a known length")
    return [Info(data.dtype, index.shape[:-1] + data.shape[b + last :])]


@shape_rule("Concat")
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


@shape_rule("Slice")
def _slice(g: Graph, node: Node) -> list[Info]:
    info = g.info[node.inputs[0]]
    starts, ends, axes, steps = slice_bounds(g, node)
    shape, value = list(info.shape), info.value
    for s, e, axis, step in zip(starts, ends, axes, steps, strict=True):
        if step == 1:
            shape[axis] = clip(e, shape[axis]) - clip(s, shape[axis])
        elif isinstance(shape[axis], int) and isinstance(s, int) and isinstance(e, int):
            shape[axis] = len(range(shape[axis])[s:e:step])  # type: ignore[arg-type]
        elif step > 0:
            shape[axis] = floor_div(clip(e, shape[axis]) - clip(s, shape[axis]) + (step - 1), step)
        elif isinstance(s, int) and (s == -1 or s >= 2**31) and isinstance(e, int) and e <= -(2**31):
            shape[axis] = floor_div(shape[axis] + (-step - 1), -step)
        else:
            raise EngineUnavailable("Slice with a negative step needs known bounds")
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


@shape_rule("Split")
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


@shape_rule("Reshape")
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


@shape_rule("Flatten")
def _flatten(g: Graph, node: Node) -> list[Info]:
    info = g.info[node.inputs[0]]
    axis = node.attrs.get("axis", 1)
    return [Info(info.dtype, (product(info.shape[:axis]), product(info.shape[axis:])))]


@shape_rule("Transpose")
def _transpose(g: Graph, node: Node) -> list[Info]:
    info = g.info[node.inputs[0]]
    perm = node.attrs.get("perm") or list(range(len(info.shape)))[::-1]
    if sorted(perm) != list(range(len(info.shape))):
        raise EngineUnavailable(f"Transpose of {len(info.shape)} axes in the order {perm}")
    return [Info(info.dtype, tuple(info.shape[p] for p in perm), info.value if len(perm) <= 1 else None)]


@shape_rule("Unsqueeze")
def _unsqueeze(g: Graph, node: Node) -> list[Info]:
    info = g.info[node.inputs[0]]
    axes = ints(g, node, 1, "axes") or ()
    rank = len(info.shape) + len(axes)
    shape, rest = [], list(info.shape)
    for i in range(rank):
        shape.append(1 if i in [a % rank for a in axes] else rest.pop(0))
    return [Info(info.dtype, tuple(shape), info.value if rank <= 1 else None)]


@shape_rule("Squeeze")
def _squeeze(g: Graph, node: Node) -> list[Info]:
    info = g.info[node.inputs[0]]
    axes = ints(g, node, 1, "axes")
    gone = [a % len(info.shape) for a in axes] if axes else [i for i, d in enumerate(info.shape) if d == 1]
    shape = tuple(d for i, d in enumerate(info.shape) if i not in gone)
    return [Info(info.dtype, shape, info.value)]


@shape_rule("Expand")
def _expand(g: Graph, node: Node) -> list[Info]:
    info = g.info[node.inputs[0]]
    shape = broadcast(info.shape, values(g, node.inputs[1]))
    value = info.value
    if value is not None and len(shape) == 1 and isinstance(shape[0], int) and shape[0] <= KEEP_VALUES:
        value = value * shape[0] if len(value) == 1 else value
    return [Info(info.dtype, shape, value if len(shape) <= 1 and value and shape in ((), (len(value),)) else None)]


@shape_rule("Tile")
def _tile(g: Graph, node: Node) -> list[Info]:
    info = g.info[node.inputs[0]]
    return [Info(info.dtype, tuple(a * b for a, b in zip(info.shape, values(g, node.inputs[1]), strict=True)))]


@shape_rule("ConstantOfShape")
def _constant_of_shape(g: Graph, node: Node) -> list[Info]:
    shape = values(g, node.inputs[0])
    fill = node.attrs.get("value")
    dtype = COMPUTE_DTYPES.get(fill.dtype, fill.dtype) if fill is not None else "float32"
    number = fill.array().reshape(-1)[0] if fill is not None else 0
    value = None
    if dtype in ("int64", "bool") and (shape == () or (len(shape) == 1 and isinstance(shape[0], int))):
        n = shape[0] if shape else 1
        if isinstance(n, int) and n <= KEEP_VALUES:
            value = (int(number),) * n
    return [Info(dtype, shape, value)]


@shape_rule("Range")
def _range(g: Graph, node: Node) -> list[Info]:
    info = g.info[node.inputs[0]]
    if info.dtype != "int64":
        start, stop, step = (g.scalar(i) for i in node.inputs)
        if start is None or stop is None or step is None:
            raise EngineUnavailable("Range of floats needs constant bounds")
        return [Info(info.dtype, (max(0, int(np.ceil((stop - start) / step))),))]
    (first,), (last,), (stride,) = (values(g, i) for i in node.inputs)
    if not isinstance(stride, int) or stride == 0:
        raise EngineUnavailable("Range needs a constant step")
    if isinstance(first, int) and isinstance(last, int):
        return [Info("int64", (len(range(first, last, stride)),))]
    way = last - first if stride > 0 else first - last
    return [Info("int64", (floor_div(way + (abs(stride) - 1), abs(stride)),))]


@shape_rule("Pad")
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


@shape_rule("Resize")
def _resize(g: Graph, node: Node) -> list[Info]:
    """Resize to given sizes, of all axes or of some."""
    info = g.info[node.inputs[0]]
    if node.attrs.get("keep_aspect_ratio_policy", "stretch") != "stretch":
        raise EngineUnavailable("Resize that keeps the aspect ratio")
    shape = list(info.shape)
    for axis, size in zip(node.attrs.get("axes", range(len(shape))), values(g, node.input(3)), strict=True):
        shape[axis] = size
    return [Info(info.dtype, tuple(shape))]
