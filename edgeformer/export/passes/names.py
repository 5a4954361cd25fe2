"""Parameters carry the names of the module's state dict."""

from __future__ import annotations

from collections.abc import Collection

import onnx_ir as ir


def restore_names(model: ir.Model, parameters: Collection[str], prefix: str) -> None:
    """`module.decoder.weight` (as seen through a wrapper) becomes `decoder.weight`; others are left alone."""
    known = set(parameters)
    for name, value in tuple(model.graph.initializers.items()):
        plain = name.removeprefix(prefix)
        if plain != name and plain in known:
            value.name = plain
            assert value.const_value is not None
            value.const_value.name = plain
