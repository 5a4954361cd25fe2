"""Adds the input `logits_to_keep`: the final norm and the head then compute only the last positions."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.tape import Tape

from edgeformer.errors import ExportError
from edgeformer.export.passes.edit import constant, producer

LOGITS_TO_KEEP = "logits_to_keep"
_ROWWISE = ("Add", "Sub", "Mul", "Div", "Tanh", "Cast", "Clip")
_NORMS = ("RMSNormalization", "LayerNormalization")


def keep_logits(model: ir.Model) -> None:
    """`head(norm(x))` -> `head(norm(x[:, -logits_to_keep:]))`, with the new input int64 [], by default 0.

    The input is an initializer too, which makes it optional in ONNX (IR >= 4): other runtimes need not feed it. 0 keeps
    all positions, as in Python's `[-0:]` and in transformers.

    Raises:
        ExportError: `logits` is not computed by a linear head.
    """
    logits = next(value for value in model.graph.outputs if value.name == "logits")
    hidden, reader = _hidden_states(logits)
    keep = ir.Value(name=LOGITS_TO_KEEP, shape=ir.Shape([]), type=ir.TensorType(ir.DataType.INT64))
    keep.const_value = ir.Tensor(np.array(0, np.int64), name=LOGITS_TO_KEEP)
    model.graph.inputs.append(keep)
    model.graph.register_initializer(keep)
    tape = Tape()
    first = constant(model, "axis_0", np.array([0], np.int64))
    start = tape.op("Unsqueeze", [tape.op("Neg", [keep]), first])
    end = constant(model, "end_of_axis", np.array([np.iinfo(np.int64).max], np.int64))
    kept = tape.op("Slice", [hidden, start, end, constant(model, "axis_1", np.array([1], np.int64))])
    kept.type = hidden.type
    model.graph.insert_before(reader, tape.nodes)
    reader.replace_input_with(0, kept)
    assert logits.shape is not None
    logits.shape = ir.Shape([logits.shape[0], "kept", *logits.shape[2:]])


def _hidden_states(logits: ir.Value) -> tuple[ir.Value, ir.Node]:
    """(the last hidden states, the norm or head that reads them), searched back through row-wise operators."""
    node = logits.producer()
    while node is not None and node.op_type in _ROWWISE:
        computed = [value for value in node.inputs if value is not None and not value.is_initializer()]
        node = computed[0].producer() if len(computed) == 1 else None
    if node is None or node.op_type != "MatMul" or node.inputs[0] is None:
        raise ExportError(
            "`logits` is not computed by a linear head, so the input `logits_to_keep` cannot be added; end the "
            "model in nn.Linear."
        )
    norm = producer(node.inputs[0], *_NORMS)
    if norm is not None and len(norm.outputs[0].uses()) == 1 and norm.inputs[0] is not None:
        return norm.inputs[0], norm
    return node.inputs[0], node
