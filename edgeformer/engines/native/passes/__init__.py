"""Graph passes of the native engine, in the order in which `lower` runs them."""

from __future__ import annotations

from edgeformer.engines.native.ir.cache import Cache
from edgeformer.engines.native.ir.graph import Graph, Node
from edgeformer.engines.native.passes import (
    attention,
    elementwise,
    fuse,
    linear,
    mask,
    norm_forms,
    rotation,
    simplify,
    wide,
)
from edgeformer.errors import EngineUnavailable


def lower(g: Graph) -> list[Cache]:
    """Rewrite the graph to fused operators; returns the KV caches in layer order.

    Raises:
        EngineUnavailable: nodes whose operator or shapes are unknown, all of them named.
    """
    unsupported = simplify.normalize(g)
    if unsupported:
        raise unsupported_nodes(unsupported)
    linear.linears(g)
    linear.embeddings(g)
    simplify.fold_constants(g)
    simplify.common_subexpressions(g)
    simplify.views(g)
    attention.spelled_attention(g)
    mask.position_masks(g)
    attention.joined_caches(g)
    norm_forms.norm_forms(g)
    elementwise.norms(g)
    elementwise.activations(g)
    rotation.spelled_rotations(g)
    attention.rotations(g)
    caches = attention.attention_rows(g)
    simplify.fold_constants(g)
    simplify.views(g)
    simplify.transposes(g)
    attention.partial_rotations(g)
    linear.embeddings(g)
    linear.biases(g)
    linear.splits(g)
    simplify.common_subexpressions(g)
    simplify.views(g)
    elementwise.norms(g)
    elementwise.scalar_vectors(g)
    attention.fold_into_attention(g)
    fuse.keep_rows(g)
    fuse.linear_inputs(g)
    fuse.activations(g)
    fuse.gates(g)
    fuse.factors(g)
    fuse.residuals(g)
    fuse.early_rows(g)
    fuse.share_inputs(g)
    simplify.views(g)
    wide.wide_blocks(g)
    return caches


def unsupported_nodes(nodes: list[Node], what: str = "") -> EngineUnavailable:
    """The one error that names every node that the native engine cannot run."""
    listing = "; ".join(f"{n.op} (output {n.outputs[0]})" for n in nodes)
    return EngineUnavailable(
        f"the native engine cannot lower {len(nodes)} node(s){what}: {listing}. "
        "Run this bundle with engine='cpu', or export it without these operators."
    )
