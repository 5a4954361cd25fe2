"""Graph passes of the native engine; `PASSES` is their order."""

from __future__ import annotations

from edgeformer.engines.native.ir.cache import Cache
from edgeformer.engines.native.ir.graph import Graph, Node, Pass
from edgeformer.engines.native.passes import (
    activations,
    attention,
    fuse,
    kept_rows,
    linear,
    mask,
    norms,
    rotation,
    simplify,
    wide,
)
from edgeformer.errors import EngineUnavailable

# After `simplify.normalize`. A comment says why the order matters; a pass is repeated where the passes between
# make new work for it.
PASSES: tuple[Pass, ...] = (
    # Weights: before constants are folded, which would dequantize them.
    linear.linears,
    linear.embeddings,
    simplify.fold_constants,
    simplify.common_subexpressions,
    simplify.views,
    # Patterns on [batch, heads, sequence, size], the layout of the graph. Attention first, then its mask, then its
    # cache: a cache may join an attention only when its causality is known.
    attention.decomposed_attention,
    mask.position_masks,
    attention.joined_caches,
    norms.norm_variants,
    norms.norms,
    activations.decomposed_activations,
    rotation.decomposed_rotations,
    rotation.rotations,
    # From here on, rows [batch, sequence, ...]: the Transposes around attention cancel.
    attention.attention_rows,
    simplify.fold_constants,
    simplify.views,
    simplify.transposes,
    rotation.partial_rotations,
    linear.embeddings,
    linear.biases,
    linear.splits,
    simplify.common_subexpressions,
    simplify.views,
    norms.norms,
    norms.flat_norm_weights,
    attention.fold_into_attention,
    # Fusion, when all Linears are known: `linear_inputs` first, for the others compare inputs by name; a residual
    # after activation and factor, as the kernel adds it last.
    kept_rows.keep_rows,
    fuse.linear_inputs,
    fuse.linear_activations,
    fuse.gates,
    fuse.linear_factors,
    fuse.residuals,
    kept_rows.keep_rows_early,
    fuse.group_linears,
    simplify.views,
    # Last: it looks at all Linears of an input.
    wide.wide_blocks,
)


def lower(g: Graph) -> list[Cache]:
    """Rewrite the graph to fused operators; returns the KV caches in layer order.

    Raises:
        EngineUnavailable: nodes whose operator or shapes are unsupported, all of them named.
    """
    unsupported = simplify.normalize(g)
    if unsupported:
        raise unsupported_nodes(unsupported)
    for run in PASSES:
        run(g)
    return g.caches


def unsupported_nodes(nodes: list[Node], what: str = "") -> EngineUnavailable:
    """The one error that names every node that the native engine cannot run."""
    listing = "; ".join(f"{n.op} (output {n.outputs[0]})" for n in nodes)
    return EngineUnavailable(
        f"the native engine cannot lower {len(nodes)} node(s){what}: {listing}. "
        "Run this bundle with engine='cpu', or export it without these operators."
    )
