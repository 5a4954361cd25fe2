"""model.onnx as a small graph of named values: nodes, constants (mapped, not copied), inputs and outputs.

Needs `onnx` only to parse the file; it is imported when a graph is read. A constant's bytes stay in the mapped
weights file until they are read, so reading a graph takes milliseconds whatever the model's size.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeformer.bundle.signature import Array
from edgeformer.engines.native.ir.cache import Cache
from edgeformer.engines.native.ir.dims import Shape, Size, symbol
from edgeformer.errors import BundleError, EngineUnavailable, typed_out_of_memory

if TYPE_CHECKING:
    import onnx


# onnx.TensorProto.DataType -> our name; the numbers are part of the file format.
ONNX_DTYPES = {1: "float32", 2: "uint8", 3: "int8", 6: "int32", 7: "int64", 9: "bool", 10: "float16", 11: "float64"}
ONNX_DTYPES |= {16: "bfloat16", 21: "uint4", 22: "int4"}
HALF_BYTES = ("int4", "uint4")
# What other types are computed as: the program has float32, int64 and bool tensors only.
COMPUTE_DTYPES = {"float16": "float32", "bfloat16": "float32", "float64": "float32", "int32": "int64", "uint8": "int64"}


@dataclass(slots=True)
class Constant:
    """A weight or another constant. `data` has the tensor's shape, except that int4 is flat bytes, low nibble first."""

    dtype: str
    shape: tuple[int, ...]
    data: Array

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def array(self) -> Array:
        """The values; int4 unpacked to int8."""
        if self.dtype not in HALF_BYTES:
            return self.data
        low, high = self.data & 15, self.data >> 4
        flat = np.stack([low, high], axis=-1).reshape(-1)[: self.size].astype(np.int8)
        if self.dtype == "int4":
            flat = ((flat + 8) & 15) - 8
        return flat.reshape(self.shape)


@dataclass(slots=True, eq=False)
class Node:
    """One operation. `inputs` may hold "" for an optional input that is not given."""

    op: str
    inputs: list[str]
    outputs: list[str]
    attrs: dict[str, Any] = field(default_factory=dict)

    def input(self, i: int) -> str:
        """The i-th input's name, "" when it is not given."""
        return self.inputs[i] if i < len(self.inputs) else ""


@dataclass(slots=True)
class Info:
    """What is known of a value before running: its type, its shape, and its elements where they are sizes."""

    dtype: str
    shape: Shape
    value: tuple[Size, ...] | None = None  # the elements of an integer tensor of rank 0 or 1


