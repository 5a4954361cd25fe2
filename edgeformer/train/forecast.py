"""The forecasting task: windows of one series; the last position of the context gives the next values at once."""

from __future__ import annotations

import csv
import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 (its usual abbreviation)
from torch import Tensor, nn

from edgeformer.errors import TrainingError
from edgeformer.models.encoder import EncoderConfig, Transformer
from edgeformer.train.picture import Forecast, forecast_picture
from edgeformer.train.recipe import SeriesData, check_keys
from edgeformer.train.task import Batch, Pick, spread


def seasonal_series(hours: int, seed: int) -> np.ndarray:
    """float64 [hours]: synthetic power of a small town in kW, with a day, a week, seasons, weather and noise."""
    rng = np.random.default_rng(seed)
    t = np.arange(hours)
    day, weekend = 2 * np.pi * t / 24, t // 24 % 7 >= 5
    morning_and_evening = 9 * np.sin(day - 2.2) + 5 * np.sin(2 * day - 0.6) + 1.5 * np.sin(3 * day + 0.4)
    season = 6 * np.sin(2 * np.pi * t / (24 * 60))
    weather = np.zeros(hours)
    shocks = rng.normal(0, 0.25, hours)
    for hour in range(1, hours):
        weather[hour] = 0.98 * weather[hour - 1] + shocks[hour]
    day_shape = morning_and_evening * np.where(weekend, 0.55, 1) - 4 * weekend  # (hours,)
    power: np.ndarray = 50 + day_shape + season + weather + rng.normal(0, 0.4, hours)
    return power


def read_column(path: str, column: str) -> np.ndarray:
    """float64 [n]: one column of a CSV file with a header; if `column` is empty, the first that is all numbers.

    Raises:
        TrainingError: the file or the column is missing, or a cell is not a finite number (the message has its line).
    """
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.reader(file))
    except OSError as error:
        raise TrainingError(f"series {path} cannot be read: {error.strerror}; give a CSV file, or seasonal") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise TrainingError(f"series {path} is not CSV text in UTF-8: {error}") from error
    header, body = (rows[0], rows[1:]) if rows else ([], [])
    if column and column not in header:
        raise TrainingError(f"{path} has no column {column!r}; its header is {', '.join(header) or 'empty'}")
    for name in [column] if column else header:
        place = header.index(name)
        cells = [(line, row[place] if place < len(row) else "") for line, row in enumerate(body, start=2) if row]
        bad = [(line, cell) for line, cell in cells if not is_number(cell)]
        if not bad and cells:
            return np.array([float(cell) for _, cell in cells])
        if column and bad:
            raise TrainingError(
                f"{path} line {bad[0][0]}: column {column!r} holds {bad[0][1]!r}, expected a finite number"
            )
    raise TrainingError(f"{path} has no column of numbers below a header; its header is {', '.join(header) or 'empty'}")


def is_number(cell: str) -> bool:
    """Whether the cell is a finite number."""
    try:
        return math.isfinite(float(cell))
    except ValueError:
        return False


