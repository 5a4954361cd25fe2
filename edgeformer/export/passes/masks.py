"""Simplifies masks and gives them the shape that onnxruntime takes."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common
from onnx_ir.tape import Tape

from edgeformer.export.passes.edit import array, constant, nodes, redirect


def drop_true(model: ir.Model) -> None:
    """`And(x, true)` -> `x`: transformers builds its masks from a constant true."""
    for node in nodes(model, "And"):
        for one, other in ((0, 1), (1, 0)):
            true, rest = array(node.inputs[one]), node.inputs[other]
            if true is not None and true.size == 1 and bool(true.all()) and rest is not None:
                redirect(node.outputs[0], rest)
                model.graph.remove(node, safe=True)
                break
    common.RemoveUnusedNodesPass()(model)


def spread_rows(model: ir.Model) -> None:
    """`Attention(mask [.., 1, keys])` -> `Attention(Expand(mask) [.., queries, keys])`.

    onnxruntime (1.25 to 1.32) does not broadcast a mask over the queries.
    """
    for node in nodes(model, "Attention"):
        mask, q = node.inputs[3] if len(node.inputs) > 3 else None, node.inputs[0]
        narrow = mask is not None and mask.shape is not None and (len(mask.shape) < 2 or mask.shape[-2] == 1)
        if mask is None or q is None or not narrow or (q.shape is not None and q.shape[2] == 1):
            continue
        tape = Tape()
        one = constant(model, "axis_1", np.array([1], np.int64))
        size = tape.op("Concat", [one, one, tape.op("Shape", [q], {"start": 2, "end": 3}), one], {"axis": 0})
        wide = tape.op("Expand", [mask, size])
        wide.type = mask.type
        model.graph.insert_before(node, tape.nodes)
        node.replace_input_with(3, wide)
    common.CommonSubexpressionEliminationPass()(model)
