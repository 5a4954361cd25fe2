"""Removes Reshapes without effect, which remain where a model flattens and restores its leading axes."""

from __future__ import annotations

import onnx_ir as ir
import onnx_ir.passes.common as common

from edgeformer.export.passes.edit import nodes, redirect


def drop_reshapes(model: ir.Model) -> None:
    """`Reshape(x)` -> `x` where x already has that shape."""
    for node in nodes(model, "Reshape"):
        source = node.inputs[0]
        unchanged = source is not None and same_dims(source.shape, node.outputs[0].shape)
        if source is not None and unchanged and not node.outputs[0].is_graph_output():
            redirect(node.outputs[0], source)
    common.RemoveUnusedNodesPass()(model)


def same_dims(one: ir.Shape | None, other: ir.Shape | None) -> bool:
    """Whether both shapes are known and equal in every axis; dynamic axes are compared by name."""
    if one is None or other is None or len(one) != len(other):
        return False
    return all(_same(a, b) for a, b in zip(one, other, strict=True))


def _same(a: int | ir.SymbolicDim, b: int | ir.SymbolicDim) -> bool:
    if isinstance(a, int) or isinstance(b, int):
        return a == b
    return a.value is not None and a.value == b.value
