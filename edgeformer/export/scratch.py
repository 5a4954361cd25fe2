"""Weights in mapped files that have no name: the system reads them when they are used and can evict them from memory.

An export has a model's weights three times: PyTorch's, the float graph's and the dequantized ones. In files of the
temporary folder (`TMPDIR`) they take 12 bytes of disk for each parameter, and no memory that would limit the model.
"""

from __future__ import annotations

import itertools
import tempfile

import torch

from edgeformer.errors import ExportError


def on_disk(values: torch.Tensor) -> torch.Tensor:
    """A copy of `values` in a privately mapped file: writing to the tensor changes memory, not the file.

    The file is already deleted from its folder; the system frees it when the tensor is freed or the process ends.

    Raises:
        ExportError: there is not enough room in the temporary folder.
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
    """Moves the parameters of `module` to mapped files, one after the other; tied parameters stay tied.

    A parameter that is a transposed or strided view is not moved: it may share its memory with another tensor.
    """
    moved: dict[tuple[int, torch.Size], torch.Tensor] = {}
    for parameter in module.parameters():
        if parameter.is_contiguous():
            key = (parameter.data_ptr(), parameter.shape)
            if key not in moved:
                moved[key] = on_disk(parameter.data)
            parameter.data = moved[key]


def put(module: torch.nn.Module, old: torch.Tensor, new: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Replaces the memory `old` by `new` in every parameter and buffer that uses it; returns [(tensor, old data)]."""
    before = [
        (tensor, tensor.data)
        for tensor in itertools.chain(module.parameters(), module.buffers())
        if tensor.data_ptr() == old.data_ptr() and tensor.shape == old.shape
    ]
    for tensor, _ in before:
        tensor.data = new
    return before