class Graph:
    """Nodes in execution order. Passes change `nodes` and `constants` and look up producers and users."""

    def __init__(
        self, nodes: list[Node], constants: dict[str, Constant], inputs: dict[str, Info], outputs: list[str]
    ) -> None:
        self.nodes = nodes
        self.constants = constants
        self.inputs = inputs
        self.outputs = outputs
        self.info: dict[str, Info] = dict(inputs)
        for name, c in constants.items():
            self.info.setdefault(name, constant_info(c))
        self.producers: dict[str, Node] = {}
        self.users: dict[str, list[Node]] = {}
        self.io_dtypes = {n: i.dtype for n, i in inputs.items()}  # as in the file; computed as COMPUTE_DTYPES
        self.caches: list[Cache] = []  # in layer order; filled by the pass `attention_rows`
        self.defaults: dict[str, int] = {}  # scalar inputs that may be left out
        self.files: dict[str, Array] = {}  # the mapped weights files
        self._names = 0
        self._finished: list[tuple[Any, ...]] = []
        self.index()

    def index(self) -> None:
        """Compute producers and users again; call it after a change of `nodes`."""
        self.producers = {out: n for n in self.nodes for out in n.outputs if out}
        self.users = {}
        for n in self.nodes:
            for name in dict.fromkeys(n.inputs):
                if name:
                    self.users.setdefault(name, []).append(n)

    def fresh(self, hint: str) -> str:
        """A new value name."""
        self._names += 1
        return f"{hint}:{self._names}"

    def producer(self, name: str, op: str | tuple[str, ...] | None = None) -> Node | None:
        """The node that makes `name`, if there is one and its operator is `op`."""
        n = self.producers.get(name)
        if n is None or op is None:
            return n
        return n if n.op == op or (isinstance(op, tuple) and n.op in op) else None

    def only_user(self, name: str) -> Node | None:
        """The single node that reads `name`; None when there are several or `name` is an output of the graph."""
        users = self.users.get(name, [])
        return users[0] if len(users) == 1 and name not in self.outputs else None

    def constant(self, name: str, max_size: int = 1 << 20) -> Array | None:
        """The numbers of a constant of at most `max_size` elements, else None."""
        c = self.constants.get(name)
        return c.array() if c is not None and c.size <= max_size else None

    def scalar(self, name: str) -> float | None:
        """The number of a constant with one element."""
        c = self.constants.get(name)
        return float(c.array().reshape(-1)[0]) if c is not None and c.size == 1 else None

    def add_constant(self, hint: str, array: Array) -> str:
        """The name of a new constant."""
        name = self.fresh(hint)
        self.constants[name] = Constant(str(array.dtype), array.shape, array)
        self.info[name] = constant_info(self.constants[name])
        return name

    def shape(self, name: str) -> Shape:
        """The shape of a value."""
        return self.info[name].shape

    def emit(self, op: str, inputs: list[str], info: Info, hint: str, **attrs: Any) -> str:
        """Add a node; returns the name of its result. `finish` puts it in its place."""
        name = self.fresh(hint)
        node = Node(op, inputs, [name], attrs)
        self.info[name] = info
        self.producers[name] = node
        for i in inputs:
            if i:
                self.users.setdefault(i, []).append(node)
        self.nodes.append(node)
        return name

    def rewire(self, old: str, new: str) -> None:
        """Readers of `old` read `new` instead; if `old` is an output of the graph, it becomes a View of `new`."""
        for n in self.users.pop(old, []):
            n.inputs = [new if i == old else i for i in n.inputs]
            self.users.setdefault(new, []).append(n)
        node = self.producers.pop(old, None)
        if node is not None and len(node.outputs) == 1:
            for i in set(node.inputs):
                if i in self.users:
                    self.users[i] = [u for u in self.users[i] if u is not node]
            if old in self.outputs:
                self.nodes.remove(node)  # else no node reads it, and `finish` drops it
        if old in self.outputs:
            view = Node("View", [new], [old])
            self.nodes.append(view)
            self.producers[old] = view
            self.users.setdefault(new, []).append(view)

    def finish(self) -> None:
        """Drop nodes whose outputs no node reads, and sort the others so that producers come first."""
        if self._structure() == self._finished:  # most passes find nothing in most graphs
            return
        keep: list[Node] = []
        done: set[Node] = set()
        producers = self.producers = {out: n for n in self.nodes for out in n.outputs if out}
        for output in self.outputs:
            stack = [producers[output]] if output in producers else []
            while stack:
                node = stack[-1]
                if node in done:
                    stack.pop()
                    continue
                waiting = [producers[i] for i in node.inputs if i in producers and producers[i] not in done]
                if waiting:
                    stack += waiting[::-1]
                else:
                    done.add(node)
                    keep.append(stack.pop())
        self.nodes = keep
        self.index()
        self._finished = self._structure()

    def _structure(self) -> list[tuple[Any, ...]]:
        """What the order of the nodes depends on."""
        return [(n, *n.inputs, *n.outputs) for n in self.nodes]


def constant_info(c: Constant) -> Info:
    """Type and shape of a constant, and its numbers where they may be sizes."""
    value = None
    if c.dtype in ("int64", "int32", "bool") and len(c.shape) <= 1 and c.size <= 64:
        value = tuple(int(v) for v in c.data.reshape(-1))
    return Info(c.dtype, c.shape, value)


