"""Recipes and data: errors name their place, and training never sees the validation part."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("accelerate")
import numpy as np
from support.training import FORECAST, TEXT, recipe_table, text_file

from edgeformer.errors import TrainingError
from edgeformer.train.forecast import ForecastTask, read_column
from edgeformer.train.loop import make_task
from edgeformer.train.recipe import SeriesData, TextData, load_recipe, make_recipe, preset_names
from edgeformer.train.task import Pick, spread
from edgeformer.train.text import TextTask, read_documents, split_documents, train_tokenizer


def text_task(folder: Path, **options: Any) -> TextTask:
    data = {"source": text_file(folder), "vocab_size": 320, "sequence_length": 32} | options
    return TextTask(TextData(**data), TEXT["model"], seed=0)


def test_every_preset_is_a_recipe() -> None:
    assert {"demo-text", "demo-forecast"} <= set(preset_names())
    for name in preset_names():
        recipe = load_recipe(name)
        assert make_recipe(recipe.to_dict()) == recipe


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('task = "speech"', "task is 'speech', expected one of text, forecast"),
        ("", "task is None"),
        ('task = "text"\n[train]\nstepz = 3', "has no key 'stepz'; did you mean 'steps'"),
        ('task = "text"\n[data]\ncolumn = "a"', "has no key 'column'; it has source, vocab_size"),
        ('task = "text"\n[trian]\nsteps = 3', "did you mean 'train'"),
        ('task = "text"\n[train]\nsteps = "3"', r"train\.steps is '3', expected a value of type int"),
        ('task = "text"\n[train]\nsteps = true', r"train\.steps is True"),
        ('task = "text"\n[train]\nsteps = 0', r"train\.steps is 0, expected at least 1"),
        ('task = "text"\n[train]\nprecision = "int8"', "one of auto, float32, bfloat16"),
        ('task = "text"\ntrain = 3', "train is 3, expected a table"),
        ('task = "text"\n[data]\nvocab_size = 256', "more than the 256 bytes"),
        ('task = "forecast"\n[data]\nvalidation_fraction = 1.0', "between 0 and 1"),
        ('task = "forecast"\n[data]\nperiod = 200', r"at most data\.context_length"),
        ("task = ", "is not TOML"),
    ],
)
def test_wrong_recipe_is_refused_with_its_place(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text(text)
    with pytest.raises(TrainingError, match=message):
        load_recipe(tmp_path / "r.toml")


def test_error_for_a_missing_recipe_names_the_presets() -> None:
    with pytest.raises(TrainingError, match="no recipe demo-tex: expected a TOML file, or a preset: demo-forecast"):
        load_recipe("demo-tex")


def test_sources_are_relative_to_the_recipes_folder_and_overrides_win(tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text('task = "text"\n[data]\nsource = ["a.txt", "b.txt"]\n[train]\nlearning_rate = 1')
    recipe = load_recipe(tmp_path / "r.toml", {"train.steps": 7, "model.hidden_size": 64})
    assert recipe.data == TextData(source=(str(tmp_path / "a.txt"), str(tmp_path / "b.txt")))
    assert (recipe.train.steps, recipe.train.learning_rate, recipe.model) == (7, 1.0, {"hidden_size": 64})
    assert load_recipe(tmp_path / "r.toml", {"data.source": "pydoc"}).data == TextData()


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"vocab_size": 9}, "has no key 'vocab_size'"),  # the tokenizer decides it
        ({"hidden_sise": 9}, "did you mean 'hidden_size'"),
        ({"hidden_size": 33}, "cannot be built: hidden_size 33"),
        ({"max_position_embeddings": 16}, "max_position_embeddings 16 is below data.sequence_length 32"),
    ],
)
def test_wrong_decoder_is_refused(model: dict[str, Any], message: str, tmp_path: Path) -> None:
    table = recipe_table(TEXT, data__source=text_file(tmp_path)) | {"model": model}
    with pytest.raises(TrainingError, match=message):
        make_task(make_recipe(table), None)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"output_dim": 9}, "has no key 'output_dim'"),
        ({"n_heads": 5}, "cannot be built: hidden_dim 64 is not a multiple of n_heads 5"),
        ({"max_length": 20}, "max_length 20 is below data.context_length 24"),
    ],
)
def test_wrong_encoder_is_refused(model: dict[str, Any], message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        make_task(make_recipe(FORECAST | {"model": model}), None)


def test_text_that_cannot_be_used_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"no\.txt cannot be read: No such file"):
        read_documents(str(tmp_path / "no.txt"))
    (tmp_path / "latin.txt").write_bytes(b"na\xefve")
    with pytest.raises(TrainingError, match="is not UTF-8 at byte 2"):
        read_documents(str(tmp_path / "latin.txt"))
    (tmp_path / "short.txt").write_text("too short")
    with pytest.raises(
        TrainingError, match=r"text too short: 9 characters leave \d+ tokens for training, a window needs 33"
    ):
        text_task(tmp_path, source=str(tmp_path / "short.txt"))


def test_reference_text_holds_no_paragraph_twice() -> None:
    paragraphs = [" ".join(p.split()) for document in read_documents("pydoc") for p in document.split("\n\n")]
    long = [p for p in paragraphs if len(p) > 200]
    assert len(long) > 300
    assert len(long) == len(set(long))


def test_split_keeps_every_character_once() -> None:
    documents = ["abcdefghij" * 3, "", "0123456789"]
    train, validation = split_documents(documents, 0.2)
    assert [a + b for a, b in zip(train, validation, strict=True)] == documents
    assert list(map(len, validation)) == [6, 0, 2]


def test_tokenizer_is_the_same_every_time() -> None:
    documents = read_documents("pydoc")[:20]
    assert train_tokenizer(documents, 600).to_str() == train_tokenizer(documents, 600).to_str()


def test_text_windows_cover_the_training_tokens_and_targets_are_the_next_token(tmp_path: Path) -> None:
    task = text_task(tmp_path)
    for epoch in range(4):
        inputs, targets = task.batch([Pick(epoch, window) for window in range(task.windows)])
        ids, positions = inputs["input_ids"], inputs["position_ids"]
        assert ids.shape == targets.shape == positions.shape == (task.windows, 32)
        assert torch.equal(ids[:, 1:], targets[:, :-1])
        flat = torch.cat([ids.flatten(), targets[-1, -1:]]).numpy()
        offset = task.offset(epoch)
        np.testing.assert_array_equal(flat, task.train_ids[offset : offset + len(flat)])
        assert len(task.train_ids) - len(flat) <= 64  # at most two windows are left out of a pass
    assert len({task.offset(epoch) for epoch in range(8)}) > 3


def test_unigram_baseline_is_the_cross_entropy_of_the_frequencies(tmp_path: Path) -> None:
    task = text_task(tmp_path)
    counts = [1 + task.train_ids.tolist().count(token) for token in range(320)]
    expected = sum(-math.log(counts[token] / sum(counts)) for token in task.validation_ids.tolist())
    assert task.baseline[1] == pytest.approx(expected / len(task.validation_ids), rel=1e-9)


def test_forecasts_are_validated_on_values_outside_all_training_windows() -> None:
    task = ForecastTask(SeriesData(context_length=48, prediction_length=12, hours=2400), {}, seed=0)
    training_end = task.windows - 1 + 48 + 12
    validation_start = int(task.validation_starts[0]) + 48
    assert training_end == validation_start == task.cut_at == 1920
    assert int(task.validation_starts[-1]) + 60 == 2400
    batch = task.batch([Pick(0, task.windows - 1)])
    np.testing.assert_array_equal(batch.targets[0].numpy(), task.values[1908:1920])
    np.testing.assert_array_equal(batch.inputs["input_values"][0, :, 0].numpy(), task.values[1860:1908])


def test_scaling_is_computed_from_the_training_part_alone() -> None:
    task = ForecastTask(SeriesData(context_length=48, prediction_length=12, hours=2400), {}, seed=0)
    assert task.mean == pytest.approx(task.series[:1920].mean())
    assert task.values[:1920].std() == pytest.approx(1, abs=1e-5)


def test_forecast_baseline_repeats_the_last_period() -> None:
    data = SeriesData(context_length=48, prediction_length=12, period=24, hours=400)
    task = ForecastTask(data, {}, seed=0)
    errors = [
        (task.values[t - 24 : t - 12] - task.values[t : t + 12]) ** 2
        for t in (int(s) + 48 for s in task.validation_starts)
    ]
    assert task.baseline[1] == pytest.approx(float(np.mean(errors)), rel=1e-5)


@pytest.mark.parametrize(
    ("text", "column", "message"),
    [
        ("time,kw\na,1\nb,2\n", "power", "has no column 'power'; its header is time, kw"),
        ("time,kw\na,1\nb,x\n", "kw", "line 3: column 'kw' holds 'x'"),
        ("time,kw\na,1\nb\n", "kw", "line 3: column 'kw' holds ''"),
        ("time,kw\na,nan\n", "kw", "holds 'nan'"),
        ("time,kw\na,x\n", "", "has no column of numbers"),
        ("time,kw\n", "kw", "has no column of numbers"),
        ("", "", "its header is empty"),
    ],
)
def test_wrong_csv_is_refused_with_its_line(text: str, column: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(TrainingError, match=message):
        read_column(str(tmp_path / "a.csv"), column)


def test_csv_column_is_read_by_name_or_as_the_first_of_numbers(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("time,a,b\nx,1,4\n\ny,2.5,-5e-1\n")
    assert read_column(str(tmp_path / "a.csv"), "b").tolist() == [4, -0.5]
    assert read_column(str(tmp_path / "a.csv"), "").tolist() == [1, 2.5]
    with pytest.raises(TrainingError, match=r"no\.csv cannot be read: No such file"):
        read_column(str(tmp_path / "no.csv"), "")


def test_series_that_cannot_be_learned_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("v\n" + "1\n" * 100)
    with pytest.raises(TrainingError, match="series too short: 100 values leave 80 for training and 20 for validation"):
        ForecastTask(SeriesData(source=str(tmp_path / "a.csv"), context_length=96), {}, 0)
    with pytest.raises(TrainingError, match=r"the series is constant \(1\.0\)"):
        ForecastTask(SeriesData(source=str(tmp_path / "a.csv"), context_length=24, prediction_length=4), {}, 0)


@pytest.mark.parametrize(("total", "count"), [(1, 1), (1, 5), (10, 3), (10, 10), (7, 100), (1000, 64)])
def test_spread_gives_distinct_numbers_that_include_both_ends(total: int, count: int) -> None:
    numbers = spread(total, count)
    assert len(numbers) == min(total, count)
    assert numbers[0] == 0
    assert count == 1 or numbers[-1] == total - 1
