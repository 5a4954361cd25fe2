"""Weights that are one slice of a larger parameter: an expert's matrix in the stack of all experts'."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common

from edgeformer.export.passes.edit import array, initializer, integers, nodes, redirect


def own_slices(model: ir.Model) -> None:
    """`Gather(parameter [E, N, K], constant scalar e)` becomes an initializer `parameter.e` [N, K].

    So the slice is a matrix like any linear layer's; `plan` finds it in the module by its name.
    """
    for node in nodes(model, "Gather"):
        stack, index = node.inputs[0], array(node.inputs[1])
        constant = stack is not None and stack.is_initializer() and index is not None and index.ndim == 0
        if not constant or integers(node, "axis") or stack is None or index is None or len(stack.shape or ()) < 2:
            continue
        content = array(stack)
        assert content is not None
        name = f"{stack.name}.{int(index) % len(content)}"
        found = model.graph.initializers.get(name)
        if found is None:
            found = initializer(model, name, ir.Tensor(np.ascontiguousarray(content[int(index)]), name=name))
        redirect(model, node.outputs[0], found)
        model.graph.remove(node, safe=True)
    common.RemoveUnusedNodesPass()(model)