def read_graph(path: Path) -> Graph:
    """The graph of the file `path`; its weights are mapped from the file beside it.

    Raises:
        BundleError: the file is no ONNX graph, or a weight is not inside its weights file.
        EngineUnavailable: it uses an operator set or a tensor type that the native engine does not know.
    """
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    try:
        model = onnx.load(str(path), load_external_data=False)
    except (DecodeError, OSError) as e:
        raise BundleError(f"{path} cannot be read as an ONNX graph: {e}") from e
    return graph_of(model, path.parent)


def graph_of(model: onnx.ModelProto, folder: Path | None = None) -> Graph:
    """The graph of a parsed model; `folder` holds its external weights."""
    opset = {o.domain: o.version for o in model.opset_import}.get("", 0)
    if opset < 13:
        raise EngineUnavailable(f"the graph has opset {opset}, the native engine reads 13 and later; export it again")
    maps = _Maps(folder)
    constants = {t.name: _constant(t, maps) for t in model.graph.initializer}
    nodes = []
    for n in model.graph.node:
        attrs = {a.name: _attribute(a, maps) for a in n.attribute}
        op = n.op_type if n.domain in ("", "ai.onnx") else f"{n.domain}::{n.op_type}"
        if op == "Constant":
            constants[n.output[0]] = _constant_node(attrs)
        else:
            nodes.append(Node(op, list(n.input), list(n.output), attrs))
    inputs = {}
    io_dtypes = {}
    defaults = {}
    for v in model.graph.input:
        tensor = v.type.tensor_type
        dims = [d.dim_value if d.HasField("dim_value") else symbol(d.dim_param or f"{v.name}.{i}") for i, d in
                enumerate(tensor.shape.dim)]  # fmt: skip
        dtype = ONNX_DTYPES.get(tensor.elem_type, f"type {tensor.elem_type}")
        if v.name in constants:
            if dtype != "int64" or dims:
                continue  # an initializer listed among the inputs, as old files do: a plain constant
            defaults[v.name] = int(constants.pop(v.name).data)  # an input that may be left out
        is_size = dtype == "int64" and not dims
        io_dtypes[v.name] = dtype
        inputs[v.name] = Info(COMPUTE_DTYPES.get(dtype, dtype), tuple(dims), (symbol(v.name),) if is_size else None)
    for o in model.graph.output:
        io_dtypes[o.name] = ONNX_DTYPES.get(o.type.tensor_type.elem_type, "unknown")
    outputs = [o.name for o in model.graph.output]
    _check_arity(nodes, opset)
    _check_order(nodes, {*constants, *inputs}, outputs)
    graph = Graph(nodes, constants, inputs, outputs)
    graph.io_dtypes, graph.defaults, graph.files = io_dtypes, defaults, maps.files
    return graph


def _check_arity(nodes: list[Node], opset: int) -> None:
    """
    Raises:
        BundleError: a node has fewer inputs than its operator needs.
    """
    from onnx import defs

    least: dict[str, int] = {}
    for node in nodes:
        if node.op not in least:
            try:
                least[node.op] = defs.get_schema(node.op, opset).min_input
            except defs.SchemaError:  # of another domain, or newer than the graph's opset
                least[node.op] = 0
        given = sum(bool(name) for name in node.inputs[: least[node.op]])
        if given < least[node.op]:
            raise BundleError(f"{node.op} of {node.outputs[:1]} has {given} inputs, expected at least {least[node.op]}")


def _check_order(nodes: list[Node], known: set[str], outputs: list[str]) -> None:
    """Passes walk from values to their producers: a circle would never end.

    Raises:
        BundleError: a node reads a value that no node before it makes, or makes one that another node makes too.
    """
    known.add("")
    for node in nodes:
        missing = [name for name in node.inputs if name not in known]
        if missing:
            raise BundleError(f"{node.op} of {node.outputs[:1]} reads {missing[0]!r}, which no node before it makes")
        twice = [name for name in node.outputs if name and name in known]
        if twice or not any(node.outputs):
            raise BundleError(f"{node.op} makes {twice[0]!r} again" if twice else f"{node.op} makes no value")
        known.update(node.outputs)
    missing = [name for name in outputs if name not in known]
    if missing:
        raise BundleError(f"the graph gives {missing[0]!r}, which no node makes")


