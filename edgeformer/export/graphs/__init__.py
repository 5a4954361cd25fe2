"""From a source to its float graphs in standard ONNX operators, with KV caches where the model decodes."""

from edgeformer.export.graphs.encoder_decoder import trace_encoder_decoder
from edgeformer.export.graphs.one_graph import trace_one_graph
from edgeformer.export.graphs.traced_model import TracedModel
from edgeformer.export.source import AnySource, EncoderDecoderSource

__all__ = ["TracedModel", "trace_model"]


def trace_model(source: AnySource) -> TracedModel:
    """The float graphs of a model.

    Raises:
        ExportError: a module cannot be traced, or a pass does not support a node; the message names it.
    """
    return trace_encoder_decoder(source) if isinstance(source, EncoderDecoderSource) else trace_one_graph(source)
