"""The two graphs of an encoder-decoder model, and the values that pass from one to the other."""

from __future__ import annotations

import onnx_ir as ir

from edgeformer.errors import ExportError
from edgeformer.export.graphs.standard import standard_graph
from edgeformer.export.graphs.traced_model import CAUSAL_ADVICE, TracedModel
from edgeformer.export.passes.attention_node import window_masks
from edgeformer.export.passes.cache_positions import count_past
from edgeformer.export.passes.causal import name_causality
from edgeformer.export.passes.edit import infer_shapes
from edgeformer.export.passes.finish import finish
from edgeformer.export.passes.hoist import hoist
from edgeformer.export.passes.kv_cache import insert_cache
from edgeformer.export.passes.logits import keep_logits
from edgeformer.export.passes.masks import spread_rows
from edgeformer.export.source import ENCODER_OUTPUT, EncoderDecoderSource


def trace_encoder_decoder(source: EncoderDecoderSource) -> TracedModel:
    """Traces both modules, adds the KV cache of the decoder, and moves what no decoded token changes to the encoder.

    Raises:
        ExportError: a module cannot be traced, or a pass does not support a node; the message names it.
    """
    encoder, transposed = standard_graph(source.encoder)
    decoder, others = standard_graph(source.decoder)
    name_causality(decoder)
    layers = insert_cache(decoder)
    if not layers:
        raise ExportError(
            "No causal attention was recognized in the decoder, and without one it cannot decode step by step. "
            f"{CAUSAL_ADVICE}"
        )
    _name_caches(decoder)
    count_past(decoder)
    for model in (encoder, decoder):
        spread_rows(model)
        window_masks(model)
    hoist(encoder, decoder, ENCODER_OUTPUT)
    keep_logits(decoder)
    models = {"encoder": encoder, "decoder": decoder}
    for name, part in source.parts.items():
        finish(models[name], part.origin)
        infer_shapes(models[name])
    return TracedModel(source, models, layers, frozenset(transposed | others))


def _name_caches(decoder: ir.Model) -> None:
    """Renames `past_key_values.0.key` to `past_key_values.0.decoder.key`: the cross-attention's is `.encoder.key`."""
    for value in (*decoder.graph.inputs, *decoder.graph.outputs):
        for part in (".key", ".value"):
            if str(value.name).startswith(("past_key_values.", "present.")) and str(value.name).endswith(part):
                value.name = f"{str(value.name).removesuffix(part)}.decoder{part}"
