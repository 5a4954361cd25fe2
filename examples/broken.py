"""Modules that break the rules of docs/user-models.md, and the exporter's message for each. Run it to print them.

    python examples/broken.py
    python -m edgeformer.export examples/broken.py:Loop -o nowhere        the same from the command line

No bundle is written for any of them. Each docstring has the correct way.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

SPEC = {"x": "float32[batch,sequence,8]"}


class Loop(nn.Module):
    """A Python loop over the sequence is unrolled for one length. Use attention, torch.cumsum, a convolution, ..."""

    input_spec = SPEC

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        state, states = torch.zeros_like(x[:, 0]), []
        for step in range(x.shape[1]):
            state = torch.tanh(self.linear(x[:, step]) + state)
            states.append(state)
        return torch.stack(states, 1)


class Table(Loop):
    """A parameter of one length fixes the sequence. Make it longer than any, and add `table[: x.shape[1]]`."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(7, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x + self.table)


class SizeBranch(Loop):
    """An `if` on a size is decided while tracing. Write code for every size: here `x[:, -8:]`."""

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x[:, -8:] if x.shape[1] > 8 else x)


class ValueBranch(Loop):
    """An `if` on values cannot be in a graph. Use torch.where."""

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) if x.sum() > 0 else -self.linear(x)


class GuessedMask(Loop):
    """PyTorch's layers compare a mask's values to see whether it is causal. Pass `is_causal=True`."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x, nn.Transformer.generate_square_subsequent_mask(x.shape[1]))


class NoShapes(Loop):
    """An argument of unknown shape. Give the module an `input_spec`, or pass --input x=float32[batch,sequence,8]."""

    input_spec = None


class OwnPositions(nn.Module):
    """A language model that computes positions from token values cannot continue from a KV cache."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(32, 16), nn.Embedding(64, 16)
        self.qkv, self.head = nn.Linear(16, 48), nn.Linear(16, 32)

    def forward(self, input_ids: Tensor) -> Tensor:
        positions = (input_ids >= 0).long().flip(1).cumsum(1).flip(1) - 1  # how many tokens follow
        q, k, v = self.qkv(self.tokens(input_ids) + self.positions(positions)).unsqueeze(1).chunk(3, -1)
        return self.head(nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).squeeze(1))


class Complex(Loop):
    """ONNX has no complex numbers. Write a rotary embedding with cos and sin."""

    def forward(self, x: Tensor) -> Tensor:
        angles = torch.arange(x.shape[1]).unsqueeze(-1)
        return (self.linear(x) * torch.exp(1j * angles)).real


class GraphBreak(Loop):
    """NumPy on values leaves the graph. Use the torch operation of the same name."""

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(torch.from_numpy(np.tanh(x.detach().numpy())))


class Wrapper(nn.Module):
    """A forward that names no argument hides its inputs. Export the module inside, or name the arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Loop()

    def forward(self, *args: Tensor, **more: Tensor) -> Tensor:
        return self.inner(*args, **more)


def scripted() -> nn.Module:
    """TorchScript has no Python code to trace. Return the module before torch.jit.script."""
    return torch.jit.script(nn.Linear(8, 8))


class UnknownInput(Loop):
    """An input that forward has no argument for."""

    input_spec = SPEC | {"mask": "bool[batch,sequence]"}


class Random(Loop):
    """Results that differ at each call cannot be compared. Remove dropout and noise from the forward."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(self.linear(x), 0.1, training=True)


def no_such_layer() -> nn.Module:
    """torch.nn has no TransformerLayer."""
    return nn.TransformerLayer(8, 2)  # type: ignore[attr-defined]


BROKEN = (
    "Loop", "Table", "SizeBranch", "ValueBranch", "GuessedMask", "NoShapes", "OwnPositions", "Complex", "GraphBreak",
    "Wrapper", "scripted", "UnknownInput", "Random", "no_such_layer",
)  # fmt: skip


def message(name: str) -> str:
    """The exporter's message for one of them."""
    from edgeformer.errors import EdgeformerError
    from edgeformer.export import ExportOptions, export

    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "bundle"
        try:
            export(ExportOptions(f"{__file__}:{name}", output, quantize="none", tokens=0))
        except EdgeformerError as error:
            assert not output.exists()
            return f"{type(error).__name__}: {error}"
    raise AssertionError(f"{name} was exported")


if __name__ == "__main__":
    for name in sys.argv[1:] or BROKEN:
        print(f"{name}\n    {message(name)}\n")
