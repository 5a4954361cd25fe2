"""The KV cache: every causal Attention gains its past as inputs and its present as outputs."""

from __future__ import annotations

import onnx_ir as ir

from edgeformer.errors import ExportError
from edgeformer.export.passes.edit import integers, nodes


def insert_cache(model: ir.Model) -> int:
    """Inputs `past_key_values.{i}.key|value` [batch, kv_heads, past_sequence, head_dim], outputs `present.{i}.*`.

    Names and shapes are those of Hugging Face's ONNX decoders. Returns the number of layers with a cache; 0 leaves the
    graph as it was (an encoder).

    Raises:
        ExportError: a causal attention has keys whose head count or size is not fixed.
    """
    causal = [node for node in nodes(model, "Attention") if integers(node, "is_causal")]
    for layer, node in enumerate(causal):
        pasts, presents = [], []
        for part, source in (("key", node.inputs[1]), ("value", node.inputs[2])):
            assert source is not None
            shape = source.shape
            if shape is None or len(shape) != 4 or not isinstance(shape[1], int) or not isinstance(shape[3], int):
                raise ExportError(
                    f"attention {layer}: the {part} has shape {shape}; a KV cache needs [batch, heads, sequence, size] "
                    "with fixed heads and size."
                )
            dims = [shape[0], shape[1], "past_sequence", shape[3]]
            past = ir.Value(name=f"past_key_values.{layer}.{part}", shape=ir.Shape(dims), type=source.type)
            dims = [shape[0], shape[1], "total_sequence", shape[3]]
            presents.append(ir.Value(name=f"present.{layer}.{part}", shape=ir.Shape(dims), type=source.type))
            pasts.append(past)
            model.graph.inputs.append(past)
        _with_cache(node, pasts, presents)
        model.graph.outputs.extend(presents)
    return len(causal)


def _with_cache(node: ir.Node, pasts: list[ir.Value], presents: list[ir.Value]) -> None:
    if len(node.inputs) > 4 and any(node.inputs[4:6]):
        raise ExportError("this attention has a cache of its own; export the module without one.")
    node.resize_inputs(6)
    node.replace_input_with(4, pasts[0])
    node.replace_input_with(5, pasts[1])
    node.resize_outputs(3)
    for output, present in zip(node.outputs[1:], presents, strict=True):
        output.name, output.shape, output.type = present.name, present.shape, present.type
    presents[:] = node.outputs[1:]
