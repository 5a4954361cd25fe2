"""Weights in mapped files that have no name: the system reads them when they are used and can evict them from memory.

An export has a model's weights three times: PyTorch's, the float graph's and the dequantized ones. In files of the
temporary folder (`TMPDIR`) they take 12 bytes of disk for each parameter, and no memory that would limit the model.
"""

from __future__ import annotations

import itertools
import os
import secrets
import tempfile
from typing import Any, BinaryIO

import numpy as np
import torch

from edgeformer.errors import ExportError

PIECE = 8 << 20  # bytes that are written at once: Ctrl-C waits for one


def on_disk(values: torch.Tensor) -> torch.Tensor:
    """A copy of `values` in a privately mapped file: writing to the tensor changes memory, not the file.

    The file is already deleted from its folder; the system frees it when the tensor is freed or the process ends.

    Raises:
        ExportError: there is not enough room in the temporary folder.
    """
    if not values.numel():
        return values
    # The name is known before the file is there: where Ctrl-C comes while the system makes it, it is deleted too.
    path = os.path.join(tempfile.gettempdir(), f"edgeformer-{secrets.token_hex(8)}")
    try:
        with open(path, "xb", opener=_private) as file:
            data = values.detach().reshape(-1).view(torch.uint8).numpy()  # bytes: numpy knows no bfloat16
            write_pieces(file, data)
        mapped = torch.from_file(path, shared=False, size=values.numel(), dtype=values.dtype)
    except OSError as error:
        raise ExportError(
            f"{values.nbytes:,} bytes of weights cannot be written to {tempfile.gettempdir()}: {error}. An export "
            "needs 12 bytes a parameter there; name a folder with more room by TMPDIR."
        ) from error
    finally:
        try:  # noqa: SIM105  a function of Python before the call is where Ctrl-C would come
            os.unlink(path)
        except FileNotFoundError:
            pass
    return mapped.view(values.shape)


def write_pieces(file: BinaryIO, data: np.ndarray[Any, np.dtype[np.uint8]]) -> None:
    """Writes bytes [n] to the file, PIECE at a time."""
    for at in range(0, len(data), PIECE):
        file.write(data[at : at + PIECE].data)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


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
