"""Modules that stand around the one that is meant."""

from __future__ import annotations

import torch

from edgeformer.errors import ExportError

_INNER = {  # kind -> the attribute that holds the wrapped module; each runs its forward and adds nothing to the numbers
    "torch._dynamo.eval_frame.OptimizedModule": "_orig_mod",
    "torch.nn.parallel.data_parallel.DataParallel": "module",
    "torch.nn.parallel.distributed.DistributedDataParallel": "module",
    "torch.distributed.fsdp.fully_sharded_data_parallel.FullyShardedDataParallel": "module",
    "torch.optim.swa_utils.AveragedModel": "module",
}


def unwrapped(module: torch.nn.Module) -> torch.nn.Module:
    """The module that was given to torch.compile, DataParallel and the like; any other as it is.

    Raises:
        ExportError: a TorchScript module, which holds no Python that could be traced.
    """
    while (inner := _INNER.get(f"{type(module).__module__}.{type(module).__qualname__}")) is not None:
        module = getattr(module, inner)
    if isinstance(module, torch.jit.ScriptModule):
        raise ExportError(
            f"a TorchScript module ({type(module).__name__}) cannot be traced again: return the nn.Module itself, "
            "before torch.jit.script or torch.jit.trace."
        )
    return module
