"""`Attention(mask)` with a causal mask -> `Attention(is_causal=1)`."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common
import onnxruntime as ort

from edgeformer.export.passes.edit import nodes

_SIZES = ((2, 5), (3, 8))  # (first axis, all other named axes)
_HIDDEN = -1e4  # a float mask at or below this hides the key


def name_causality(model: ir.Model) -> None:
    """`Attention(q, k, v, mask)` -> `Attention(q, k, v, is_causal=1)` where the mask is causal.

    The pass does not match patterns: it computes each mask at two lengths from random inputs. If the mask hides exactly
    what lies above the diagonal and is 0 elsewhere, it is removed. If it also has a bias that depends on lengths only
    (by distance, say), the mask stays beside `is_causal`, for `count_past`. A mask that depends on input values, such
    as padding, is left unchanged.
    """
    known: dict[ir.Value, tuple[bool, bool]] = {}
    for node in nodes(model, "Attention"):
        mask = node.inputs[3] if len(node.inputs) > 3 else None
        if mask is None or (len(node.inputs) > 4 and node.inputs[4] is not None):
            continue
        if mask not in known:
            known[mask] = _causality(model, mask)
        causal, biased = known[mask]
        if causal:
            node.attributes["is_causal"] = ir.AttrInt64("is_causal", 1)
            if not biased:
                node.replace_input_with(3, None)
    common.RemoveUnusedNodesPass()(model)


def _causality(model: ir.Model, mask: ir.Value) -> tuple[bool, bool]:
    """(the mask is causal, it has a bias too)."""
    biased = False
    for first, other in _SIZES:
        found, again = (_value(model, mask, first, other, seed) for seed in (0, 1))
        if found is None or again is None or found.ndim < 2 or found.shape[-2:] != (other, other):
            return False, False
        seen = found if found.dtype == np.bool_ else found > _HIDDEN
        if not (seen == np.tril(np.ones((other, other), bool))).all():
            return False, False
        if found.dtype != np.bool_:
            values, others = np.where(seen, found, 0), np.where(seen, again, 0)
            biased |= bool(np.any(values != 0))
            if biased and not np.array_equal(values, others):
                return False, False
    return True, biased


def _value(model: ir.Model, mask: ir.Value, first: int, other: int, seed: int) -> np.ndarray | None:
    """The mask at these sizes; None where onnxruntime cannot compute it apart from the rest of the graph."""
    wanted, part = mask.name, model.clone()
    if mask.is_initializer() and mask.const_value is not None:
        return mask.const_value.numpy()
    target = next((out for node in part.graph for out in node.outputs if out.name == wanted), None)
    if target is None:
        return None
    part.graph.outputs[:] = [target]
    common.RemoveUnusedNodesPass()(part)
    if any(node.domain not in ("", "ai.onnx") for node in part.graph):
        return None
    random = np.random.default_rng(seed)
    feeds = {}
    for value in part.graph.inputs:
        assert value.shape is not None and value.dtype is not None and value.name is not None
        shape = [d if isinstance(d, int) else other if axis else first for axis, d in enumerate(value.shape)]
        numbers = random.integers(0, 2, shape)
        feeds[value.name] = numbers.astype(value.dtype.numpy())
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    part.ir_version = 10
    try:
        proto = ir.to_proto(part)
        session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
        names = {value.name for value in session.get_inputs()}
        result: np.ndarray = session.run(None, {name: value for name, value in feeds.items() if name in names})[0]
    except Exception:  # a mask that cannot be computed alone does not depend on positions only
        return None
    return result
