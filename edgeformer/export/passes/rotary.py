"""RotaryEmbedding with cos and sin of batch size 1 -> with those of the input's batch size."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.tape import Tape

from edgeformer.export.passes.edit import constant, nodes


def full_angles(model: ir.Model) -> None:
    """`RotaryEmbedding(x, cos, sin)` -> `RotaryEmbedding(x, Expand(cos), Expand(sin))` [batch, sequence, size].

    A model that computes positions itself has cos and sin [1, sequence, size], which PyTorch broadcasts; ONNX
    RotaryEmbedding-23 does not.
    """
    expanded: dict[ir.Value, ir.Value] = {}
    for node in nodes(model, "RotaryEmbedding"):
        x, caches = node.inputs[0], node.inputs[1:3]
        if len(node.inputs) > 3 and node.inputs[3] is not None:
            continue  # with position_ids, cos and sin are tables without a batch axis
        for index, cache in enumerate(caches, start=1):
            once = cache is not None and cache.shape is not None and len(cache.shape) == 3 and cache.shape[0] == 1
            if not once or cache is None or x is None or (x.shape is not None and x.shape[0] == 1):
                continue
            if cache not in expanded:
                tape = Tape()
                ones = constant(model, "ones_2", np.array([1, 1], np.int64))
                batch = tape.op("Shape", [x], {"start": 0, "end": 1})
                expanded[cache] = tape.op("Expand", [cache, tape.op("Concat", [batch, ones], {"axis": 0})])
                model.graph.insert_before(node, tape.nodes)
            node.replace_input_with(index, expanded[cache])
