"""Linear layers and embeddings -> block-quantized weights, in the patterns that onnxruntime fuses to MatMulNBits.

    linear     MatMul(x, DequantizeLinear(Transpose(Q), Transpose(S), axis=0))                 q4, q8
               + MatMul(ReduceSum(blocks of x), Transpose(M))                                 q4a
    embedding  DequantizeLinear(Gather(Q, ids), Gather(S, ids), axis=-1)

The Transpose must come before the DequantizeLinear: only then onnxruntime (>= 1.25) fuses it to MatMulNBits. In any
other order the weight is dequantized at every step, 15 to 18 times slower than float.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common
from onnx_ir.tape import Tape

from edgeformer.export.blocks import Blocks
from edgeformer.export.passes.edit import constant, infer_shapes, initializer, nodes, replace
from edgeformer.export.passes.linear_layers import LinearLayer, linear_layers

BlocksOf = Callable[[str, ir.Value], Blocks | None]  # (parameter name, initializer) -> its blocks; None: keep it float


def quantize_linears(model: ir.Model, blocks_of: BlocksOf) -> None:
    """Float weight of a linear layer -> the blocks that `blocks_of` returns for it."""
    sums: dict[tuple[ir.Value, int], ir.Value] = {}
    for linear in tuple(linear_layers(model)):
        assert linear.weight.name is not None
        blocks = blocks_of(linear.weight.name, linear.weight)
        if blocks is None:
            continue
        tape = Tape()
        q, scale, minimum = _store(model, linear.weight.name, blocks)
        transposed = [tape.op("Transpose", [part], {"perm": [1, 0]}) for part in (q, scale)]
        weight = tape.op("DequantizeLinear", transposed, {"axis": 0, "block_size": blocks.block_size})  # [K, N]
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
    """Float table of a `Gather(table, ids)` -> the blocks that `blocks_of` returns for it."""
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
    """The float tables of token embeddings, each once: those indexed by a graph input, or tied to a head."""
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
    """Dequantized rows `ids` of a table. Gather comes first, so only those rows are dequantized; it takes no int4."""
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
    """Initializers `name.q`, `name.scale` and, for q4a, `name.minimum`.

    A table that is tied to a head is stored once; a head that is quantized otherwise is `name.head.*`.
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


def _block_sums(model: ir.Model, linear: LinearLayer, block_size: int) -> ir.Value:
    """The sums of x over each block, [..., K / block_size]; all linear layers that read x share them."""
    x, k = linear.x, linear.weight.shape[1]  # type: ignore[index]
    assert x.shape is not None and isinstance(k, int)
    tape = Tape()
    source, lead = x, len(x.shape) - 1
    if missing := -k % block_size:
        pads = np.zeros(2 * (lead + 1), np.int64)
        pads[-1] = missing
        source = tape.op("Pad", [x, constant(model, f"pad_{lead}_{missing}", pads)])
    count = (k + missing) // block_size  # not -1: x may have 0 rows, for an expert that no token selected
    shape = constant(model, f"split_{lead}_{count}_{block_size}", np.array([0] * lead + [count, block_size], np.int64))
    split = tape.op("Reshape", [source, shape])
    total = tape.op("ReduceSum", [split, constant(model, "axis_last", np.array([-1], np.int64))], {"keepdims": 0})
    model.graph.insert_before(linear.node, tape.nodes)
    total.shape, total.type = ir.Shape([*x.shape[:-1], count]), x.type
    return total
