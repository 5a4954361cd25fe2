"""How many tokens a model has learned positions for: found by running it, not by what its config says.

A table of positions is an embedding whose largest index grows by one with each token, whatever the tokens are. It may
start behind its padding row (RoBERTa's 514 rows hold 512 tokens), or have more rows than the config counts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from edgeformer.export.inputs import axes
from edgeformer.export.source import Source

_LENGTHS = (4, 6, 9)


class _Lookups(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The largest index that each embedding table was read at."""

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
                raise IndexError("beyond the table")
        return func(*args, **(kwargs or {}))


def learned_positions(source: Source) -> int | None:
    """Tokens that fit the model's tables of positions; None where it has none, or takes no token ids."""
    if not source.inputs:
        return None
    ids = source.inputs[0]
    if ids.name != "input_ids" or ids.shape != ("batch", "sequence"):
        return None
    seen = [found for length in _LENGTHS if (found := _lookups(source, length)) is not None]
    if len(seen) != len(_LENGTHS):
        return None
    fits = []
    for key in set(seen[0]).intersection(*seen[1:]):
        offsets = {found[key] - length + 1 for found, length in zip(seen, _LENGTHS, strict=True)}
        if len(offsets) == 1:
            fits.append(key[1] - offsets.pop())
    # Tables of relative distances grow alike for short texts, and then no more.
    return next((length for length in sorted(fits) if _lookups(source, length + 1) is None), None)


def _lookups(source: Source, length: int) -> dict[tuple[int, int], int] | None:
    """What a text of `length` equal tokens reads; None where the model does not take it."""
    sizes = {axis: length if axis == "sequence" else 1 for axis in axes(source.inputs)}
    feeds = {value.name: value.sample(sizes, 0) for value in source.inputs}
    ids = source.inputs[0]
    padding = source.config.get("pad_token_id")
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
            source.module(**feeds, **source.fixed)
    except Exception:
        return None
    return lookups.found
