"""Masks as plain as they can be said."""

from __future__ import annotations

import onnx_ir as ir
import onnx_ir.passes.common as common

from edgeformer.export.passes.edit import array, nodes, redirect


def drop_true(model: ir.Model) -> None:
    """`And(x, true)` becomes `x`: transformers starts its rules from there, and engines read rules, not arrays."""
    for node in nodes(model, "And"):
        for one, other in ((0, 1), (1, 0)):
            true, rest = array(node.inputs[one]), node.inputs[other]
            if true is not None and true.size == 1 and bool(true.all()) and rest is not None:
                redirect(model, node.outputs[0], rest)
                model.graph.remove(node, safe=True)
                break
    common.RemoveUnusedNodesPass()(model)