class _Maps:
    """The external weight files of one graph, each mapped once."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self.files: dict[str, Array] = {}

    def bytes_of(self, name: str, location: str, offset: int, length: int) -> Array:
        if self.folder is None or Path(location).name != location:
            raise BundleError(f"{name}: external data in {location!r}; expected a plain file name beside the graph")
        if location not in self.files:
            try:
                with typed_out_of_memory(f"mapping the weights file {location} for {name}"):
                    self.files[location] = np.memmap(self.folder / location, np.uint8, "r")
            except (OSError, ValueError) as e:
                raise BundleError(f"{name}: its weights file {location} cannot be mapped: {e}") from e
        data = self.files[location]
        if offset < 0 or length < 0 or offset > data.size - length:
            raise BundleError(
                f"{name}: bytes {offset:,} to {offset + length:,} of {location}, which holds {data.size:,}: "
                "the file is cut short or not this graph's; export or copy it again"
            )
        return data[offset : offset + length]


def _constant(t: onnx.TensorProto, maps: _Maps) -> Constant:
    import onnx

    dtype = ONNX_DTYPES.get(t.data_type)
    if dtype is None:
        raise EngineUnavailable(f"constant {t.name} has ONNX type {t.data_type}, which the native engine does not read")
    shape = tuple(t.dims)
    count = math.prod(shape)
    if t.data_location != onnx.TensorProto.EXTERNAL and not t.HasField("raw_data"):
        array = onnx.numpy_helper.to_array(t)
        if dtype in HALF_BYTES:
            nibbles = np.concatenate([array.reshape(-1).astype(np.int8), np.zeros(count % 2, np.int8)]) & 15
            return Constant(dtype, shape, (nibbles[::2] | (nibbles[1::2] << 4)).astype(np.uint8))
        return _widened(dtype, shape, array)
    if t.data_location == onnx.TensorProto.EXTERNAL:
        place = {e.key: e.value for e in t.external_data}
        raw = maps.bytes_of(t.name, place["location"], int(place.get("offset", 0)), int(place.get("length", -1)))
    else:
        raw = np.frombuffer(t.raw_data, np.uint8)
    width = np.dtype(np.uint16 if dtype == "bfloat16" else np.uint8 if dtype in HALF_BYTES else dtype)
    wanted = (count + 1) // 2 if dtype in HALF_BYTES else count * width.itemsize
    if raw.size != wanted:
        raise BundleError(f"constant {t.name} {dtype}{list(shape)} has {raw.size:,} bytes, expected {wanted:,}")
    if dtype in HALF_BYTES:
        return Constant(dtype, shape, raw)
    return _widened(dtype, shape, raw.view(width) if raw.ctypes.data % width.itemsize == 0 else raw.copy().view(width))


def _widened(dtype: str, shape: tuple[int, ...], array: Array) -> Constant:
    """Float constants of other widths become float32 when small: the engine computes in float32."""
    array = array.reshape(shape)
    if dtype == "bfloat16":
        return Constant("float32", shape, (array.astype(np.uint32) << 16).view(np.float32))
    if dtype == "float64" or (dtype == "float16" and array.size <= 65536):
        return Constant("float32", shape, array.astype(np.float32))
    return Constant(dtype, shape, array)


def _attribute(a: onnx.AttributeProto, maps: _Maps) -> Any:
    import onnx

    value = onnx.helper.get_attribute_value(a)
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, onnx.TensorProto):
        return _constant(value, maps)
    return value


def _constant_node(attrs: dict[str, Any]) -> Constant:
    ((key, value),) = attrs.items()
    if key == "value":
        return value  # type: ignore[no-any-return]
    array = np.array(value, np.float32 if "float" in key else np.int64)
    return Constant(str(array.dtype), array.shape, array)


Pass = Callable[[Graph], None]
