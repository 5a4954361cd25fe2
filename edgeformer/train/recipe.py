"""A recipe: all that determines the result of a training run, read from a TOML file.

task = "text"            # or "forecast"
[data]                   # TextData or SeriesData
[model]                  # DecoderConfig or EncoderConfig, without the sizes that follow from the data
[train]                  # TrainOptions
"""

from __future__ import annotations

import difflib
import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from edgeformer.errors import TrainingError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    Table = TypeVar("Table", bound=DataclassInstance)


@dataclass(frozen=True)
class TextData:
    """Text to learn: `source` is "pydoc" (Python's language reference) or paths of UTF-8 files."""

    source: str | tuple[str, ...] = "pydoc"
    vocab_size: int = 2048
    sequence_length: int = 128
    validation_fraction: float = 0.1
    prompt: str = "The"
    sample_tokens: int = 160

    def __post_init__(self) -> None:
        require(self.vocab_size > 256, "data.vocab_size", self.vocab_size, "more than the 256 bytes and one marker")
        require(self.sequence_length >= 2, "data.sequence_length", self.sequence_length, "at least 2")
        require(
            0 < self.validation_fraction < 1, "data.validation_fraction", self.validation_fraction, "between 0 and 1"
        )


@dataclass(frozen=True)
class SeriesData:
    """A series to forecast: `source` is "seasonal" (synthetic, seeded) or the path of a CSV file with a header."""

    source: str = "seasonal"
    column: str = ""
    context_length: int = 96
    prediction_length: int = 24
    period: int = 24
    validation_fraction: float = 0.2
    hours: int = 24 * 150

    def __post_init__(self) -> None:
        for name in ("context_length", "prediction_length", "period", "hours"):
            require(getattr(self, name) >= 1, f"data.{name}", getattr(self, name), "at least 1")
        require(self.period <= self.context_length, "data.period", self.period, "at most data.context_length")
        require(
            0 < self.validation_fraction < 1, "data.validation_fraction", self.validation_fraction, "between 0 and 1"
        )


@dataclass(frozen=True)
class TrainOptions:
    """How to train. `batch_size` is the sequences of one step over all processes and accumulation steps."""

    steps: int = 1000
    batch_size: int = 16
    gradient_accumulation_steps: int = 1
    learning_rate: float = 2e-3
    final_learning_rate: float = 2e-4
    warmup_steps: int = 50
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    max_grad_norm: float = 1.0
    precision: str = "auto"
    seed: int = 0
    eval_every: int = 100
    eval_batches: int = 8
    save_every: int = 200

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "gradient_accumulation_steps", "eval_every", "eval_batches", "save_every"):
            require(getattr(self, name) >= 1, f"train.{name}", getattr(self, name), "at least 1")
        for name in ("warmup_steps", "seed"):
            require(getattr(self, name) >= 0, f"train.{name}", getattr(self, name), "at least 0")
        for name in ("learning_rate", "max_grad_norm"):
            require(getattr(self, name) > 0, f"train.{name}", getattr(self, name), "more than 0")
        require(self.precision in PRECISIONS, "train.precision", self.precision, f"one of {', '.join(PRECISIONS)}")


@dataclass(frozen=True)
class Recipe:
    """One training run. `model` is checked when the model is built: its sizes depend on the data."""

    task: str
    data: TextData | SeriesData
    model: Mapping[str, Any] = field(default_factory=dict)
    train: TrainOptions = field(default_factory=TrainOptions)

    def to_dict(self) -> dict[str, Any]:
        """The recipe as nested dicts, for JSON."""
        return {"task": self.task, "data": asdict(self.data), "model": dict(self.model), "train": asdict(self.train)}


PRECISIONS = ("auto", "float32", "bfloat16")
DATA = {"text": TextData, "forecast": SeriesData}
PRESETS = resources.files("edgeformer.train") / "recipes"


def require(holds: bool, name: str, found: object, expected: str) -> None:
    """Raises TrainingError unless `holds`."""
    if not holds:
        raise TrainingError(f"{name} is {found!r}, expected {expected}")


