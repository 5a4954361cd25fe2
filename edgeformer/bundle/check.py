"""Checks the tensors stored in a graph: their offsets in the data file and, optionally, their values."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeformer import disk_cache
from edgeformer.bundle.manifest import plain_name
from edgeformer.errors import BundleError, check_memory

if TYPE_CHECKING:
    import onnx


def read_model(path: Path) -> onnx.ModelProto:
    """The parsed graph, without the weights in the external data file.

    Raises:
        BundleError: the file is not an ONNX model.
        OutOfMemory: there is no memory to parse and check it: the libraries say so in many ways, or end the process.
    """
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    # With onnx's checker 5.3 MB for a file of 7 kB, 21 MB for one of 437 kB (onnx 1.23).
    check_memory((8 << 20) + 48 * path.stat().st_size, f"reading {path}")
    try:
        model = onnx.load(str(path), load_external_data=False)
    except DecodeError as error:
        raise BundleError(f"{path} is not an ONNX model; export or copy the bundle again.") from error
    if not model.graph.node or not model.opset_import:
        raise BundleError(f"{path} is not an ONNX model: it has no nodes; export or copy the bundle again.")
    return model


def tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """All tensors stored in the model: initializers and constants, including those of subgraphs and functions."""
    yield from _graph_tensors(model.graph)
    for function in model.functions:
        yield from _node_tensors(function.node)


def _graph_tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield sparse.values
        yield sparse.indices
    yield from _node_tensors(graph.node)


def _node_tensors(nodes: Any) -> Iterator[onnx.TensorProto]:
    for node in nodes:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
            if attribute.HasField("g"):
                yield from _graph_tensors(attribute.g)
            for graph in attribute.graphs:
                yield from _graph_tensors(graph)


def graph_problems(folder: Path, table: Mapping[str, Any], files: Mapping[str, Any], *, values: bool) -> list[str]:
    """The problems of a graph and its tensors, one sentence each; empty if there are none.

    `table` is the manifest's entry of the graph, `files` its table of files. With `values`, values are checked too:
    scales must be finite, INT8 weights must not be -128. Without `values`, the disk cache records that a graph has no
    problems; the graph is not parsed again until its bytes, its entry or a file size change.
    """
    entry = "" if values else _cache_entry(folder / table["file"], table, files)
    if entry and disk_cache.read(entry) is not None:
        return []
    problems = _find_problems(folder, table, files, values=values)
    if entry and not problems:
        disk_cache.write(entry, b"")
    return problems


def _cache_entry(path: Path, table: Mapping[str, Any], files: Mapping[str, Any]) -> str:
    facts = json.dumps([table, {name: entry["size"] for name, entry in sorted(files.items())}])
    try:
        return disk_cache.key(b"checked 2", facts.encode(), path.read_bytes()) + ".checked"
    except OSError:
        return ""


def _find_problems(folder: Path, table: Mapping[str, Any], files: Mapping[str, Any], *, values: bool) -> list[str]:
    import onnx

    file = table["file"]
    try:
        model = read_model(folder / file)
    except BundleError as error:
        return [str(error).rstrip(".")]
    if problem := _name_problem(model):
        return [f"{file}: {problem}"]
    problems = []
    for tensor in tensors(model):
        problem = _storage_problem(tensor, files)
        if problem:
            problems.append(f"{file}: {tensor.name or 'a constant'} {problem}")
    if not problems and (problem := structure_problem(model)):
        problems.append(f"{file}: {problem}")
    if not problems:
        problems += [f"{file}: {problem}" for problem in _port_problems(model.graph, table)]
    if values and not problems:
        initializers = {tensor.name: tensor for tensor in model.graph.initializer}
        weights, scales = _quantized(model.graph, set(initializers))
        for name in sorted(scales):
            if not np.isfinite(load_tensor(folder, initializers[name]).astype(np.float64)).all():
                problems.append(f"{file}: the scales {name} hold NaN or infinity")
        for name in sorted(weights):
            tensor = initializers[name]
            if tensor.data_type == onnx.TensorProto.INT8 and (load_tensor(folder, tensor) == -128).any():
                problems.append(f"{file}: the 8-bit weights {name} hold -128, the format allows -127 to 127")
    return problems


def _port_problems(graph: onnx.GraphProto, table: Mapping[str, Any]) -> list[str]:
    """Where the manifest's inputs and outputs are not those of the graph: other names, types, ranks or sizes."""
    import onnx

    stored = {tensor.name for tensor in graph.initializer}
    problems = []
    for side, values in (("inputs", graph.input), ("outputs", graph.output)):
        found, listed = {value.name: value.type.tensor_type for value in values}, table[side]
        odd = sorted(map(str, (found.keys() ^ listed.keys()) - (stored - listed.keys())))
        if odd:
            problems.append(f"the manifest and the graph disagree about the {side}: {', '.join(odd[:6])}")
        for name in found.keys() & listed.keys():
            tensor, port = found[name], listed[name]
            try:
                dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).name
            except (KeyError, TypeError, ValueError):
                dtype = f"element type {tensor.elem_type}"
            shape = [dim.dim_value if dim.HasField("dim_value") else dim.dim_param for dim in tensor.shape.dim]
            fits = len(shape) == len(port["shape"]) and all(
                type(one) is type(other) and (one == other or isinstance(one, str))
                for one, other in zip(shape, port["shape"], strict=True)
            )
            if dtype != port["dtype"] or not fits:
                problems.append(
                    f"the graph's {name} is {dtype}{shape}, but the manifest says {port['dtype']}{port['shape']}"
                )
    return problems


