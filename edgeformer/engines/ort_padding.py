"""A mask for padding: ONNX Runtime then runs sequences of different lengths as one batch.

Bundles have no mask input: a sequence alone needs none. So the engine adds one to its own copy of the graph, where that
is right by the structure of the graph: the caches are read by `Attention` nodes alone, which hide nothing but what is
causal, and positions are an input. No value then depends on where in the cache an entry lies.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from edgeformer.bundle.signature import IDS, POSITIONS, Signature

if TYPE_CHECKING:
    import onnx

LEAST_CONTEXT = 16  # tokens that the check of a padded batch needs
CACHE_MASK = "cache_mask"  # bool [batch, 1, sequence, past_sequence + sequence]: whether a token sees an entry
_MASK, _PAST = 3, (4, 5)  # inputs of Attention (ONNX operator set 23)


def cannot_pad(signature: Signature) -> str | None:
    """Why sequences of this graph cannot share a batch, as far as its inputs and outputs tell; None if they can."""
    if not signature.caches:
        return "the graph has no KV cache"
    if set(signature.inputs) != {IDS, POSITIONS}:
        return f"the graph takes {', '.join(signature.inputs)}, expected {IDS} and {POSITIONS}"
    if signature.outputs != ("logits",):
        return f"the graph gives {', '.join(signature.outputs)}, expected logits"
    if signature.context is not None and signature.context < LEAST_CONTEXT:
        return f"a context of {signature.context} tokens is too short for the check of a padded batch"
    return None


def masked_graph(path: Path) -> bytes | str:
    """The serialized graph with the input `CACHE_MASK` at each Attention node with a cache, or why it cannot have it.

    Weights in other files stay there: their paths are relative to the real folder of `path`, which may be a link, as in
    a Hugging Face cache.
    """
    import onnx

    model = onnx.load(str(path), load_external_data=False)
    graph = model.graph
    caches = {port.name for port in graph.input} - {IDS, POSITIONS}
    presents = {port.name for port in graph.output}
    readers = [node for node in graph.node if node.op_type == "Attention" and _reads(node, _PAST, caches)]
    for node in graph.node:
        if any(attribute.type == onnx.AttributeProto.GRAPH for attribute in node.attribute):
            return f"{node.name} ({node.op_type}) has a graph of its own"
        cached = node.op_type == "Attention" and _reads(node, _PAST, caches)
        others = [name for place, name in enumerate(node.input) if not (cached and place in _PAST)]
        if found := presents.intersection(others):
            return f"{node.name} ({node.op_type}) reads the cache {min(found)} of another node"
        if found := {name for name in caches.intersection(others) if name.startswith("past_key_values.")}:
            return f"{node.name} ({node.op_type}) reads the cache {min(found)}, which only an Attention may"
    for node in readers:
        if not _causal(node):
            return f"{node.name} has a cache and is not causal"
        if len(node.input) > _MASK and node.input[_MASK]:
            return f"{node.name} has a mask of its own, such as a window: it may depend on where an entry lies"
        node.input[_MASK] = CACHE_MASK
    for tensor in graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = os.path.relpath((path.parent / entry.value).resolve(), path.resolve().parent)
    kind = onnx.TensorProto.BOOL
    shape: list[str | int | None] = ["batch", 1, "sequence", "total_sequence"]
    graph.input.append(onnx.helper.make_tensor_value_info(CACHE_MASK, kind, shape))
    return bytes(model.SerializeToString())


def _reads(node: onnx.NodeProto, places: tuple[int, ...], names: set[str]) -> bool:
    return any(place < len(node.input) and node.input[place] in names for place in places)


def _causal(node: onnx.NodeProto) -> bool:
    return any(attribute.name == "is_causal" and attribute.i == 1 for attribute in node.attribute)
