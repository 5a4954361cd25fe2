"""`Attention(q, k, v)` -> `Attention(q, k, v, past_key, past_value)` with outputs present_key and present_value."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.tape import Tape

from edgeformer.errors import ExportError
from edgeformer.export.passes.attention_node import positions
from edgeformer.export.passes.edit import integers, nodes, redirect, replace
from edgeformer.export.trace.attention_interface import DOMAIN
from edgeformer.export.trace.cache_interface import APPEND


def insert_cache(model: ir.Model) -> int:
    """Adds a KV cache to every causal Attention; returns how many there are (0: an encoder, the graph is unchanged).

    The inputs are `past_key_values.{i}.key|value` [batch, kv_heads, past_sequence, head_dim], the outputs
    `present.{i}.key|value`: names and shapes of Hugging Face's ONNX decoders.

    Raises:
        ExportError: the keys of a causal Attention have no fixed number of heads or head size.
    """
    causal = [node for node in nodes(model, "Attention") if integers(node, "is_causal")]
    for layer, node in enumerate(causal):
        pasts, presents = [], []
        for part, source in (("key", node.inputs[1]), ("value", node.inputs[2])):
            assert source is not None
            shape = source.shape
            if shape is None or len(shape) != 4 or not isinstance(shape[1], int) or not isinstance(shape[3], int):
                raise ExportError(
                    f"attention {layer}: the {part} has shape {shape}; expected [batch, heads, sequence, size] "
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


def join_cache(model: ir.Model) -> int:
    """`Attention(q, Append(k, past_k), Append(v, past_v))` -> `Attention(q, k, v, past_k, past_v)`, for cached traces.

    A later Attention on the same keys and values reads the first one's present outputs; its causality becomes a mask.
    Any other `edgeformer::Append(new, past)` becomes `Concat(past, new)`. Returns the number of layers with a cache.

    Raises:
        ExportError: such a later Attention has a mask and is causal.
    """
    appends = {node.outputs[0]: node for node in nodes(model, APPEND, domain=DOMAIN)}
    for node in nodes(model, "Attention"):
        found = [appends.get(value) for value in node.inputs[1:3] if value is not None]
        key, value = found if len(found) == 2 else (None, None)
        if key is not None and value is not None and key is not value and not _read_before(node, (key, value)):
            _move_into(model, node, key, value)
            del appends[key.outputs[0]], appends[value.outputs[0]]
        elif integers(node, "is_causal"):
            _causal_mask(model, node)
    for append in appends.values():
        tape = Tape()
        replace(model, append, tape, tape.op("Concat", [append.inputs[1], append.inputs[0]], {"axis": 2}))
    model.opset_imports.pop(DOMAIN, None)
    for output in model.graph.outputs:
        if output.name is not None and output.name.startswith("present.") and output.shape is not None:
            output.shape = ir.Shape([*output.shape[:2], "total_sequence", output.shape[3]])
    return sum(str(output.name).endswith(".key") for output in model.graph.outputs)


def _read_before(node: ir.Node, appends: tuple[ir.Node, ir.Node]) -> bool:
    """Whether the queries or the mask of the Attention depend on an output of `appends`."""
    queue = [value for index, value in enumerate(node.inputs) if index not in (1, 2)]
    seen: set[ir.Node] = set()
    while queue:
        value = queue.pop()
        made = None if value is None else value.producer()
        if made in appends:
            return True
        if made is not None and made not in seen:
            seen.add(made)
            queue.extend(made.inputs)
    return False


def _move_into(model: ir.Model, node: ir.Node, key: ir.Node, value: ir.Node) -> None:
    node.resize_inputs(6)
    node.resize_outputs(3)
    for index, append in enumerate((key, value), start=1):
        node.replace_input_with(index, append.inputs[0])
        node.replace_input_with(index + 3, append.inputs[1])
        present, joined = node.outputs[index], append.outputs[0]
        present.name, present.shape, present.type = f"{joined.name}.joined", joined.shape, joined.type
        redirect(joined, present)
        model.graph.remove(append, safe=True)


def _causal_mask(model: ir.Model, node: ir.Node) -> None:
    """`Attention(is_causal=1)` without past inputs -> `Attention(mask)`, bottom-right aligned."""
    tape = Tape()
    q_pos, k_pos = positions(model, tape, node)
    seen = tape.op("LessOrEqual", [k_pos, q_pos])
    if len(node.inputs) > 3 and node.inputs[3] is not None:
        raise ExportError(
            "an attention that reads another layer's keys and values is causal and has a mask; expected one of both."
        )
    model.graph.insert_before(node, tape.nodes)
    node.resize_inputs(max(4, len(node.inputs)))
    node.replace_input_with(3, seen)
    node.attributes["is_causal"] = ir.AttrInt64("is_causal", 0)


def _with_cache(node: ir.Node, pasts: list[ir.Value], presents: list[ir.Value]) -> None:
    if len(node.inputs) > 4 and any(node.inputs[4:6]):
        raise ExportError(
            "an attention of the traced module already has past inputs; export the module without a cache."
        )
    node.resize_inputs(6)
    node.replace_input_with(4, pasts[0])
    node.replace_input_with(5, pasts[1])
    node.resize_outputs(3)
    for output, present in zip(node.outputs[1:], presents, strict=True):
        output.name, output.shape, output.type = present.name, present.shape, present.type
    presents[:] = node.outputs[1:]
