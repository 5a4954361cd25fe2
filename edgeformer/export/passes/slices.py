"""A constant slice of a parameter, such as one expert's matrix in the stack of all experts -> an initializer."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common

from edgeformer.export.passes.edit import array, initializer, integers, nodes, redirect


def slice_parameters(model: ir.Model) -> None:
    """`Gather(parameter [E, N, K], constant scalar e)` -> an initializer `parameter.e` [N, K].

    It can then be quantized like the weight of any linear layer; `quantize.plan` finds it in the module by its name.
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
        redirect(node.outputs[0], found)
        model.graph.remove(node, safe=True)
    common.RemoveUnusedNodesPass()(model)
