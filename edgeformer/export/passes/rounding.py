"""x -> round(x / s) * s: simulates int8 activations in a float graph, to bound the error that an engine may have.

Engines multiply quantized weights with activations that they round to int8 with one scale a block (llama.cpp's Q8_0,
onnxruntime's accuracy level 4, the native kernels). This pass adds that rounding, s = max |x| over the block / 127, in
standard operators. The outputs of the graph, run without optimizations, then differ from the exact ones only by the
effect of the rounding.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.tape import Tape

from edgeformer.export.passes.edit import constant, nodes

_LEVELS = 127


def round_activations(model: ir.Model, block: int, *, sums: bool = False) -> int:
    """`MatMul(x, DequantizeLinear(W))` -> `MatMul(rounded x, ...)`; returns how many values are rounded.

    Blocks have `block` columns. The minima of q4a multiply sums of activations: exact ones, or with `sums` those of the
    rounded values; engines do either. In graphs without a KV cache the inputs of Attention are rounded too, one scale a
    row, since the native engine computes attention in int8 there.
    """
    rounded: dict[ir.Value, ir.Value] = {}
    cached = any(str(value.name).startswith("past_key_values.") for value in model.graph.inputs)
    for node in nodes(model, "MatMul"):
        weight = node.inputs[1].producer() if node.inputs[1] is not None else None
        x = node.inputs[0]
        if weight is not None and weight.op_type == "DequantizeLinear" and x is not None:
            assert node.inputs[1] is not None
            columns = node.inputs[1].shape[0] if node.inputs[1].shape is not None else None
            width = block if isinstance(columns, int) and columns % block == 0 else None
            node.replace_input_with(0, _rounded(model, x, width, rounded))
    for node in () if cached else nodes(model, "Attention"):
        for index, x in enumerate(node.inputs[:3]):
            if x is not None:
                node.replace_input_with(index, _rounded(model, x, None, rounded))
    for x, y in rounded.items() if sums else ():
        for use in tuple(x.uses()):
            readers = {reader.node.op_type for reader in use.node.outputs[0].uses()}
            if use.node.op_type in ("Reshape", "Pad") and readers & {"ReduceSum", "Reshape"} and use.idx == 0:
                use.node.replace_input_with(0, y)
    return len(rounded)


def _rounded(model: ir.Model, x: ir.Value, block: int | None, done: dict[ir.Value, ir.Value]) -> ir.Value:
    """`x` rounded; the nodes are inserted once, after the node that computes x."""
    if x in done:
        return done[x]
    tape = Tape()
    last = constant(model, "rounding_axis", np.array([-1], np.int64))
    blocks = x
    if block is not None:
        blocks = tape.op("Reshape", [x, constant(model, f"rounding_{block}", np.array([-1, block], np.int64))])
    largest = tape.op("ReduceMax", [tape.op("Abs", [blocks]), last], {"keepdims": 1})
    smallest = constant(model, "rounding_least", np.array(1e-30, np.float32))  # a block of zeros has the scale 0
    levels = constant(model, "rounding_levels", np.array(_LEVELS, np.float32))
    scale = tape.op("Max", [tape.op("Div", [largest, levels]), smallest])
    y = tape.op("Mul", [tape.op("Round", [tape.op("Div", [blocks, scale])]), scale])
    if block is not None:
        y = tape.op("Reshape", [y, tape.op("Shape", [x])])
    y.type, y.shape = x.type, x.shape
    maker = x.producer()
    if maker is None:
        model.graph.insert_before(model.graph[0], tape.nodes)
    else:
        model.graph.insert_after(maker, tape.nodes)
    done[x] = y
    return y
