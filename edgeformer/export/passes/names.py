"""Gives initializers the names of the module's state dict and merges tied ones."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import onnx_ir as ir
import onnx_ir.passes.common as common
import torch


def restore_names(model: ir.Model, parameters: Collection[str], prefix: str) -> None:
    """Initializer `module.decoder.weight` (traced in a wrapper) -> `decoder.weight`; only names in `parameters`."""
    known = set(parameters)
    for name, value in tuple(model.graph.initializers.items()):
        plain = name.removeprefix(prefix)
        if plain != name and plain in known:
            value.name = plain
            assert value.const_value is not None
            value.const_value.name = plain


def merge_tied(model: ir.Model, parameters: Mapping[str, torch.Tensor]) -> None:
    """Initializers that share one tensor of the module, such as an embedding and its tied head -> one initializer."""
    first: dict[tuple[int, tuple[int, ...]], ir.Value] = {}
    for name, value in tuple(model.graph.initializers.items()):
        if name not in parameters or parameters[name].numel() == 0:
            continue
        tensor = parameters[name]
        kept = first.setdefault((tensor.data_ptr(), tuple(tensor.shape)), value)
        if kept is not value and not value.is_graph_output():
            value.replace_all_uses_with(kept)
    common.RemoveUnusedNodesPass()(model)
