"""The graph of a model that is one graph: a language model with its KV cache, an encoder, any other module."""

from __future__ import annotations

from edgeformer.export.graphs.standard import standard_graph
from edgeformer.export.graphs.traced_model import TracedModel
from edgeformer.export.passes.attention_node import window_masks
from edgeformer.export.passes.cache_positions import count_past
from edgeformer.export.passes.causal import name_causality
from edgeformer.export.passes.edit import infer_shapes
from edgeformer.export.passes.finish import finish
from edgeformer.export.passes.kv_cache import insert_cache, join_cache
from edgeformer.export.passes.logits import keep_logits
from edgeformer.export.passes.masks import spread_rows
from edgeformer.export.source import Source


def trace_one_graph(source: Source) -> TracedModel:
    """Traces the module and, if it is a language model with causal attention, adds its KV cache.

    Raises:
        ExportError: the module cannot be traced, or a pass does not support a node; the message names it.
    """
    model, transposed = standard_graph(source)
    layers = join_cache(model) if source.past else 0
    if source.is_language_model and not source.past:
        name_causality(model)
        layers = insert_cache(model)
        count_past(model)
    spread_rows(model)
    window_masks(model)
    if source.is_language_model and layers:
        keep_logits(model)
    finish(model, source.origin)
    infer_shapes(model)
    return TracedModel(source, {"model": model}, layers, frozenset(transposed))
