"""Two pictures: the loss of a run, and a forecast against the truth. Drawn without a display."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MultipleLocator

from edgeformer.train.checkpoint import write_atomically

INK, GREY, BLUE, ORANGE = "#22272e", "#8a929c", "#2f6fb5", "#e07a1f"


@contextmanager
def styled(path: Path, size: tuple[float, float]) -> Iterator[Figure]:
    """A figure that is written to `path` as PNG when the block ends. Without pyplot: no global state, no display.

    Raises:
        TrainingError: as `write_atomically`.
    """
    style: Any = {
        "font.size": 10.5,
        "axes.edgecolor": GREY,
        "axes.labelcolor": INK,
        "axes.titlecolor": INK,
        "axes.titlelocation": "left",
        "axes.titleweight": "bold",
        "axes.titlepad": 12,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": "#e9ecef",
        "grid.linewidth": 0.8,
        "xtick.color": INK,
        "ytick.color": INK,
        "legend.frameon": False,
        "lines.solid_capstyle": "round",
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=size, dpi=150, layout="constrained")
        FigureCanvasAgg(figure)
        yield figure
        content = io.BytesIO()
        figure.savefig(content, format="png", facecolor="white")
    write_atomically(path, content.getvalue())


def loss_picture(path: Path, history: np.ndarray, loss_name: str, baseline: tuple[str, float]) -> None:
    """Draw training and validation loss over the steps, and the loss of the baseline.

    `history` is float64 [n, 4]: step, training loss, validation loss, learning rate; NaN where nothing was measured.
    """
    steps, train, validation = history[:, 0], history[:, 1], history[:, 2]
    trained, checked = ~np.isnan(train), ~np.isnan(validation)
    with styled(path, (8, 4.5)) as figure:
        axes = figure.subplots()
        axes.plot(steps[trained], train[trained], color=BLUE, alpha=0.25, linewidth=0.8)
        axes.plot(steps[trained], smooth(train[trained]), color=BLUE, linewidth=1.8, label="training (smoothed)")
        axes.plot(
            steps[checked],
            validation[checked],
            color=ORANGE,
            linewidth=1.8,
            marker="o",
            markersize=4,
            label="validation",
        )
        name, value = baseline
        axes.axhline(value, color=GREY, linestyle=(0, (4, 3)), linewidth=1.2, label=f"{name}: {value:.3g}")
        axes.annotate(
            f"{validation[checked][-1]:.3g}",
            (steps[checked][-1], validation[checked][-1]),
            xytext=(7, 0),
            textcoords="offset points",
            color=ORANGE,
            va="center",
            weight="bold",
        )
        top = max(validation[checked][0], value)
        axes.set(
            title="Loss while training",
            xlabel="step",
            ylabel=loss_name,
            xlim=(0, steps[-1] * 1.08),
            ylim=(0, top * 1.08),
        )
        axes.legend(loc="upper right")


def smooth(values: np.ndarray) -> np.ndarray:
    """Centered moving average over a twentieth of the run, with a narrower window at both ends."""
    half = len(values) // 40
    sums = np.concatenate([[0.0], np.cumsum(values)])
    reach = np.minimum(half, np.minimum(np.arange(len(values)), np.arange(len(values))[::-1]))  # (steps,)
    first, last = np.arange(len(values)) - reach, np.arange(len(values)) + reach + 1
    means: np.ndarray = (sums[last] - sums[first]) / (last - first)
    return means


@dataclass(frozen=True)
class Forecast:
    """A series of forecasts of `horizon` steps each; every one knows the truth up to its own start."""

    history: np.ndarray  # float [m], before the first forecast
    truth: np.ndarray  # float [n]
    forecast: np.ndarray  # float [n]
    horizon: int
    label: str  # of the values
    naive_error: float  # mean absolute error of repeating the last period


def forecast_picture(path: Path, drawn: Forecast, *, windows: int = 10) -> None:
    """Draw the first `windows` forecasts with the truth, and the errors below."""
    history, truth, forecast, horizon = drawn.history, drawn.truth, drawn.forecast, drawn.horizon
    error = float(np.abs(forecast - truth).mean())
    shown = min(len(truth), windows * horizon)
    time = np.arange(shown)
    with styled(path, (10, 5.4)) as figure:
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
        for start in range(0, shown, 2 * horizon):
            above.axvspan(start, min(start + horizon, shown), color="#f4f6f8", zorder=0, linewidth=0)
        before = np.arange(-len(history), 1)
        above.plot(before, np.append(history, truth[0]), color=GREY, linewidth=1.3, label="known before")
        above.plot(time, truth[:shown], color=INK, linewidth=1.3, label="truth")
        above.plot(time, forecast[:shown], color=ORANGE, linewidth=1.9, label=f"forecast, {horizon} steps at a time")
        above.axvline(0, color=GREY, linewidth=1)
        above.set_title("Forecast against truth, on data never trained on", pad=28)
        above.legend(loc="lower left", bbox_to_anchor=(-0.01, 0.98), ncols=3)
        above.set_ylabel(drawn.label)
        below.bar(time, (forecast - truth)[:shown], width=1.0, color=ORANGE, alpha=0.75)
        below.hlines(0, 0, shown, color=INK, linewidth=0.8)
        errors = f"mean error {error:.2f}\nby repeating the last period {drawn.naive_error:.2f}"
        below.text(0.01, 0.5, errors, transform=below.transAxes, va="center", linespacing=1.5)
        below.set(xlabel="steps since the end of the training part; each shade is one forecast", ylabel="error")
        below.set_xlim(-len(history), shown)
        below.xaxis.set_major_locator(MultipleLocator(horizon * max(1, (len(history) + shown) // (18 * horizon))))
        figure.align_ylabels()
