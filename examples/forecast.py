"""Forecast a series from start to end: train, export, run without torch, draw the prediction against the truth.

    python examples/forecast.py [FOLDER]            (default: runs/forecast; half a minute on two idle cores)

It leaves FOLDER/checkpoint (PyTorch), FOLDER/bundle (ONNX, what a device needs) and FOLDER/forecast.png.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np

import edgeformer


def make_bundle(folder: Path) -> np.ndarray:
    """Trains on the synthetic power series and exports; returns the series, float64 [hours]. Only this needs torch."""
    from edgeformer.export import ExportOptions, export
    from edgeformer.train.forecast import seasonal_series
    from edgeformer.train.loop import train
    from edgeformer.train.options import RunOptions
    from edgeformer.train.recipe import load_recipe

    recipe = load_recipe("demo-forecast")
    report = train(recipe, folder / "checkpoint", RunOptions(overwrite=True, progress_bar=True))
    print(f"validation loss {report.validation_loss:.3f}, {report.baseline[0]}: {report.baseline[1]:.3f}")
    options = ExportOptions(str(folder / "checkpoint"), folder / "bundle", quantize="none", overwrite=True)
    export(options)
    return seasonal_series(recipe.data.hours, recipe.train.seed)


def forecast(model: edgeformer.Model, context: np.ndarray) -> np.ndarray:
    """The next values [prediction_length] after `context` [context_length], in the units of the series."""
    config = model.bundle.config
    scaled = (context - config["mean"]) / config["std"]
    inputs = scaled.astype(np.float32).reshape(1, -1, 1)  # (batch, sequence, input_dim)
    (outputs,) = model(input_values=inputs).values()  # (batch, sequence, prediction_length)
    return outputs[0, -1] * config["std"] + config["mean"]  # only the last position attends to the whole context


def main(folder: Path) -> None:
    series = make_bundle(folder)
    model = edgeformer.load(folder / "bundle")
    print(model.explain())

    config = model.bundle.config
    length, horizon = config["context_length"], config["prediction_length"]
    first = round(len(series) * 0.9)  # the validation part of the recipe, not used in training
    starts = range(first, len(series) - horizon + 1, horizon)
    began = time.perf_counter()
    predicted = np.concatenate([forecast(model, series[start - length : start]) for start in starts])
    each = (time.perf_counter() - began) / len(starts)
    truth = series[first : first + len(predicted)]
    yesterday = series[first - horizon : first - horizon + len(predicted)]
    error, naive_error = (float(np.abs(guess - truth).mean()) for guess in (predicted, yesterday))
    print(
        f"{len(starts)} forecasts, {each * 1e3:.2f} ms each; mean error {error:.2f} kW, as yesterday: {naive_error:.2f}"
    )

    from edgeformer.train.picture import forecast_picture

    history = series[first - length : first]
    forecast_picture(folder / "forecast.png", history, truth, predicted, horizon, "power, kW (synthetic)", naive_error)
    print(f"picture: {folder / 'forecast.png'}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/forecast"))