def preset_names() -> list[str]:
    """Names of the recipes in this package."""
    return sorted(entry.name.removesuffix(".toml") for entry in PRESETS.iterdir() if entry.name.endswith(".toml"))


def load_recipe(name: str | Path, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """The recipe of a TOML file, or of a preset by its name, with dotted `overrides` such as {"train.steps": 10}.

    Relative paths in a file's `data.source` are relative to that file; those in `overrides` to the current folder.

    Raises:
        TrainingError: no such file or preset, no TOML, or an unknown key or wrong value.
    """
    path = Path(name)
    if str(name) in preset_names():
        text = (PRESETS / f"{name}.toml").read_text(encoding="utf-8")
    elif path.is_file():
        text = path.read_text(encoding="utf-8")
    else:
        raise TrainingError(f"no recipe {name}: expected a TOML file, or a preset: {', '.join(preset_names())}")
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise TrainingError(f"{name} is not TOML: {error}") from error
    anchor_sources(table, path.parent)
    for key, value in (overrides or {}).items():
        section, _, entry = key.rpartition(".")
        part = table.setdefault(section, {}) if section else table
        if not isinstance(part, dict):
            raise TrainingError(f"{key} cannot be set: {section} is {part!r}, expected a table")
        part[entry] = value
    return make_recipe(table)


def anchor_sources(table: dict[str, Any], folder: Path) -> None:
    """Make relative paths of data.source relative to `folder`; names of built-in data are unchanged."""
    data = table.get("data")
    source = data.get("source") if isinstance(data, dict) else None
    if isinstance(source, str) and source not in ("pydoc", "seasonal"):
        table["data"]["source"] = str(folder / source)
    elif isinstance(source, list):
        table["data"]["source"] = [str(folder / str(one)) for one in source]


def make_recipe(table: Mapping[str, Any]) -> Recipe:
    """The recipe in nested dicts.

    Raises:
        TrainingError: a key is unknown, or a value is of the wrong type or out of range.
    """
    task = table.get("task")
    require(task in DATA, "task", task, f"one of {', '.join(DATA)}")
    check_keys(table, ["task", "data", "model", "train"], "the recipe")
    for section in ("data", "model", "train"):
        require(isinstance(table.get(section, {}), Mapping), section, table.get(section), "a table")
    return Recipe(
        task=str(task),
        data=read_table(DATA[str(task)], table.get("data", {}), "data"),
        model=dict(table.get("model", {})),
        train=read_table(TrainOptions, table.get("train", {}), "train"),
    )


def read_table(cls: type[Table], table: Mapping[str, Any], name: str) -> Table:
    """The dataclass `cls` with the values of a TOML table."""
    kinds = {one.name: type(one.default) for one in fields(cls) if one.default is not MISSING}
    check_keys(table, list(kinds), f"[{name}]")
    values: dict[str, Any] = {}
    for key, value in table.items():
        if kinds[key] is float and type(value) is int:
            value = float(value)  # TOML's 1 for 1.0
        if key == "source" and cls is TextData and isinstance(value, list | tuple):
            values[key] = tuple(str(one) for one in value)
            continue
        require(type(value) is kinds[key], f"{name}.{key}", value, f"a value of type {kinds[key].__name__}")
        values[key] = value
    return cls(**values)


def check_keys(table: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    """Raises TrainingError: `table` has a key that is not `known`."""
    for key in table:
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"it has {', '.join(known)}"
            raise TrainingError(f"{where} has no key {key!r}; {hint}")


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """The differences of two recipes' dicts, as "train.steps: 100, now 200"; `data.source` is not compared."""
    found = []
    for section in sorted({*old, *new}):
        a, b = old.get(section), new.get(section)
        if not (isinstance(a, Mapping) and isinstance(b, Mapping)):
            a, b = {"": a}, {"": b}
        for key in sorted({*a, *b}):
            same = json.dumps(a.get(key)) == json.dumps(b.get(key))
            if not same and (section, key) != ("data", "source"):
                found.append(f"{section}.{key}".rstrip(".") + f": {a.get(key)!r}, now {b.get(key)!r}")
    return found
