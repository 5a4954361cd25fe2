"""Removes wrappers such as torch.compile and DataParallel from a module."""

from __future__ import annotations

import torch

from edgeformer.errors import ExportError

_INNER = {  # class -> attribute of the wrapped module; none of these changes results
    "torch._dynamo.eval_frame.OptimizedModule": "_orig_mod",
    "torch.nn.parallel.data_parallel.DataParallel": "module",
    "torch.nn.parallel.distributed.DistributedDataParallel": "module",
    "torch.distributed.fsdp.fully_sharded_data_parallel.FullyShardedDataParallel": "module",
    "torch.optim.swa_utils.AveragedModel": "module",
}


def unwrap_module(module: torch.nn.Module) -> tuple[torch.nn.Module, str]:
    """(the module inside of torch.compile, DataParallel and similar wrappers, a note or "").

    Compiled parts of the module are restored too: the tracer needs their Python code.

    Raises:
        ExportError: a TorchScript module, which has no Python code.
    """
    removed = []
    while (inner := _inner(module)) is not None:
        removed.append(type(module).__name__)
        module = inner
    if isinstance(module, torch.jit.ScriptModule):
        raise ExportError(
            f"a TorchScript module ({type(module).__name__}) cannot be traced; return the nn.Module before "
            "torch.jit.script or torch.jit.trace."
        )
    for parent in list(module.modules()):
        parent._compiled_call_impl = None  # of module.compile()
        for name, child in list(parent.named_children()):
            if (inner := _inner(child)) is not None:
                setattr(parent, name, inner)
                removed.append(type(child).__name__)
    words = ", ".join(dict.fromkeys(removed))
    return module, f"taken out of {words}, which changes no results" if words else ""


def _inner(module: torch.nn.Module) -> torch.nn.Module | None:
    attribute = _INNER.get(f"{type(module).__module__}.{type(module).__qualname__}")
    found = getattr(module, attribute) if attribute is not None else None
    return found if isinstance(found, torch.nn.Module) else None
