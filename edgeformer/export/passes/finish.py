"""The last pass: standard operators only, sorted nodes, no metadata."""

from __future__ import annotations

import onnx_ir as ir
import onnx_ir.passes.common as common

from edgeformer.errors import ExportError
from edgeformer.export.trace.trace import IR_VERSION, OPSET


def finish(model: ir.Model, description: str) -> None:
    """Merges common subexpressions, sorts and names nodes, removes metadata; sets opset 23 and IR version 10.

    Raises:
        ExportError: the graph has an operator outside the ONNX standard.
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
        raise ExportError(
            f"the graph has operators outside the ONNX standard: {', '.join(foreign) or 'functions'}; expected "
            "standard ones only. Replace what makes them in the module's forward."
        )
    model.opset_imports.clear()
    model.opset_imports[""] = OPSET
    model.ir_version = IR_VERSION
    model.producer_name, model.producer_version, model.graph.name = "edgeformer", None, "main"
    model.doc_string = description
    for index, node in enumerate(model.graph):
        node.name = f"{node.op_type}_{index}"
