"""Weights in files without a name, mapped: the system reads them when they are used, and takes their memory back.

An export holds a model's weights three times: as PyTorch's, as the float graph's, as what its blocks stand for. In
files of the temporary folder (`TMPDIR`) that is 12 bytes of disk a parameter; memory would limit a model's size so.
"""

from __future__ import annotations

import itertools
import tempfile

import torch

from edgeformer.errors import ExportError


def on_disk(values: torch.Tensor) -> torch.Tensor:
    """`values` in a file of their own, mapped privately: writing to the tensor changes memory, not the file.

    The file has no name any more when this returns; it goes when the tensor does, and with the process at the latest.

    Raises:
        ExportError: the temporary folder has no room for it.
    """
    if not values.numel():
        return values
    with tempfile.NamedTemporaryFile() as file:
        try:
            values.detach().reshape(-1).view(torch.uint8).numpy().tofile(file)  # bytes: numpy knows no bfloat16
            file.flush()
        except OSError as error:
            raise ExportError(
                f"{values.nbytes:,} bytes of weights cannot be written to {tempfile.gettempdir()}: {error}. An export "
                "needs 12 bytes a parameter there; name a folder with more room by TMPDIR."
            ) from error
        mapped = torch.from_file(file.name, shared=False, size=values.numel(), dtype=values.dtype)
    return mapped.view(values.shape)


def to_disk(module: torch.nn.Module) -> None:
    """Moves the parameters of `module` to files, one after the other; tied ones stay tied.

    A parameter that is a transposed or strided view stays where it is: what it shares its memory with is not known.
    """
    moved: dict[tuple[int, torch.Size], torch.Tensor] = {}
    for parameter in module.parameters():
        if parameter.is_contiguous():
            key = (parameter.data_ptr(), parameter.shape)
            if key not in moved:
                moved[key] = on_disk(parameter.data)
            parameter.data = moved[key]


def put(module: torch.nn.Module, old: torch.Tensor, new: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Every parameter or buffer of `module` over the memory of `old` gets that of `new`; (which, its data before)."""
    before = [
        (tensor, tensor.data)
        for tensor in itertools.chain(module.parameters(), module.buffers())
        if tensor.data_ptr() == old.data_ptr() and tensor.shape == old.shape
    ]
    for tensor, _ in before:
        tensor.data = new
    return before
