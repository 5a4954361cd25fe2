"""The last pass: only what the standard needs stays in the file."""

from __future__ import annotations

import onnx_ir as ir
import onnx_ir.passes.common as common

from edgeformer.errors import ExportError
from edgeformer.export.trace.trace import IR_VERSION, OPSET


def finish(model: ir.Model, description: str) -> None:
    """Sorts, merges, names and strips; sets opset 23 and IR 10.

    Raises:
        ExportError: an operator outside the standard is left in the graph.
    """
    for tidy in (
        common.CommonSubexpressionEliminationPass(),
        common.RemoveUnusedNodesPass(),
        common.TopologicalSortPass(),
        common.ClearMetadataAndDocStringPass(),
    ):
        tidy(model)
    foreign = sorted({f"{node.domain}::{node.op_type}" for node in model.graph if node.domain not in ("", "ai.onnx")})
    if foreign or model.functions:
        raise ExportError(f"the graph holds operators outside the ONNX standard: {', '.join(foreign) or 'functions'}.")
    model.opset_imports.clear()
    model.opset_imports[""] = OPSET
    model.ir_version = IR_VERSION
    model.producer_name, model.producer_version, model.graph.name = "edgeformer", None, "main"
    model.doc_string = description
    for index, node in enumerate(model.graph):
        node.name = f"{node.op_type}_{index}"
