"""The number of tokens a model has learned positions for, measured by running it: configs are often wrong about it.

A table of learned positions is an embedding whose largest index grows by one with each token, for any tokens. Its first
position may come after a padding row (RoBERTa's 514 rows serve 512 tokens), and it may have rows that the config does
not count.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from edgeformer.export.inputs import Input, axes

Forward = Callable[..., Any]  # a module: takes its inputs by name

_LENGTHS = (4, 6, 9)


class _Lookups(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records the largest index with which each embedding table is read."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: dict[tuple[int, int], int] = {}  # (address, rows) -> index

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        reads = func in (torch.ops.aten.embedding.default, torch.ops.aten.index.Tensor)
        if reads and args[0].ndim == 2:
            table, index = args[0], args[1] if torch.is_tensor(args[1]) else args[1][0]
            if index is None or index.dtype != torch.int64 or not index.numel():
                return func(*args, **(kwargs or {}))
            key = (table.data_ptr(), table.shape[0])
            self.found[key] = max(self.found.get(key, 0), int(index.max()))
            if self.found[key] >= table.shape[0]:
                raise IndexError("the index is larger than the table")
        return func(*args, **(kwargs or {}))


def learned_positions(forward: Forward, inputs: tuple[Input, ...], padding: int | None) -> int | None:
    """Tokens that fit the model's tables of learned positions; None if it has none, or takes no token ids.

    `padding` is the id of the padding token: some models do not count it as a position.
    """
    if not inputs:
        return None
    ids = inputs[0]
    if ids.name != "input_ids" or ids.shape != ("batch", "sequence"):
        return None
    seen = [found for length in _LENGTHS if (found := _lookups(forward, inputs, padding, length)) is not None]
    if len(seen) != len(_LENGTHS):
        return None
    fits = []
    for key in set(seen[0]).intersection(*seen[1:]):
        offsets = {found[key] - length + 1 for found, length in zip(seen, _LENGTHS, strict=True)}
        if len(offsets) == 1:
            fits.append(key[1] - offsets.pop())
    # Tables of relative distances grow by one with each token too, but only for short texts.
    return next((length for length in sorted(fits) if _lookups(forward, inputs, padding, length + 1) is None), None)


def _lookups(
    forward: Forward, inputs: tuple[Input, ...], padding: int | None, length: int
) -> dict[tuple[int, int], int] | None:
    """{table: largest index} for a text of `length` equal tokens; None if the model cannot run it."""
    sizes = {axis: length if axis == "sequence" else 1 for axis in axes(inputs)}
    feeds = {value.name: value.sample(sizes, 0) for value in inputs}
    ids = inputs[0]
    token = ids.high - 1 if padding != ids.high - 1 else ids.high - 2
    feeds["input_ids"] = torch.full((1, length), token)
    for name, value in feeds.items():
        if name.endswith("mask"):
            feeds[name] = torch.ones_like(value)
        elif name == "token_type_ids":
            feeds[name] = torch.zeros_like(value)
    lookups = _Lookups()
    try:
        with torch.no_grad(), lookups:
            forward(**feeds)
    except Exception:
        return None
    return lookups.found