def structure_problem(model: onnx.ModelProto) -> str | None:
    """What onnx's checker says against a graph whose names are texts: nodes out of order or in a circle, a value made
    twice or by none, inputs or attributes that the operator does not have, types and shapes that do not fit. None if it
    says nothing.

    Tensors in the external file count as inputs, because the checker would look for that file and refuses links, which
    the Hugging Face cache consists of; `graph_problems` checks them itself.
    """
    import onnx

    plain = onnx.ModelProto()
    plain.CopyFrom(model)
    del plain.graph.initializer[:]
    inputs = {value.name for value in model.graph.input}
    for tensor in model.graph.initializer:
        if external(tensor) is None:
            plain.graph.initializer.append(tensor)
        elif tensor.name not in inputs:
            value = onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims))
            plain.graph.input.append(value)
    try:
        onnx.checker.check_model(plain, full_check=True)
    except Exception as error:  # ValidationError, and bare errors of the C++ library
        return f"it is not a valid ONNX model: {' '.join(str(error).split())[:600]}"
    return None


def _name_problem(model: onnx.ModelProto) -> str | None:
    bad = next((name for name in _names(model.graph) if not isinstance(name, str)), None)
    return None if bad is None else f"it is not a valid ONNX model: the name {bad!r} is not UTF-8"


def _names(graph: onnx.GraphProto) -> Iterator[object]:
    """All names of a graph. protobuf gives those that are not UTF-8 as bytes."""
    for value in (*graph.input, *graph.output, *graph.value_info):
        yield value.name
        yield from (dim.dim_param for dim in value.type.tensor_type.shape.dim)
    for node in graph.node:
        yield from (node.name, node.op_type, node.domain, *node.input, *node.output)
        for attribute in node.attribute:
            yield attribute.name
            yield from _names(attribute.g) if attribute.HasField("g") else ()
            yield from _tensor_names(attribute.t) if attribute.HasField("t") else ()
    for tensor in graph.initializer:
        yield from _tensor_names(tensor)


def _tensor_names(tensor: onnx.TensorProto) -> Iterator[object]:
    yield tensor.name
    yield from (text for entry in tensor.external_data for text in (entry.key, entry.value))


