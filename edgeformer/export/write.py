"""The files of a bundle: graphs and weights, texts, reference values, and the content of the manifest."""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import onnx
import onnx_ir as ir

from edgeformer.export.check import parity
from edgeformer.export.check.checks import ModelChecks
from edgeformer.export.check.graph_run import FILES, open_graphs
from edgeformer.export.options import ExportOptions
from edgeformer.export.quantize.dequantized import dequantized_weights
from edgeformer.export.quantize.plan import Quantization
from edgeformer.export.scratch import PIECE, write_pieces
from edgeformer.export.source import AnySource, Source


def save_models(models: Mapping[str, ir.Model], folder: Path) -> None:
    """Writes the graphs to their files in `folder`, which is made if it is missing."""
    for name, model in models.items():
        save_graph(model, folder / FILES[name])


def save_graph(model: ir.Model, path: Path) -> None:
    """Writes the graph to `path`, and its weights to `<path>.data`, each at an aligned offset."""
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if isinstance(tensor, ir.Tensor | ir.LazyTensor) and tensor.nbytes > PIECE and tensor.dtype.itemsize >= 1:
            value.const_value = _InPieces(tensor)
    ir.save(model, path, external_data=f"{path.name}.data", size_threshold_bytes=1024)
    _name_batch(path)
    onnx.checker.check_model(str(path), full_check=False)


class _InPieces(ir.LazyTensor):
    """A tensor that is written piece by piece: Ctrl-C waits for one of them."""

    def __init__(self, tensor: ir.Tensor[Any] | ir.LazyTensor) -> None:
        super().__init__(lambda: tensor, tensor.dtype, tensor.shape, name=tensor.name)

    def tofile(self, file: BinaryIO) -> None:
        """Writes its bytes."""
        values = np.ascontiguousarray(self.numpy())
        write_pieces(file, values.astype(values.dtype.newbyteorder("<"), copy=False).reshape(-1).view(np.uint8))


def _name_batch(path: Path) -> None:
    """Names the axis `batch` `batch_size`: only for that name transformers.js gives its empty cache one row."""
    graph = (model := onnx.load(str(path), load_external_data=False)).graph
    for value in (*graph.input, *graph.output, *graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param == "batch":
                dim.dim_param = "batch_size"
    path.write_bytes(model.SerializeToString())


def write_reference(checks: ModelChecks, folder: Path, quantization: Quantization, *, exact: bool) -> dict[str, float]:
    """Writes `reference.npz`: one input, PyTorch's outputs and the bundle's. Returns {output: tolerance of `verify`}.

    A device may order its sums differently and round its activations by another rule of the same precision. So the
    tolerance of a bundle that is not `exact` (float32) is measured: the change that onnxruntime's int8 activations
    make to these outputs, as a fraction of their range, times three: two such engines differ by at most the sum of
    their two errors, and the cache is rounded too. To that, ten times the tolerance of the float gate is added.
    """
    source, inputs = checks.source, checks.reference_inputs()
    found = checks.in_graphs(inputs, open_graphs(folder, source.parts))
    original = checks.in_pytorch(inputs)
    change = 0.0
    if not exact:
        with dequantized_weights(source.first.module, quantization.weights):
            change = parity.compare_outputs("reference", checks.in_pytorch(inputs), found).worst
    rows = checks.reference_rows
    stored: dict[str, Any] = {f"input.{name}": value.numpy() for name, value in inputs.items()}
    stored |= {f"float.{name}": value[:, rows] for name, value in original.items()}
    stored |= {f"bundle.{name}": value[:, rows] for name, value in found.items()}
    np.savez_compressed(folder / "reference.npz", **stored)
    return dict.fromkeys(original, 3 * change + 10 * parity.TOLERANCE)


def write_texts(source: Source, folder: Path) -> None:
    """Writes config.json, generation_config.json and the files of the tokenizer and preprocessing."""
    for name, content in (("config.json", source.config), ("generation_config.json", source.generation_config)):
        if content or name == "config.json":
            text = json.dumps(dict(content), indent=2, ensure_ascii=False, default=str)
            (folder / name).write_text(text + "\n", encoding="utf-8")
    for name, data in source.files.items():
        (folder / name).write_bytes(data)


def manifest(
    models: Mapping[str, ir.Model],
    source: AnySource,
    options: ExportOptions,
    quantization: Quantization,
    reports: Mapping[str, Any],
) -> dict[str, Any]:
    """The content of edgeformer.json without its list of files. `reports` are the results of the checks."""
    first = source.first
    return {
        "task": first.task,
        "producer": _versions(),
        "graphs": {name: _graph(models[name], FILES[name], part) for name, part in source.parts.items()},
        "quantization": _quantization(list(models.values())[-1], options, quantization),
        **reports,
        **({"processing": dict(first.processing)} if first.processing else {}),
        **({"completeness": dict(first.completeness)} if first.completeness else {}),
        "provenance": {
            "source": first.origin,
            "revision": str(first.config.get("_commit_hash") or ""),
            "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
            "recipe": {key: str(value) for key, value in vars(options).items() if value not in (None, (), False)},
            "license": first.license,
            **({"adapter": dict(first.adapter)} if first.adapter else {}),
        },
    }


def _quantization(model: ir.Model, options: ExportOptions, quantization: Quantization) -> dict[str, Any]:
    """What the manifest says of the weights; `model` is the graph with the output layer."""
    weights = quantization.weights
    used = [weight.blocks for weight in weights if weight.blocks is not None]
    size = sum(blocks.q.size for blocks in used)
    bits = sum(blocks.q.size * blocks.bits_per_weight for blocks in used)
    schemes = [blocks.scheme for blocks in used]
    gathered = [node for node in model.graph if node.op_type == "Gather" and node.inputs[0].is_initializer()]  # type: ignore[union-attr]
    tables = [node.inputs[0] for node in gathered if node.inputs[0].dtype == ir.DataType.INT8]  # type: ignore[union-attr]
    tied = any(use.node.op_type == "Transpose" for table in tables for use in table.uses())  # type: ignore[union-attr]
    own = next((w.blocks.scheme if w.blocks else options.dtype for w in weights if w.own_head), None)
    return {
        "scheme": quantization.scheme,
        "block_size": options.block if quantization.scheme in ("q4a", "q4", "q8") else None,
        "embedding": "q8" if tables else options.dtype,
        "head": own or ("tied" if tied else schemes[-1] if schemes else options.dtype),
        "dtype": options.dtype,
        "bits_per_weight": round(bits / size, 3) if size else (16.0 if options.dtype == "float16" else 32.0),
        "tensors": {name: schemes.count(name) for name in dict.fromkeys(schemes)},
        "calibration": _calibration(quantization),
    }


def _calibration(quantization: Quantization) -> dict[str, Any] | None:
    text, count = quantization.calibration, sum(weight.calibrated for weight in quantization.weights)
    if text is None or not count:
        return None
    return {"method": "GPTQ", "tensors": count, "tokens": text.ids.size, "source": text.source}


def _graph(model: ir.Model, file: str, source: Source) -> dict[str, Any]:
    """One graph as the manifest describes it, with the number of its learned positions if it has some."""
    described = {"file": file, "inputs": _shapes(model.graph.inputs), "outputs": _shapes(model.graph.outputs)}
    return described if source.positions is None else described | {"positions": source.positions}


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
