"""Damages a copy of a bundle at random, from a seed: bytes, JSON values, fields of the graph, weights, files.

The hashes and sizes of the manifest are renewed afterwards, so that the checks behind them are reached.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx

MANIFEST = "edgeformer.json"
NUMBERS = (-(2**63), -(2**31), -129, -1, 0, 1, 2, 3, 7, 127, 2**15, 2**31 - 1, 2**31, 2**62, 2**63 - 1)
VALUES = (
    *NUMBERS, 2**64, 1e308, -1.5, 0.1, True, False, None, "", "x", "input_ids", "logits", "float32", "../x",
    "/etc/passwd", "\x00", "ä" * 300, "-1", [], {}, [[]], [1], ["x"], {"": 0}, [None], {"content": 3}, "{{ 10**10 }}",
)  # fmt: skip
TYPES = (*range(27), 99, -1)
OPERATORS = (
    "Add", "Gather", "Reshape", "Transpose", "MatMul", "Attention", "RotaryEmbedding", "Slice", "Concat", "Split",
    "Cast", "DequantizeLinear", "Softmax", "Shape", "Identity", "Loop", "If", "Einsum", "Range", "Expand", "Nothing",
    "Constant", "Squeeze", "Conv", "RMSNormalization", "Tanh", "ReduceSum", "Where", "ConstantOfShape", "Tile",
)  # fmt: skip

Damage = Callable[[random.Random, Path], str]


def damaged(source: Path, target: Path, seed: int) -> str:
    """A damaged copy of the bundle `source` at `target`; a description of what was done."""
    rng = random.Random(seed)
    if target.exists():
        shutil.rmtree(target)
    shutil.copytree(source, target)
    done = [rng.choices(KINDS, WEIGHTS)[0](rng, target) for _ in range(rng.choice((1, 1, 1, 2, 2, 3)))]
    if rng.random() < 0.95:
        renew(target)
    return "; ".join(done)


def renew(folder: Path) -> None:
    """Writes the sizes and hashes of the files as they are now into the manifest, if that can be parsed."""
    import hashlib

    path = folder / MANIFEST
    if not path.is_file():  # a FIFO or /dev/zero would never end
        return
    try:
        manifest = json.loads(path.read_text())
        files = manifest["files"]
        for name in files:
            data = (folder / name).read_bytes() if (folder / name).is_file() else None
            if data is not None and isinstance(files[name], dict):
                files[name] |= {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        path.write_text(json.dumps(manifest))
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return


# ---------------------------------------------------------------------------------------------------------------- bytes


def _a_file(rng: random.Random, folder: Path) -> Path:
    return rng.choice(sorted(path for path in folder.iterdir() if path.is_file()))


def flip(rng: random.Random, folder: Path) -> str:
    """A few bytes of a file change."""
    path = _a_file(rng, folder)
    data = bytearray(path.read_bytes())
    most = [min(len(data), rng.choice((64, 4096, len(data)))) for _ in range(rng.choice((1, 1, 4)))]
    places = [rng.randrange(limit) for limit in most if limit]
    for at in places:
        data[at] = rng.choice((data[at] ^ (1 << rng.randrange(8)), 0, 255, rng.randrange(256)))
    path.write_bytes(data)
    return f"flip {path.name} at {places}"


def cut(rng: random.Random, folder: Path) -> str:
    """A file ends early, grows, or loses or repeats a part."""
    path = _a_file(rng, folder)
    data, how = path.read_bytes(), rng.choice(("cut", "grow", "drop", "repeat", "empty"))
    a, b = sorted((rng.randrange(len(data) + 1), rng.randrange(len(data) + 1)))
    b = min(b, a + rng.choice((1, 16, 4096, len(data))))
    changed = {
        "cut": data[:a],
        "grow": data + bytes(rng.randrange(1, 64)),
        "drop": data[:a] + data[b:],
        "repeat": data[:b] + data[a:],
        "empty": b"",
    }
    path.write_bytes(changed[how])
    return f"{how} {path.name} {a}..{b}"


def file(rng: random.Random, folder: Path) -> str:
    """A file is missing, or is something else."""
    path, other = _a_file(rng, folder), _a_file(rng, folder)
    how = rng.choice(("missing", "folder", "zero", "fifo", "link", "loop", "html", "lfs", "swapped", "unreadable"))
    if how == "swapped":
        data = other.read_bytes()
        other.write_bytes(path.read_bytes())
        path.write_bytes(data)
        return f"{path.name} and {other.name} swapped"
    path.unlink()
    if how == "folder":
        path.mkdir()
    elif how == "zero":
        path.symlink_to("/dev/zero")
    elif how == "fifo":
        os.mkfifo(path)
    elif how == "link":
        path.symlink_to("../" * 40 + "etc/hostname")
    elif how == "loop":
        path.symlink_to(path.name)
    elif how == "html":
        path.write_text("<!DOCTYPE html><title>404</title>")
    elif how == "lfs":
        path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    elif how == "unreadable":
        path.write_bytes(b"x")
        path.chmod(0)
    return f"{path.name} is {how}"


# ----------------------------------------------------------------------------------------------------------------- JSON


def json_value(rng: random.Random, folder: Path) -> str:
    """A value in one of the JSON files becomes another, is missing, or stands elsewhere too."""
    path = rng.choice([path for path in sorted(folder.glob("*.json")) if path.is_file()] or [folder / "none"])
    try:
        tree = json.loads(path.read_text())
    except (OSError, ValueError):
        return "nothing"
    places: list[tuple[object, object]] = []
    stack = [tree]
    while stack:
        one = stack.pop()
        keys = list(one) if isinstance(one, dict) else range(min(len(one), 20)) if isinstance(one, list) else []
        places += [(one, key) for key in keys]
        stack += [one[key] for key in keys]
    if not places:
        return "nothing"
    # Places near the root are few and mean more: each depth is as likely.
    owner, key = rng.choice(places if rng.random() < 0.5 else [p for p in places if p[0] is tree] or places)
    how = rng.choice(("value", "value", "value", "missing", "other"))
    before = repr(owner[key])[:40]
    if how == "missing":
        del owner[key]
    elif how == "other":
        owner[key] = (lambda place: place[0][place[1]])(rng.choice(places))
    else:
        owner[key] = rng.choice(VALUES)
    try:
        text = json.dumps(tree)
    except (ValueError, RecursionError):
        return "nothing"
    path.write_text(text)
    return f"{path.name}: {how} of {key!r}, was {before}"


# ---------------------------------------------------------------------------------------------------------------- graph


def graph(rng: random.Random, folder: Path) -> str:
    """A field of the graph changes; the file can be parsed afterwards."""
    paths = sorted(path for path in folder.glob("*.onnx") if path.is_file())
    try:
        path = rng.choice(paths)
        model = onnx.load(str(path), load_external_data=False)
        done = rng.choice(GRAPH)(rng, model.graph, model)
        path.write_bytes(model.SerializeToString())
    except (IndexError, ValueError, OSError, TypeError) as error:
        return f"nothing ({type(error).__name__})"
    except Exception as error:  # DecodeError of a file that another damage made unreadable
        return f"nothing ({type(error).__name__})"
    return f"{path.name}: {done}"


def _name(rng, g):
    nodes = [name for node in g.node for name in (*node.input, *node.output)]
    return rng.choice([*nodes, *(t.name for t in g.initializer), *(v.name for v in g.input), "", "nowhere"])


def _operator(rng, g, _):
    node = rng.choice(g.node)
    before, node.op_type = node.op_type, rng.choice(OPERATORS)
    return f"{node.name}: {before} is {node.op_type}"


def _input(rng, g, _):
    node = rng.choice(g.node)
    how = rng.choice(("name", "name", "drop", "more", "swap"))
    if how == "name":
        node.input[rng.randrange(len(node.input))] = _name(rng, g)
    elif how == "drop":
        del node.input[rng.randrange(len(node.input)) :]
    elif how == "more":
        node.input.extend([_name(rng, g)] * rng.choice((1, 2, 9)))
    else:
        a, b = rng.randrange(len(node.input)), rng.randrange(len(node.input))
        node.input[a], node.input[b] = node.input[b], node.input[a]
    return f"{node.name}: input {how}, now {list(node.input)}"


def _output(rng, g, _):
    node = rng.choice(g.node)
    how = rng.choice(("name", "drop", "more"))
    if how == "name":
        node.output[rng.randrange(len(node.output))] = _name(rng, g)
    elif how == "drop":
        del node.output[rng.randrange(len(node.output)) :]
    else:
        node.output.append(_name(rng, g))
    return f"{node.name}: output {how}, now {list(node.output)}"


def _attribute(rng, g, _):
    node = rng.choice([node for node in g.node if node.attribute])
    at = rng.randrange(len(node.attribute))
    a = node.attribute[at]
    name, how = a.name, rng.choice(("value", "value", "value", "drop", "type", "rename", "twice"))
    if how == "drop":
        del node.attribute[at]
    elif how == "type":
        a.type = rng.randrange(1, 15)
    elif how == "rename":
        a.name = rng.choice(("axis", "perm", "is_causal", "x", "", "value", "block_size"))
    elif how == "twice":
        node.attribute.add().CopyFrom(a)
    elif a.ints:
        a.ints[rng.randrange(len(a.ints))] = rng.choice(NUMBERS)
    elif a.type == onnx.AttributeProto.FLOAT:
        a.f = rng.choice((float("nan"), float("inf"), 0.0, -1.0, 1e30, 1e-40))
    elif a.type == onnx.AttributeProto.STRING:
        a.s = rng.choice((b"", b"\xff\xfe", b"x" * 1000, b"relu"))
    else:
        a.i = rng.choice(NUMBERS)
    return f"{node.name}: attribute {name} {how}"


def _node(rng, g, _):
    at, how = rng.randrange(len(g.node)), rng.choice(("drop", "twice", "move", "domain", "subgraph"))
    node = g.node[at]
    name = node.name
    if how == "drop":
        del g.node[at]
    elif how == "twice":
        g.node.add().CopyFrom(node)
    elif how == "domain":
        node.domain = rng.choice(("com.microsoft", "ai.onnx.ml", "x", "\0"))
    elif how == "subgraph":
        attribute = node.attribute.add(name=rng.choice(("body", "then_branch", "x")), type=onnx.AttributeProto.GRAPH)
        attribute.g.node.add(op_type="Identity", input=[_name(rng, g)], output=["inner"])
    else:
        moved = onnx.NodeProto()
        moved.CopyFrom(node)
        del g.node[at]
        g.node.insert(rng.randrange(len(g.node) + 1), moved)
    return f"{name}: {how}"


def _initializer(rng, g, _):
    t = rng.choice(g.initializer)
    how = rng.choice(("dim", "dims", "type", "name", "place", "raw", "drop", "twice", "values"))
    if how == "dim":
        t.dims[rng.randrange(len(t.dims))] = rng.choice(NUMBERS)
    elif how == "dims":
        dims = list(t.dims)
        changed = rng.choice(
            ([], dims[::-1], [*dims, 1], [1, *dims], [int(np.prod(dims, dtype=object))], [0], [1] * 5000)
        )
        del t.dims[:]
        t.dims.extend(changed)
    elif how == "type":
        t.data_type = rng.choice(TYPES)
    elif how == "name":
        t.name = _name(rng, g)
    elif how == "place" and t.external_data:
        entry = rng.choice(t.external_data)
        entry.value = str(
            rng.choice((*NUMBERS, 2**64 - 64, "x", "", "../x", "model.onnx", "config.json", "1e3", " 64"))
        )
    elif how == "raw":
        t.raw_data = rng.choice((b"", b"\0", bytes(64), t.raw_data + b"\0", b"\xff" * len(t.raw_data)))
        t.data_location = onnx.TensorProto.DEFAULT
    elif how == "drop":
        name = t.name
        g.initializer.remove(t)
        return f"initializer {name} dropped"
    elif how == "twice":
        g.initializer.add().CopyFrom(t)
    elif t.raw_data and t.data_type == onnx.TensorProto.INT64:
        values = np.frombuffer(t.raw_data, np.int64).copy()
        values[rng.randrange(len(values))] = rng.choice(NUMBERS)
        t.raw_data = values.tobytes()
    return f"initializer {t.name} {how}"


def _port(rng, g, _):
    ports = rng.choice((g.input, g.output, g.value_info or g.input))
    at = rng.randrange(len(ports))
    port, how = ports[at], rng.choice(("name", "type", "dim", "rank", "drop", "twice", "sequence"))
    name, tensor = port.name, port.type.tensor_type
    if how == "name":
        port.name = _name(rng, g)
    elif how == "type":
        tensor.elem_type = rng.choice(TYPES[:-1])
    elif how == "dim":
        dim = tensor.shape.dim[rng.randrange(len(tensor.shape.dim))]
        if rng.random() < 0.5:
            dim.dim_value = rng.choice(NUMBERS)
        else:
            dim.dim_param = rng.choice(("", "batch", "sequence", "x", "past_sequence", "ä\n", "1", "batch*2"))
    elif how == "rank":
        if rng.random() < 0.5:
            tensor.shape.dim.add(dim_value=1)
        else:
            tensor.ClearField("shape")
    elif how == "drop":
        del ports[at]
    elif how == "twice":
        ports.add().CopyFrom(port)
    else:
        port.type.sequence_type.elem_type.tensor_type.elem_type = 1
    return f"port {name} {how}"


def _model(rng, g, model):
    how = rng.choice(("opset", "opset", "ir", "domain", "none", "function", "sparse"))
    if how == "opset":
        model.opset_import[0].version = rng.choice((*NUMBERS, 13, 17, 21, 22, 24, 99))
    elif how == "ir":
        model.ir_version = rng.choice(NUMBERS)
    elif how == "domain":
        model.opset_import[0].domain = rng.choice(("x", "ai.onnx", "com.microsoft"))
    elif how == "none":
        del model.opset_import[:]
    elif how == "function":
        node = g.node[0]
        function = model.functions.add(name=node.op_type, domain="", input=list(node.input), output=list(node.output))
        function.node.add(op_type=node.op_type, input=list(node.input), output=list(node.output))
    else:
        sparse = g.sparse_initializer.add()
        sparse.values.CopyFrom(g.initializer[0])
        sparse.dims.append(rng.choice(NUMBERS))
    return f"model {how}"


GRAPH = (_operator, _input, _input, _output, _attribute, _attribute, _node, _initializer, _initializer, _port, _model)


# -------------------------------------------------------------------------------------------------------------- weights


def weights(rng: random.Random, folder: Path) -> str:
    """Stored numbers become NaN, infinite, -128 or others."""
    paths = sorted(path for path in folder.glob("*.onnx.data") if path.is_file())
    if not paths:
        return "nothing"
    data = bytearray(paths[0].read_bytes())
    if len(data) < 16:
        return "nothing"
    bad = rng.choice((np.nan, np.inf, -np.inf, 3e38, 1e-42))
    width = rng.choice((4, 4, 1024))
    at = rng.randrange(len(data) // 4) * 4
    filler = b"\x80" if rng.random() < 0.3 else np.float32(bad).tobytes()
    data[at : at + width] = (filler * width)[:width]
    paths[0].write_bytes(data)
    return f"weights at {at}: {width} bytes of {filler!r}"


KINDS: tuple[Damage, ...] = (graph, json_value, flip, cut, weights, file)
WEIGHTS = (10, 8, 4, 3, 3, 2)
