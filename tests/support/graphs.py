"""Small helpers to look at graphs before and after a pass."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort


def parse(text: str, **initializers: np.ndarray) -> ir.Model:
    """A model from ONNX's text form (opset 23, `edgeformer` 1), with float32 initializers by name."""
    header = '<ir_version: 10, opset_import: ["" : 23, "edgeformer" : 1]>'
    proto = onnx.parser.parse_model(f"{header}\nmain {text}")
    for name, values in initializers.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto, data_prop=True))


def ops(model: ir.Model) -> list[str]:
    """The operators in order; another domain's with its name."""
    return [f"{node.domain}::{node.op_type}" if node.domain else node.op_type for node in model.graph]


def run(model: ir.Model, **feeds: np.ndarray) -> list[np.ndarray]:
    """The graph's outputs on onnxruntime, every operator as written."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, feeds)
