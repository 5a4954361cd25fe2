"""`edgeformer::Attention` -> `Attention`; a sliding window -> its mask input."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common
from onnx_ir.tape import Tape

from edgeformer.export.passes.edit import constant, integers, nodes, replace
from edgeformer.export.trace.attention_interface import CAUSAL_MASK, DOMAIN

WINDOW_ATTRIBUTE = "window"  # not of the standard; on the node only until `window_masks` adds the mask


def standard_attention(model: ir.Model) -> None:
    """`edgeformer::Attention(q, k, v, mask)` -> `Attention(q, k, v, mask)`; a window stays an attribute for now.

    `CausalMask` as the mask -> `is_causal=1`. Other uses of `CausalMask(q_pos, k_pos)` -> `LessOrEqual(k_pos, q_pos)`.
    """
    for node in nodes(model, "Attention", domain=DOMAIN):
        attributes: dict[str, int | float] = {
            "is_causal": integers(node, "is_causal"),
            "scale": float(node.attributes["scale"].value),
        }
        if softcap := float(node.attributes["softcap"].value):
            attributes["softcap"] = softcap
        if window := integers(node, "window"):
            attributes[WINDOW_ATTRIBUTE] = window
        inputs = list(node.inputs)
        mask = inputs[3].producer() if len(inputs) > 3 and inputs[3] is not None else None
        if mask is not None and mask.op_type == CAUSAL_MASK and mask.domain == DOMAIN:
            del inputs[3]
            attributes["is_causal"] = 1
        tape = Tape()
        replace(model, node, tape, tape.op("Attention", inputs, attributes))
    for node in nodes(model, CAUSAL_MASK, domain=DOMAIN):
        if node.outputs[0].uses():
            q_pos, k_pos = node.inputs
            tape = Tape()
            axes = [constant(model, f"axes_{len(a)}_{a[-1]}", np.array(a, np.int64)) for a in ((0, 1, 3), (0, 1, 2))]
            rows, columns = tape.op("Unsqueeze", [q_pos, axes[0]]), tape.op("Unsqueeze", [k_pos, axes[1]])
            replace(model, node, tape, tape.op("LessOrEqual", [columns, rows]))
    common.RemoveUnusedNodesPass()(model)
    model.opset_imports.pop(DOMAIN, None)


def window_masks(model: ir.Model) -> None:
    """`Attention(window=W)` -> `Attention(attn_mask = q_pos - k_pos < W)`, the mask bool [sequence, total].

    Keys have the positions 0 .. past + sequence - 1, queries the last `sequence` of them. `is_causal` stays an
    attribute. (ONNX Attention-23: keys are kept where a boolean mask is true; it broadcasts over batch and heads.)
    """
    for node in nodes(model, "Attention"):
        window = integers(node, WINDOW_ATTRIBUTE)
        node.attributes.pop(WINDOW_ATTRIBUTE, None)
        if window:
            tape = Tape()
            mask = _window_mask(model, tape, node, window)
            model.graph.insert_before(node, tape.nodes)
            node.resize_inputs(max(4, len(node.inputs)))
            node.replace_input_with(3, mask)
    common.CommonSubexpressionEliminationPass()(model)


def _window_mask(model: ir.Model, tape: Tape, node: ir.Node, window: int) -> ir.Value:
    q_pos, k_pos = positions(model, tape, node)
    return tape.op("Less", [tape.op("Sub", [q_pos, k_pos]), constant(model, f"number_{window}", np.array(window))])


def positions(model: ir.Model, tape: Tape, node: ir.Node) -> tuple[ir.Value, ir.Value]:
    """Positions of an Attention's queries [sequence, 1] and keys [1, total], bottom-right aligned."""

    def number(value: int) -> ir.Value:
        return constant(model, f"number_{value}", np.array(value, np.int64))

    def axis(value: int) -> ir.Value:
        return constant(model, f"axis_{value}", np.array([value], np.int64))

    def length(value: ir.Value | None) -> ir.Value:
        return tape.op("Squeeze", [tape.op("Shape", [value], {"start": 2, "end": 3}), axis(0)])

    past = node.inputs[4] if len(node.inputs) > 4 else None
    if past is not None:
        first = length(past)
        total = tape.op("Add", [first, length(node.inputs[0])])
    else:
        total = length(node.inputs[1])
        first = tape.op("Sub", [total, length(node.inputs[0])])
    q_pos = tape.op("Range", [first, total, number(1)])
    k_pos = tape.op("Range", [number(0), total, number(1)])
    return tape.op("Unsqueeze", [q_pos, axis(1)]), tape.op("Unsqueeze", [k_pos, axis(0)])
