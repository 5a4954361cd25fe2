"""Linear layers and embeddings in blocks of small integers, in the form that onnxruntime fuses to its own kernels.

    linear     MatMul(x, DequantizeLinear(Transpose(Q), Transpose(S), axis=0))                 q4, q8
               + MatMul(ReduceSum(blocks of x), Transpose(M))                                 q4a
    embedding  DequantizeLinear(Gather(Q, ids), Gather(S, ids), axis=-1)

The Transpose must stand before the DequantizeLinear: only then does onnxruntime (>= 1.25) make MatMulNBits of it; in
any other order the weight is dequantized at every step, 15 to 18 times slower than float.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common
from onnx_ir.tape import Tape

from edgeformer.export.blocks import Blocks
from edgeformer.export.passes.edit import constant, infer_shapes, initializer, nodes, replace
from edgeformer.export.passes.linear import Linear, linears

BlocksOf = Callable[[str, ir.Value], Blocks | None]  # (parameter name, initializer) -> its blocks, or None to leave it


def quantize_linears(model: ir.Model, blocks_of: BlocksOf) -> None:
    """Replaces the float weight of every linear layer for which `blocks_of` has blocks."""
    sums: dict[tuple[ir.Value, int], ir.Value] = {}
    for linear in tuple(linears(model)):
        assert linear.weight.name is not None
        blocks = blocks_of(linear.weight.name, linear.weight)
        if blocks is None:
            continue
        tape = Tape()
        q, scale, minimum = _store(model, linear.weight.name, blocks)
        turned = [tape.op("Transpose", [part], {"perm": [1, 0]}) for part in (q, scale)]
        weight = tape.op("DequantizeLinear", turned, {"axis": 0, "block_size": blocks.block_size})  # [K, N]
        y = tape.op("MatMul", [linear.x, weight])
        if minimum is not None:
            key = (linear.x, blocks.block_size)
            if key not in sums:
                sums[key] = _block_sums(model, linear, blocks.block_size)
            y = tape.op("Add", [y, tape.op("MatMul", [sums[key], tape.op("Transpose", [minimum], {"perm": [1, 0]})])])
        replace(model, linear.node, tape, y)
    common.RemoveUnusedNodesPass()(model)
    infer_shapes(model)


def quantize_embeddings(model: ir.Model, blocks_of: BlocksOf) -> None:
    """Replaces the float table of every `Gather(table, ids)` for which `blocks_of` has blocks."""
    for node in nodes(model, "Gather"):
        table, ids = node.inputs
        if table is None or table.name is None or ids is None or not table.is_initializer():
            continue
        blocks = blocks_of(table.name, table)
        if blocks is None:
            continue
        tape = Tape()
        replace(model, node, tape, _embedding(model, tape, table.name, ids, blocks))
    common.RemoveUnusedNodesPass()(model)
    infer_shapes(model)


def tables(model: ir.Model) -> list[ir.Value]:
    """The float tables of token embeddings: looked up by an input of the graph, or shared with a head. Each once."""
    return list(dict.fromkeys(node.inputs[0] for node in _lookups(model) if node.inputs[0] is not None))


def _lookups(model: ir.Model) -> list[ir.Node]:
    found = []
    for node in nodes(model, "Gather"):
        table, ids = node.inputs
        if table is None or ids is None or not table.is_initializer():
            continue
        shared = any(use.node.op_type == "Transpose" for use in table.uses())
        if ids.is_graph_input() or shared:
            found.append(node)
    return found


def _embedding(model: ir.Model, tape: Tape, name: str, ids: ir.Value, blocks: Blocks) -> ir.Value:
    """Gather first, on int8 rows: Gather takes no int4, and only the looked-up rows are to be dequantized."""
    if blocks.scheme != "q8":
        blocks = Blocks("q8", blocks.block_size, blocks.q, blocks.scale, blocks.minimum)
    q, scale, minimum = _store(model, name, blocks)
    rows, scales = (tape.op("Gather", [part, ids]) for part in (q, scale))
    y = tape.op("DequantizeLinear", [rows, scales], {"axis": -1, "block_size": blocks.block_size})
    if minimum is None:
        return y
    last = constant(model, "axis_last", np.array([-1], np.int64))
    split = constant(model, f"split_{blocks.block_size}", np.array([0, 0, -1, blocks.block_size], np.int64))
    shifted = tape.op(
        "Add", [tape.op("Reshape", [y, split]), tape.op("Unsqueeze", [tape.op("Gather", [minimum, ids]), last])]
    )
    return tape.op("Reshape", [shifted, constant(model, "join_2", np.array([0, 0, -1], np.int64))])


def _store(model: ir.Model, name: str, blocks: Blocks) -> tuple[ir.Value, ir.Value, ir.Value | None]:
    """Initializers `name.q`, `name.scale` and, if there is one, `name.minimum`. A table that a tied head shares is
    stored once; a head in a form of its own is `name.head.*`.
    """
    q, scale, minimum = blocks.stored()
    known = model.graph.initializers.get(f"{name}.q")
    if known is not None:
        assert known.const_value is not None
        if known.dtype != q.dtype or not np.array_equal(known.const_value.numpy(), q.numpy()):
            return _store(model, f"{name}.head", blocks)
    last = None if minimum is None else _register(model, f"{name}.minimum", ir.Tensor(minimum))
    return _register(model, f"{name}.q", q), _register(model, f"{name}.scale", ir.Tensor(scale)), last


def _register(model: ir.Model, name: str, tensor: ir.TensorProtocol) -> ir.Value:
    return model.graph.initializers[name] if name in model.graph.initializers else initializer(model, name, tensor)


def _block_sums(model: ir.Model, linear: Linear, block_size: int) -> ir.Value:
    """[..., K / block_size]: the sums of x over each block, made where x is made, shared by all its linears."""
    x, k = linear.x, linear.weight.shape[1]  # type: ignore[index]
    assert x.shape is not None and isinstance(k, int)
    tape = Tape()
    source, lead = x, len(x.shape) - 1
    if missing := -k % block_size:
        pads = np.zeros(2 * (lead + 1), np.int64)
        pads[-1] = missing
        source = tape.op("Pad", [x, constant(model, f"pad_{lead}_{missing}", pads)])
    count = (k + missing) // block_size  # said, not -1: x may have no rows, those of an expert that no token chose
    shape = constant(model, f"split_{lead}_{count}_{block_size}", np.array([0] * lead + [count, block_size], np.int64))
    split = tape.op("Reshape", [source, shape])
    total = tape.op("ReduceSum", [split, constant(model, "axis_last", np.array([-1], np.int64))], {"keepdims": 0})
    model.graph.insert_before(linear.node, tape.nodes)
    total.shape, total.type = ir.Shape([*x.shape[:-1], count]), x.type
    return total
