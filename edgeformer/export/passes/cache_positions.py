"""Positions computed from the sequence length S -> positions that start after the P tokens in the KV cache.

A forward without a cache numbers its tokens 0 .. S-1, for position embeddings and for biases by distance. With P tokens
in the cache, the new tokens have positions P .. P+S-1 and the keys 0 .. P+S-1. So this pass computes every value that
depends only on S for P+S instead, and slices the last S rows of each query axis. It slices as early as the operators
allow, so a decode step computes one row, not a [P+1, P+1] matrix.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
from onnx_ir.tape import Tape

from edgeformer.export.passes.edit import constant, nodes

SEQUENCE = "sequence"
_ELEMENTWISE = (
    "Abs", "Add", "And", "BitShift", "Cast", "Ceil", "Clip", "Cos", "Div", "Equal", "Exp", "Floor", "Greater",
    "GreaterOrEqual", "Identity", "Less", "LessOrEqual", "Log", "Max", "Min", "Mod", "Mul", "Neg", "Not", "Or", "Pow",
    "Round", "Sign", "Sin", "Sqrt", "Sub", "Where",
)  # fmt: skip
_COUNTERS = ("Range", "CumSum", "NonZero")  # operators that make positions of a length


def count_past(model: ir.Model) -> int:
    """Adds the length of the KV cache to all positions that the graph computes; returns how many were rewritten."""
    cache = next((value for value in model.graph.inputs if str(value.name).startswith("past_key_values.")), None)
    if cache is None:
        return 0
    tape = Tape()
    past = tape.op("Shape", [cache], {"start": 2, "end": 3})  # [1], before all other nodes
    model.graph.insert_before(model.graph[0], tape.nodes)
    rewriter = _Rewriter(model, past)
    return rewriter.running_counts() + rewriter.ranges()


class _Rewriter:
    """Rewrites values for P+S tokens; each value once."""

    def __init__(self, model: ir.Model, past: ir.Value) -> None:
        self.model, self.past = model, past  # past: P, int64 [1]
        self.of_length = _values_of_length(model)
        self.full: dict[ir.Value, ir.Value] = {}  # value -> its value for P+S tokens
        self.rows: dict[tuple[ir.Value, int], ir.Value] = {}  # (value, axis) -> the last S rows of that
        self.scalar: ir.Value | None = None  # P, int64 []

    def running_counts(self) -> int:
        """`CumSum(mask)` -> `Add(CumSum(mask), P)`: a running count over the tokens, such as those without padding."""
        done = 0
        for node in nodes(self.model, "CumSum"):
            value = node.outputs[0]
            if value in self.of_length or not _is_sequence(value, -1):
                continue
            uses, tape = tuple(value.uses()), Tape()
            added = tape.op("Add", [value, tape.op("CastLike", [self.past, value])])
            _like(added, value)
            for use in uses:
                use.node.replace_input_with(use.idx, added)
            self.model.graph.insert_after(node, tape.nodes)
            done += 1
        return done

    def ranges(self) -> int:
        """Rewrites every value that is computed from S alone through a Range, where the rest of the graph reads it."""
        done = 0
        for node in tuple(self.model.graph):
            for output in node.outputs:
                if self.of_length.get(output):
                    outside = [use for use in output.uses() if use.node.outputs[0] not in self.of_length]
                    for use in outside:
                        self._rewrite(output, use.node, use.idx)
                        done += 1
        return done

    def _rewrite(self, value: ir.Value, reader: ir.Node, index: int) -> None:
        rank = len(value.shape or ())
        axes = [axis for axis in range(rank) if _is_sequence(value, axis)]
        if reader.op_type == "Attention":
            axes = [axis for axis in axes if axis == rank - 2]  # a mask: queries by keys
        tape = Tape()
        new = self._take(tape, value, axes[0]) if axes else self._grow(tape, value)
        for axis in axes[1:]:
            new = self._slice(tape, new, axis)
        self.model.graph.insert_before(reader, tape.nodes)
        reader.replace_input_with(index, new)

    def _take(self, tape: Tape, value: ir.Value, axis: int) -> ir.Value:
        """The last S rows along `axis` of `value` computed for P+S tokens."""
        if (value, axis) in self.rows:
            return self.rows[value, axis]
        node = value.producer()
        rank = len(value.shape or ())
        new: ir.Value | None = None
        if node is not None and node.op_type in _ELEMENTWISE:
            new = self._elementwise(tape, node, lambda v: axis - (rank - len(v.shape or ())))
        elif node is not None and node.op_type == "Range":
            start, limit, step = (self._grow(tape, v) for v in node.inputs if v is not None)
            new = tape.op("Range", [tape.op("Add", [start, self._number(tape)]), limit, step])
        elif node is not None and node.op_type == "Unsqueeze" and (added := _axes(node, rank)) is not None:
            inner = axis - sum(a < axis for a in added)
            new = tape.op("Unsqueeze", [self._take(tape, _first(node), inner), node.inputs[1]])
        elif node is not None and node.op_type == "Transpose":
            perm = list(node.attributes["perm"].value)
            new = tape.op("Transpose", [self._take(tape, _first(node), perm[axis])], dict(node.attributes))
        elif node is not None and node.op_type == "Gather" and _is_table(node) and node.inputs[1] is not None:
            new = tape.op("Gather", [node.inputs[0], self._take(tape, node.inputs[1], axis)])
        if new is None:
            new = self._slice(tape, self._grow(tape, value), axis)
        self.rows[value, axis] = _like(new, value)
        return new

    def _elementwise(self, tape: Tape, node: ir.Node, axis_of: Callable[[ir.Value], int]) -> ir.Value:
        """The elementwise operator on the last S rows of each input that has the axis; the others broadcast."""
        inputs: list[ir.Value | None] = []
        for value in node.inputs:
            if value is None or value not in self.of_length:
                inputs.append(value)
            elif (axis := axis_of(value)) >= 0 and _is_sequence(value, axis):
                inputs.append(self._take(tape, value, axis))
            else:
                inputs.append(self._grow(tape, value))
        return tape.op(node.op_type, inputs, dict(node.attributes))

    def _grow(self, tape: Tape, value: ir.Value) -> ir.Value:
        """`value` computed for P+S tokens."""
        if value not in self.of_length:
            return value
        if value not in self.full:
            node = value.producer()
            assert node is not None
            if node.op_type == "Shape":
                new = self._length(tape, node)
            else:
                inputs = [None if v is None else self._grow(tape, v) for v in node.inputs]
                new = tape.op(node.op_type, inputs, dict(node.attributes))
            new.type = value.type
            self.full[value] = new
        return self.full[value]

    def _length(self, tape: Tape, node: ir.Node) -> ir.Value:
        source = _first(node)
        assert source.shape is not None
        dims = list(range(len(source.shape)))[_integer(node, "start", 0) : _integer(node, "end", len(source.shape))]
        grown = [int(_is_sequence(source, axis)) for axis in dims]
        if not any(grown):
            return node.outputs[0]
        where = constant(self.model, "grows_" + "_".join(map(str, grown)), np.array(grown, np.int64))
        return tape.op("Add", [node.outputs[0], tape.op("Mul", [self.past, where])])

    def _slice(self, tape: Tape, value: ir.Value, axis: int) -> ir.Value:
        end = constant(self.model, "end_of_axis", np.array([np.iinfo(np.int64).max], np.int64))
        return tape.op(
            "Slice", [value, self.past, end, constant(self.model, f"axis_{axis}", np.array([axis], np.int64))]
        )

    def _number(self, tape: Tape) -> ir.Value:
        if self.scalar is None:
            self.scalar = tape.op("Squeeze", [self.past])
        return self.scalar


def _values_of_length(model: ir.Model) -> dict[ir.Value, bool]:
    """{value computed only from sizes and constants: whether a Range, CumSum or NonZero is among its operators}."""
    found: dict[ir.Value, bool] = {}
    for node in model.graph:
        inputs = [value for value in node.inputs if value is not None]
        known = [value in found or _is_constant(value) for value in inputs]
        sized = node.op_type == "Shape"
        if sized or (all(known) and any(value in found for value in inputs)):
            counted = node.op_type in _COUNTERS or any(found.get(value, False) for value in inputs)
            for output in node.outputs:
                found[output] = counted and not sized
    return found


def _is_constant(value: ir.Value) -> bool:
    maker = value.producer()
    return (value.is_initializer() and not value.is_graph_input()) or (
        maker is not None and maker.op_type == "Constant"
    )


def _is_sequence(value: ir.Value, axis: int) -> bool:
    if value.shape is None or not -len(value.shape) <= axis < len(value.shape):
        return False
    dim = value.shape[axis]
    return not isinstance(dim, int) and dim.value == SEQUENCE


def _is_table(gather: ir.Node) -> bool:
    return _integer(gather, "axis", 0) == 0 and _first(gather).is_initializer()


def _axes(node: ir.Node, rank: int) -> list[int] | None:
    given = node.inputs[1]
    if given is None or given.const_value is None:
        return None
    return [int(axis) % rank for axis in given.const_value.numpy().reshape(-1)]


def _first(node: ir.Node) -> ir.Value:
    value = node.inputs[0]
    assert value is not None
    return value


def _integer(node: ir.Node, name: str, default: int) -> int:
    attribute = node.attributes.get(name)
    return default if attribute is None else int(attribute.value)


def _like(new: ir.Value, old: ir.Value) -> ir.Value:
    new.type = old.type
    return new