class ForecastTask:
    """Values [t - context_length, t) -> values [t, t + prediction_length), standardized by the training part.

    Raises:
        TrainingError: the series cannot be read, is too short or constant, or the model's sizes do not fit.
    """

    loss_name = "mean squared error (of standardized values)"

    def __init__(self, data: SeriesData, model: Mapping[str, Any], seed: int) -> None:
        self.data = data
        synthetic = data.source == "seasonal"
        self.series = seasonal_series(data.hours, seed) if synthetic else read_column(data.source, data.column)
        self.label = "power, kW (synthetic)" if synthetic else data.column or Path(data.source).stem
        self.cut_at = round(len(self.series) * (1 - data.validation_fraction))
        window = data.context_length + data.prediction_length
        # The context of the first forecast may be training data; the forecast values are not.
        self.validation_starts = np.arange(self.cut_at - data.context_length, len(self.series) - window + 1)
        self.windows = self.cut_at - window + 1
        if self.windows < 1 or not len(self.validation_starts):
            raise TrainingError(
                f"series too short: {len(self.series)} values leave {self.cut_at} for training and "
                f"{len(self.series) - self.cut_at} for validation, expected {window} and {data.prediction_length}"
            )
        self.mean = float(self.series[: self.cut_at].mean())
        self.std = float(self.series[: self.cut_at].std())
        if not self.std > 0:
            raise TrainingError(f"the series is constant ({self.mean}) in its training part; there is nothing to learn")
        self.values = ((self.series - self.mean) / self.std).astype(np.float32)
        self.config = self.make_config(model)
        self.baseline = (f"repeating the last {data.period} values", self.naive_loss())
        self.fingerprint = hashlib.sha256(self.series.tobytes()).hexdigest()

    def make_config(self, model: Mapping[str, Any]) -> EncoderConfig:
        """The model's config: `model` with the sizes of the data."""
        from_data = {"input_dim": 1, "output_dim": self.data.prediction_length}
        check_keys(model, [name for name in asdict(EncoderConfig()) if name not in from_data], "[model]")
        try:
            config = EncoderConfig(**from_data, **model)
        except (TypeError, ValueError) as error:
            raise TrainingError(f"[model] cannot be built: {error}") from error
        if config.max_length < self.data.context_length:
            raise TrainingError(
                f"model.max_length {config.max_length} is below data.context_length {self.data.context_length}"
            )
        return config

    def naive_loss(self) -> float:
        """Validation loss of repeating the last period."""
        guess, truth = [], []
        for start in self.validation_starts:
            context, target = self.window(int(start))
            guess.append(np.resize(context[-self.data.period :], len(target)))
            truth.append(target)
        return float(np.mean((np.array(guess) - np.array(truth)) ** 2))

    def window(self, start: int) -> tuple[np.ndarray, np.ndarray]:
        """(context, target): the standardized values from `start` on."""
        middle = start + self.data.context_length
        return self.values[start:middle], self.values[middle : middle + self.data.prediction_length]

    def model(self) -> Transformer:
        """See TrainingTask."""
        return Transformer(**asdict(self.config))

    def files(self) -> dict[str, str]:
        """See TrainingTask."""
        scale = {
            "context_length": self.data.context_length,
            "prediction_length": self.data.prediction_length,
            "mean": self.mean,  # the model takes and gives (value - mean) / std
            "std": self.std,
        }
        return {"config.json": json.dumps(self.config.to_dict() | scale, indent=2) + "\n"}

    def batch(self, picks: list[Pick]) -> Batch:
        """See TrainingTask."""
        return self.cut([pick.window for pick in picks])

    def validation(self, batch_size: int, batches: int) -> Iterator[Batch]:
        """See TrainingTask."""
        starts = self.validation_starts[spread(len(self.validation_starts), batch_size * batches)]
        for first in range(0, len(starts), batch_size):
            yield self.cut(starts[first : first + batch_size].tolist())

    def cut(self, starts: list[int]) -> Batch:
        """The windows that begin at `starts`."""
        contexts, targets = zip(*map(self.window, starts), strict=True)
        inputs = torch.from_numpy(np.stack(contexts))[..., None]  # (batch, context_length, 1)
        return Batch({"input_values": inputs}, torch.from_numpy(np.stack(targets)))

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """See TrainingTask."""
        return F.mse_loss(outputs[:, -1], targets)  # the forecast of the last position

    @torch.inference_mode()
    def finish(self, model: nn.Module, folder: Path) -> dict[str, Any]:
        """Forecast the validation part in steps of prediction_length; draw forecast.png."""
        device = next(model.parameters()).device
        starts = self.validation_starts[:: self.data.prediction_length]
        contexts = np.stack([self.window(int(start))[0] for start in starts])
        outputs = model(input_values=torch.from_numpy(contexts)[..., None].to(device))[:, -1].float().cpu().numpy()
        first = self.cut_at
        forecast = outputs.ravel() * self.std + self.mean
        truth = self.series[first : first + len(forecast)]
        naive = np.concatenate([np.resize(c[-self.data.period :], self.data.prediction_length) for c in contexts])
        error = float(np.abs(forecast - truth).mean())
        naive_error = float(np.abs(naive * self.std + self.mean - truth).mean())
        history = self.series[first - self.data.context_length : first]
        drawn = Forecast(history, truth, forecast, self.data.prediction_length, self.label, naive_error)
        forecast_picture(folder / "forecast.png", drawn)
        return {"mean absolute error": error, f"error of {self.baseline[0]}": naive_error}
