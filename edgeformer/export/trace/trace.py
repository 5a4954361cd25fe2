"""Traces an `nn.Module` to an ONNX graph, then folds constants and fuses Transformer operators."""

from __future__ import annotations

import contextlib
import io
import logging
import re
import traceback
import warnings
from collections.abc import Iterator
from typing import Any

import onnx_ir as ir
import onnx_ir.passes.common as common
import torch
from onnxscript import optimizer, rewriter
from torch.fx.experimental import _config as experimental

from edgeformer.errors import ExportError, first_line
from edgeformer.export.inputs import Input, axes

OPSET = 23  # the first with Attention, RMSNormalization and RotaryEmbedding; from 25 on onnxruntime expands Attention
IR_VERSION = 10

# All different and none 1: the tracer merges axes of equal size and freezes an axis of size 1.
_SAMPLE_SIZES = (2, 7, 5, 11, 13)


def trace(module: torch.nn.Module, inputs: tuple[Input, ...], outputs: tuple[str, ...]) -> ir.Model:
    """The graph of `module(*inputs)` at opset 23; parameters keep their names, every named axis is dynamic.

    Raises:
        ExportError: the module cannot be traced, or the trace froze an axis; the message names the cause and a fix.
    """
    sizes = dict(zip(axes(inputs), _SAMPLE_SIZES, strict=False))
    sample = tuple(value.sample(sizes, seed) for seed, value in enumerate(inputs))
    # A past may be empty. The tracer assumes that other axes are neither 0 nor 1, so the lower bound says it.
    dims = {name: torch.export.Dim.DYNAMIC(min=0 if name.startswith("past") else 2) for name in sizes}
    dynamic = tuple({i: dims[dim] for i, dim in enumerate(value.shape) if isinstance(dim, str)} for value in inputs)
    exported = None
    with _quiet():
        try:
            dynamic_shapes = (dynamic,) if _takes_star_args(module) else dynamic
            try:
                exported = _exported(module, sample, dynamic_shapes, any_size=True)
            except ValueError as error:
                if "inconsistencies" not in str(error):
                    raise
                exported = _exported(module, sample, dynamic_shapes, any_size=False)
            program = torch.onnx.export(
                exported,
                dynamo=True,
                opset_version=OPSET,
                input_names=[value.name for value in inputs],
                output_names=list(outputs),
                optimize=False,
                verbose=False,
            )
        except Exception as error:
            raise ExportError(_explain(error, inputs, exported)) from error
    assert program is not None
    model = program.model
    _name_axes(model, inputs)
    with _quiet():
        optimize(model)
    return model


def _exported(
    module: torch.nn.Module, sample: tuple[torch.Tensor, ...], dynamic_shapes: Any, any_size: bool
) -> torch.export.ExportedProgram:
    """The exported program of `module`.

    Conditions on sizes that the solver cannot decide become run-time assertions and are dropped: the parity check runs
    other sizes anyway. With `any_size` the tracer allows sizes of 0 and 1, as torch.onnx's own capture does; it then
    rejects some sums of sizes as inconsistent.
    """
    with experimental.patch(backed_size_oblivious=any_size):  # type: ignore[attr-defined]
        return torch.export.export(
            module.eval(),
            sample,
            dynamic_shapes=dynamic_shapes,
            strict=False,
            prefer_deferred_runtime_asserts_over_guards=True,
        )


def optimize(model: ir.Model) -> None:
    """Folds constants, fuses norms, rotary embeddings and GELUs, merges common subexpressions; in place."""
    optimizer.optimize_ir(model, output_size_limit=1 << 20, should_fold=_keep_parameters)
    rewriter.onnx_fusions.fuse(model)
    for tidy in (common.CommonSubexpressionEliminationPass(), common.RemoveUnusedNodesPass()):
        tidy(model)


def _keep_parameters(node: ir.Node) -> bool | None:
    """False for nodes that must not be folded: quantization and parity need parameters by name, in layout [N, K]."""
    touched = [value for value in node.inputs if value is not None and value.is_initializer()]
    large = any(value.shape is not None and len(value.shape) >= 2 for value in touched)
    return False if large and node.op_type in ("Transpose", "Reshape", "Cast", "Mul", "Add", "Gather") else None


def _takes_star_args(module: torch.nn.Module) -> bool:
    return module.forward.__code__.co_flags & 0x04 != 0


