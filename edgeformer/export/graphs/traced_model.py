"""What tracing gives: the float graphs of a model, from which bundles of every scheme are made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir as ir

from edgeformer.export.source import AnySource

CAUSAL_ADVICE = (
    "Use F.scaled_dot_product_attention(q, k, v, is_causal=True), or softmax(scale * q @ k^T + causal mask) @ v."
)


@dataclass(frozen=True)
class TracedModel:
    """A source with its float graphs, with KV caches where the model decodes. Several exports can share one."""

    source: AnySource
    models: Mapping[str, ir.Model]  # one for each name in `source.parts`
    layers: int  # attention layers with a KV cache
    transposed: frozenset[str]  # names of weights that a graph stores transposed compared with the module
