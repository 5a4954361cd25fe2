"""The files of a bundle: graph and weights, texts, reference values, and what the manifest says of them."""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from edgeformer.export.check import parity
from edgeformer.export.check.graph_run import Graph
from edgeformer.export.inputs import axes
from edgeformer.export.options import ExportOptions
from edgeformer.export.quantize.calibrate import Calibration
from edgeformer.export.quantize.plan import Quantized, holding
from edgeformer.export.source import Source, run

GRAPH = "model.onnx"
_REFERENCE_LENGTH = 24
_REFERENCE_KEPT = 8  # logits of all positions would be megabytes


def save_graph(model: ir.Model, path: Path) -> None:
    """Writes the graph, and its weights to `<name>.data` beside it, each at an aligned offset."""
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    ir.save(model, path, external_data=f"{path.name}.data", size_threshold_bytes=1024)
    _name_batch(path)
    onnx.checker.check_model(str(path), full_check=False)


def _name_batch(path: Path) -> None:
    """The first axis is `batch_size` in the file: transformers.js gives its empty cache one row only by that name."""
    graph = (model := onnx.load(str(path), load_external_data=False)).graph
    for value in (*graph.input, *graph.output, *graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param == "batch":
                dim.dim_param = "batch_size"
    path.write_bytes(model.SerializeToString())


def write_reference(source: Source, folder: Path, weights: Sequence[Quantized], exact: bool) -> dict[str, float]:
    """`reference.npz`: one input with PyTorch's outputs and the bundle's; returns what `verify` may differ by.

    A device may order its sums otherwise and round its activations by another rule of the same fineness. So the bound
    is measured, not guessed: what onnxruntime's int8 activations moved these very outputs (as a fraction of their
    range), three times: two such engines differ by at most the sum of both errors, and the cache is rounded too. Plus
    ten times the float gate.
    """
    sizes = {axis: 1 if index == 0 else _REFERENCE_LENGTH for index, axis in enumerate(axes(source.inputs))}
    if source.is_language_model:
        feeds = parity.text_feeds(source, sizes, 99)
    else:
        feeds = {value.name: value.sample(sizes, 99 + index) for index, value in enumerate(source.inputs)}
    arrays = {name: value.numpy() for name, value in feeds.items()}
    found, _ = Graph(folder / GRAPH)(arrays)
    original = run(source, feeds)
    moved = 0.0
    if not exact:
        with holding(source.module, weights):
            moved = parity.compare("reference", run(source, feeds), found).worst
    rows = slice(-_REFERENCE_KEPT, None) if source.is_language_model else slice(None)
    stored: dict[str, Any] = {f"input.{name}": value for name, value in arrays.items()}
    stored |= {f"float.{name}": value[:, rows] for name, value in original.items()}
    stored |= {f"bundle.{name}": value[:, rows] for name, value in found.items()}
    np.savez_compressed(folder / "reference.npz", **stored)
    return dict.fromkeys(source.outputs, 3 * moved + 10 * parity.TOLERANCE)


def write_texts(source: Source, folder: Path) -> None:
    """config.json, generation_config.json and the tokenizer's files."""
    for name, content in (("config.json", source.config), ("generation_config.json", source.generation_config)):
        if content or name == "config.json":
            text = json.dumps(dict(content), indent=2, ensure_ascii=False, default=str)
            (folder / name).write_text(text + "\n", encoding="utf-8")
    for name, data in source.files.items():
        (folder / name).write_bytes(data)


def manifest(
    model: ir.Model,
    source: Source,
    options: ExportOptions,
    scheme: str,
    weights: Sequence[Quantized],
    calibration: Calibration | None = None,
    **reports: Any,
) -> dict[str, Any]:
    """What edgeformer.json says, before its list of files."""
    return {
        "task": source.task,
        "producer": _versions(),
        "graphs": {"model": graph_shapes(model, GRAPH, source.positions)},
        "quantization": _quantization(model, options, scheme, weights) | {"calibration": _fitted(weights, calibration)},
        **reports,
        **({"completeness": dict(source.completeness)} if source.completeness else {}),
        "provenance": {
            "source": source.origin,
            "revision": str(source.config.get("_commit_hash") or ""),
            "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
            "recipe": {key: str(value) for key, value in vars(options).items() if value not in (None, (), False)},
            "license": source.license,
            **({"adapter": dict(source.adapter)} if source.adapter else {}),
        },
    }


def _quantization(model: ir.Model, options: ExportOptions, scheme: str, weights: Sequence[Quantized]) -> dict[str, Any]:
    used = [weight.blocks for weight in weights if weight.blocks is not None]
    size = sum(blocks.q.size for blocks in used)
    bits = sum(blocks.q.size * blocks.bits_per_weight for blocks in used)
    schemes = [blocks.scheme for blocks in used]
    gathered = [node for node in model.graph if node.op_type == "Gather" and node.inputs[0].is_initializer()]  # type: ignore[union-attr]
    tables = [node.inputs[0] for node in gathered if node.inputs[0].dtype == ir.DataType.INT8]  # type: ignore[union-attr]
    tied = any(use.node.op_type == "Transpose" for table in tables for use in table.uses())  # type: ignore[union-attr]
    own = next((w.blocks.scheme if w.blocks else options.dtype for w in weights if w.own_head), None)
    return {
        "scheme": scheme,
        "block_size": options.block if scheme in ("q4a", "q4", "q8") else None,
        "embedding": "q8" if tables else options.dtype,
        "head": own or ("tied" if tied else schemes[-1] if schemes else options.dtype),
        "dtype": options.dtype,
        "bits_per_weight": round(bits / size, 3) if size else (16.0 if options.dtype == "float16" else 32.0),
        "tensors": {name: schemes.count(name) for name in dict.fromkeys(schemes)},
    }


def _fitted(weights: Sequence[Quantized], calibration: Calibration | None) -> dict[str, Any] | None:
    count = sum(weight.calibrated for weight in weights)
    if calibration is None or not count:
        return None
    return {"method": "GPTQ", "tensors": count, "tokens": calibration.ids.size, "source": calibration.source}


def graph_shapes(model: ir.Model, file: str, positions: int | None = None) -> dict[str, Any]:
    """One graph of a bundle as the manifest describes it; `positions` are those that it has learned, if it has."""
    shapes = {"file": file, "inputs": _shapes(model.graph.inputs), "outputs": _shapes(model.graph.outputs)}
    return shapes if positions is None else shapes | {"positions": positions}


def _shapes(values: Iterable[ir.Value]) -> dict[str, Any]:
    described = {}
    for value in values:
        assert value.name is not None and value.shape is not None and value.dtype is not None
        dims = [dim if isinstance(dim, int) else str(dim.value) for dim in value.shape]
        described[value.name] = {"dtype": value.dtype.numpy().name, "shape": dims}
    return described


def _versions() -> dict[str, str]:
    found = {}
    for name in ("edgeformer", "torch", "transformers", "onnx", "onnxscript", "onnxruntime"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