def external(tensor: onnx.TensorProto) -> dict[str, str] | None:
    """The `location`, `offset` and `length` entries of a tensor in an external file; None if in the graph file."""
    import onnx

    if tensor.data_location != onnx.TensorProto.EXTERNAL:
        return None
    return {entry.key: entry.value for entry in tensor.external_data}


def stored_bytes(tensor: onnx.TensorProto) -> int | None:
    """The bytes of the tensor's elements as raw data; None for strings, which have no fixed size."""
    import onnx

    if tensor.data_type == onnx.TensorProto.STRING:
        return None
    elements = int(math.prod(tensor.dims))  # Python integers do not overflow
    bits = _BITS.get(tensor.data_type)
    if bits is None:
        bits = int(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize) * 8
    return (elements * bits + 7) // 8


_BITS = {21: 4, 22: 4, 23: 4, 25: 2, 26: 2}  # UINT4, INT4, FLOAT4E2M1, UINT2, INT2: numpy uses a byte for each


def _storage_problem(tensor: onnx.TensorProto, files: Mapping[str, Any]) -> str | None:
    if any(dim < 0 for dim in tensor.dims):
        return f"has a negative size in its shape {list(tensor.dims)}"
    try:
        need = stored_bytes(tensor)
    except (KeyError, TypeError, ValueError):
        return f"has the unknown element type {tensor.data_type}"
    stored = external(tensor)
    if stored is None:
        if tensor.HasField("raw_data") and need is not None and len(tensor.raw_data) != need:
            return f"has {len(tensor.raw_data):,} bytes of data, its shape {list(tensor.dims)} needs {need:,}"
        return None
    if need is None:
        return "holds texts in an external file, which ONNX does not allow"
    location = stored.get("location", "")
    if not plain_name(location):
        return f"has its data at {location!r}, expected a plain file name inside the folder"
    if location not in files:
        return f"has its data in {location!r}, which is not a file of this bundle"
    size = files[location]["size"]
    try:
        offset = int(stored.get("offset", "0"))
        length = int(stored["length"]) if "length" in stored else size - offset
    except ValueError:
        return f"has an offset or length in {location} that is not a number"
    if offset < 0 or length < 0 or offset > size - length:
        return f"refers to bytes {offset:,} to {offset + length:,} of {location}, which holds {size:,}"
    if length != need:
        return f"has {length:,} bytes in {location}, its shape {list(tensor.dims)} needs {need:,}"
    return None


def load_tensor(folder: Path, tensor: onnx.TensorProto) -> np.ndarray[Any, Any]:
    """The tensor's values. External data is memory-mapped; 4-bit types are unpacked into a copy."""
    import onnx

    stored = external(tensor)
    plain = tensor.data_type not in _BITS
    if stored is not None and plain:
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
        if math.prod(tensor.dims) == 0:
            return np.zeros(tuple(tensor.dims), dtype)
        mapped = np.memmap(
            folder / stored["location"], dtype, "r", offset=int(stored.get("offset", "0")), shape=tuple(tensor.dims)
        )
        return mapped
    return onnx.numpy_helper.to_array(tensor, str(folder))


def _quantized(graph: onnx.GraphProto, initializers: set[str]) -> tuple[set[str], set[str]]:
    """(weights, scales): names of the initializers that are the data and the scales of a DequantizeLinear."""
    producers = {output: node for node in graph.node for output in node.output}

    def source(name: str) -> str:
        while name not in initializers and name in producers:
            node = producers[name]
            if node.op_type not in ("Transpose", "Gather", "Reshape", "Identity") or not node.input:
                break
            name = node.input[0]
        return name

    weights, scales = set(), set()
    for node in graph.node:
        if node.op_type == "DequantizeLinear" and len(node.input) >= 2:
            weights.add(source(node.input[0]))
            scales.add(source(node.input[1]))
    return weights & initializers, scales & initializers
