"""The options of a training run that are no part of its recipe."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from edgeformer.engines.options import option


@dataclass(frozen=True)
class RunOptions:
    """How a recipe is run. The fields with a help text are flags of `python -m edgeformer.train`."""

    resume: bool = option(False, "Go on from the last checkpoint in --out.")
    overwrite: bool = option(False, "Start again in a folder that holds a run.")
    stop_at: int | None = option(None, "Stop at this step, with a checkpoint to resume from.")
    cpu: bool = option(False, "Leave the GPU alone.")
    progress_bar: bool = False
    should_stop: Callable[[], bool] = lambda: False  # called once a step; True ends the run early, with a checkpoint
