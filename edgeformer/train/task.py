"""The interface between the training loop and a task, and the order of the training data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from torch import Tensor, nn


class Pick(NamedTuple):
    """One training window: number `window` of `task.windows`, in pass `epoch` over the data."""

    epoch: int
    window: int


class Batch(NamedTuple):
    """Keyword arguments of the model's forward, and the expected outputs."""

    inputs: Mapping[str, Tensor]
    targets: Tensor


class TrainingTask(Protocol):
    """Data, model and loss of one kind of training. Immutable."""

    @property
    def windows(self) -> int:
        """Training windows in one pass over the data."""
        ...

    @property
    def baseline(self) -> tuple[str, float]:
        """Name and validation loss of a prediction without a Transformer, for comparison."""
        ...

    @property
    def loss_name(self) -> str:
        """Name of the loss, with its unit."""
        ...

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the data as the model sees it."""
        ...

    def model(self) -> nn.Module:
        """A new module, initialized from torch's global generator."""
        ...

    def files(self) -> dict[str, str]:
        """Text files of the checkpoint folder that never change during the run, such as config.json."""
        ...

    def batch(self, picks: list[Pick]) -> Batch:
        """Training windows, first axis in the order of `picks`."""
        ...

    def validation(self, batch_size: int, batches: int) -> Iterator[Batch]:
        """At most `batches` batches of the validation data, evenly spread over it, always the same."""
        ...

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The mean loss, a scalar."""
        ...

    def finish(self, model: nn.Module, folder: Path) -> dict[str, Any]:
        """Write a sample or a picture to `folder`; returns values to print, by name."""
        ...


@lru_cache(maxsize=2)
def window_order(seed: int, epoch: int, windows: int) -> np.ndarray:
    """int64 [windows]: the random order of the windows in pass `epoch`."""
    return np.random.default_rng([seed, epoch]).permutation(windows)


def picks(seed: int, first: int, count: int, windows: int) -> list[Pick]:
    """Windows `first` to `first + count` of a run. Each pass sees every window once, in a new order.

    The result depends on the arguments only, so a resumed run needs just the number of windows seen.
    """
    numbers = range(first, first + count)
    return [Pick(n // windows, int(window_order(seed, n // windows, windows)[n % windows])) for n in numbers]


def spread(total: int, count: int) -> np.ndarray:
    """`count` different numbers of 0..total-1 (all if there are fewer), evenly spread, ascending."""
    return np.unique(np.linspace(0, total - 1, min(count, total)).round().astype(np.int64))