def _name_axes(model: ir.Model, inputs: tuple[Input, ...]) -> None:
    """Renames the graph's axes as `inputs` names them.

    Raises:
        ExportError: an axis that should be dynamic has a fixed size; the tracer freezes axes without an error.
    """
    frozen, names = [], {}
    for value, wanted in zip(model.graph.inputs, inputs, strict=True):
        assert value.shape is not None
        for index, (found, dim) in enumerate(zip(value.shape, wanted.shape, strict=True)):
            if isinstance(dim, str) and isinstance(found, int):
                frozen.append(f"axis {index} ({dim!r}) of input {wanted.name!r} was frozen at {found}")
            elif isinstance(dim, str):
                names[str(found)] = dim
    if frozen:
        raise ExportError(f"{'; '.join(frozen)}. {_FROZEN}")
    values = [*model.graph.inputs, *(out for node in model.graph for out in node.outputs)]
    for value in values:
        if value.shape is not None:
            value.shape = ir.Shape(
                [dim if isinstance(dim, int) else names.get(str(dim), str(dim)) for dim in value.shape]
            )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences the exporter: it prints progress, warns about its internals, and dumps whole graphs when it fails."""
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


_FROZEN = (
    "The forward uses this size as a Python number: a loop over it (`for t in range(x.shape[1])`), an `if` on it, "
    "int(), or a parameter of exactly that length. Write the loop as one tensor operation; slice tables to x.shape[1]."
)
_STATIC = re.compile(r"inferred a static shape of (\d+) for dimension inputs(?:\['\w+'\])?\[(\d+)\]\.shape\[(\d+)\]")
_NAMED = re.compile(r"inferred a static shape of (\d+) for dimension inputs\['(\w+)'\]\.shape\[(\d+)\]")

_LIBRARY = re.compile(r"/torch/|/edgeformer/export/|<|/contextlib\.py|/onnxscript/")

_CAUSES = (  # (words in the tracer's error, or the function where it stopped) -> (cause; what to do)
    (
        (".numpy() is not supported", "Cannot access data pointer", "convert a SymFloat", "fake tensor to numpy"),
        "the forward leaves PyTorch (.numpy(), a NumPy or Python function on values), which cannot be traced; use "
        "torch operations instead",
    ),
    (
        ("complex-valued", "ComplexFloat", "complex64", "view_as_complex", "aten.complex", "aten.polar"),
        "the forward computes with complex numbers, which ONNX does not have; write a rotary embedding with cos and "
        "sin, x * cos + rotate_half(x) * sin, and other products by their real and imaginary parts",
    ),
    (
        ("SparseMeta", "Sparse", "sparse_coo"),
        "the forward uses sparse tensors, which ONNX does not have; use dense ones (.to_dense())",
    ),
    (
        ("torch._dynamo.exc.Unsupported", "graph break", "skip_frame", "torch.compiler.disable"),
        "the forward calls something that breaks the graph (a generator, a C function, torch.compiler.disable); "
        "remove it from the forward",
    ),
    (
        ("_detect_is_causal_mask",),
        "PyTorch's layers compare a mask's values to see whether it is causal; pass is_causal=True to "
        "nn.TransformerEncoder, tgt_is_causal=True to nn.TransformerDecoder and nn.Transformer",
    ),
    (
        ("Could not guard on data-dependent", "data-dependent", "Eq(u", "GuardOnDataDependent"),
        "the forward branches on the values of a tensor, which a graph cannot do; use torch.where or a mask",
    ),
    (
        ("Constraints violated", "specialized", "ConstraintViolationError", "dynamic_shapes"),
        "the forward uses the size of a dynamic axis as a Python number (a loop, an `if`, int, a table of one length)",
    ),
    (
        ("Unsupported", "No decompositions registered", "ConversionError", "No ONNX function found"),
        "the forward uses an operation that has no ONNX equivalent",
    ),
)


def _explain(error: Exception, inputs: tuple[Input, ...], exported: torch.export.ExportedProgram | None = None) -> str:
    """The error message: the likely cause with a fix, and the last line of user code that the tracer names."""
    chain: list[BaseException] = []
    cursor: BaseException | None = error
    while cursor is not None and cursor not in chain:
        chain.append(cursor)
        cursor = cursor.__cause__ or cursor.__context__
    root = next((e for e in reversed(chain) if isinstance(e, ExportError)), chain[-1])
    if isinstance(root, ExportError):
        return str(root)
    text = " ".join(str(e) for e in chain)
    stopped = {frame.name for e in chain for frame in traceback.extract_tb(e.__traceback__)}
    if frozen := _frozen(text, inputs):
        return f"{frozen}. {_FROZEN}"
    cause = next((advice for words, advice in _CAUSES if any(w in text or w in stopped for w in words)), None)
    first = first_line(root) or type(root).__name__
    where = _user_line(chain) or (_line_of(exported, text) if exported is not None else None)
    message = f"the module cannot be traced{f' ({where})' if where else ''}: {type(root).__name__}: {first[:300]}."
    return f"{message} Likely: {cause}." if cause else message


def _frozen(text: str, inputs: tuple[Input, ...]) -> str:
    """The axes that the tracer found to have a fixed size, by the names of `inputs`; "" if there are none."""
    by_name = {value.name: value for value in inputs}
    found = [(inputs[int(index)], int(axis), size) for size, index, axis in _STATIC.findall(text)]
    found += [(by_name[name], int(axis), size) for size, name, axis in _NAMED.findall(text) if name in by_name]
    axes_frozen = [
        f"axis {axis} ({value.shape[axis]!r}) of input {value.name!r} was frozen at {size}"
        for value, axis, size in found
    ]
    return "; ".join(dict.fromkeys(axes_frozen))


def _line_of(exported: torch.export.ExportedProgram, text: str) -> str | None:
    """`file:line` of the user code that calls the operator which `text` names as having no ONNX equivalent."""
    named = re.search(r"op='(\w+\.\w+)', overload", text)
    for node in exported.graph.nodes if named else ():
        value = node.meta.get("val")
        fits = "complex" not in text or (isinstance(value, torch.Tensor) and value.is_complex())
        if named and fits and str(node.target).startswith(f"{named[1]}."):  # another overload after decomposition
            frames = re.findall(r'File "([^"]+)", line (\d+)', node.meta.get("stack_trace") or "")
            own = [f"{file}:{line}" for file, line in frames if not _LIBRARY.search(file)]
            if own:
                return own[-1]
    return None


def _user_line(chain: list[BaseException]) -> str | None:
    """`file:line` of the deepest frame outside torch in any traceback of the chain."""
    found = None
    for error in chain:
        step = error.__traceback__
        while step is not None:
            name = step.tb_frame.f_code.co_filename
            if not _LIBRARY.search(name):
                found = f"{name}:{step.tb_lineno}"
            step = step.tb_next
    return found
