"""float32 -> float16, for GPUs: weights, activations and KV cache; rotary angles stay float32 up to Cos and Sin."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.tape import Tape

from edgeformer.export.passes.edit import ancestors, nodes

_F32, _F16 = ir.DataType.FLOAT, ir.DataType.FLOAT16


def to_float16(model: ir.Model) -> None:
    """Every float32 value -> float16, except those that only Cos and Sin depend on.

    Those stay float32: in half precision an angle above 1024 is rounded to whole numbers.
    """
    angles = ancestors([node for node in model.graph if node.op_type in ("Cos", "Sin")])
    for node in nodes(model, "Cos", "Sin"):
        tape = Tape()
        half = tape.op("Cast", [node.outputs[0]], {"to": int(_F16)})
        half.shape = node.outputs[0].shape
        for use in tuple(node.outputs[0].uses()):
            if use.node is not half.producer() and use.node not in angles:
                use.node.replace_input_with(use.idx, half)
        model.graph.insert_after(node, tape.nodes)
    precise = {value for node in angles for value in (*node.inputs, *node.outputs) if value is not None}
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        if value.dtype == _F32 and value not in precise:
            _halve(value)
    for node in model.graph:
        if node in angles:
            continue
        if node.op_type == "Cast" and node.attributes["to"].value == int(_F32):
            node.attributes["to"] = ir.AttrInt64("to", int(_F16))
        for output in node.outputs:
            if output.dtype == _F32:
                output.type = ir.TensorType(_F16)  # a new object: clones of the graph share the type


def _halve(value: ir.Value) -> None:
    value.type = ir.TensorType(_F16)
    if value.const_value is not None:
        limit, wide = np.float32(65504), value.const_value

        def half() -> ir.TensorProtocol:  # converted when it is written: memory never has a second copy of all weights
            return ir.Tensor(np.clip(wide.numpy(), -limit, limit).astype(np.float16))

        value.const_value = ir.LazyTensor(half, _F16, ir.Shape(wide.shape.numpy()), name=value.name)
