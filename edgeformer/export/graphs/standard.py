"""The passes that every graph goes through, whichever model it belongs to."""

from __future__ import annotations

import onnx_ir as ir

from edgeformer.export.passes.attention_node import standard_attention
from edgeformer.export.passes.einsum import plain_products
from edgeformer.export.passes.linear_layers import canonical_linear_layers
from edgeformer.export.passes.masked_assignment import masked_assignments
from edgeformer.export.passes.masks import drop_true
from edgeformer.export.passes.names import merge_tied, restore_names
from edgeformer.export.passes.reshape import drop_reshapes
from edgeformer.export.passes.rotary import full_angles
from edgeformer.export.passes.slices import slice_parameters
from edgeformer.export.passes.softmax import fuse_softmax
from edgeformer.export.source import Positional, Source
from edgeformer.export.trace.cache_interface import with_past
from edgeformer.export.trace.trace import trace


def standard_graph(source: Source) -> tuple[ir.Model, set[str]]:
    """(the traced graph without a KV cache, names of weights that it stores transposed compared with the module).

    Raises:
        ExportError: the module cannot be traced, or a pass does not support a node; the message names it.
    """
    stepper = with_past(source) if source.past else None
    with source.tracing():
        if stepper is None:
            model = trace(Positional(source), source.inputs, source.outputs)
        else:
            model = trace(stepper.module, stepper.inputs, stepper.outputs)
    state = source.module.state_dict()
    buffers = dict(source.module.named_buffers())  # non-persistent ones are not in the state dict
    restore_names(model, state.keys() | buffers.keys(), Positional.PREFIX)
    merge_tied(model, state)
    slice_parameters(model)
    drop_true(model)
    masked_assignments(model)
    drop_reshapes(model)
    transposed = canonical_linear_layers(model)
    full_angles(model)
    standard_attention(model)
    plain_products(model)
    fuse_softmax(model)
    return model, transposed
