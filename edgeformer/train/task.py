"""What the training loop asks of a task, and the order in which data is seen."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from torch import Tensor, nn


class Pick(NamedTuple):
    """One training window: the `window`-th of `task.windows`, in pass number `epoch` over the data."""

    epoch: int
    window: int


class Batch(NamedTuple):
    """Keyword arguments of the model's forward, and what it should give."""

    inputs: Mapping[str, Tensor]
    targets: Tensor


class Task(Protocol):
    """Data, model and loss of one kind of training. Made once, never changed."""

    @property
    def windows(self) -> int:
        """Training windows in one pass over the data."""
        ...

    @property
    def baseline(self) -> tuple[str, float]:
        """Name and validation loss of a guess that needs no Transformer: what training has to beat."""
        ...

    @property
    def loss_name(self) -> str:
        """What the loss is, with its unit."""
        ...

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the data as the model sees it; two runs with the same one see the same numbers."""
        ...

    def model(self) -> nn.Module:
        """A new module; its first weights come from torch's random state."""
        ...

    def files(self) -> dict[str, str]:
        """Text files of the checkpoint folder that never change during the run, config.json among them."""
        ...

    def batch(self, picks: list[Pick]) -> Batch:
        """Training windows, first axis in the order of `picks`."""
        ...

    def validation(self, batch_size: int, batches: int) -> Iterator[Batch]:
        """At most `batches` batches of text or series that training never sees, spread over it, always the same."""
        ...

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The mean loss, a scalar."""
        ...

    def finish(self, model: nn.Module, folder: Path) -> dict[str, Any]:
        """Show what the model learned (a text, a picture) as files in `folder`; what to tell the user, by name."""
        ...


@lru_cache(maxsize=2)
def window_order(seed: int, epoch: int, windows: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(windows)


def picks(seed: int, first: int, count: int, windows: int) -> list[Pick]:
    """The windows number `first` to `first + count` of a run: each pass sees every window once, in a new order.

    A function of its arguments alone, so the position in the data is one number and a resumed run cannot go astray.
    """
    numbers = range(first, first + count)
    return [Pick(n // windows, int(window_order(seed, n // windows, windows)[n % windows])) for n in numbers]


def spread(total: int, count: int) -> np.ndarray:
    """`count` different numbers of 0..total-1 (all of them if there are fewer), evenly spread, ascending."""
    return np.unique(np.linspace(0, total - 1, min(count, total)).round().astype(np.int64))
