"""Training: models learn, an interrupted run resumes with the same bits, and no file is a pickle."""

from __future__ import annotations

import csv
import itertools
import json
import math
import os
import pickle
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("accelerate")
import numpy as np
from safetensors.torch import load_file
from support.training import FORECAST, TEXT, recipe_table, text_file
from tokenizers import Tokenizer

import edgeformer.train.checkpoint as checkpoint_module
from edgeformer.errors import TrainingError
from edgeformer.models import load_checkpoint
from edgeformer.train.loop import TrainingReport, learning_rate, train
from edgeformer.train.options import RunOptions
from edgeformer.train.recipe import TrainOptions, make_recipe
from edgeformer.train.task import picks

BASES = {"text": TEXT, "forecast": FORECAST}


def run(table: dict[str, Any], folder: Path, **options: Any) -> TrainingReport:
    return train(make_recipe(table), folder, RunOptions(cpu=True, **options))


def short(base: dict[str, Any], tmp_path: Path, **changes: Any) -> dict[str, Any]:
    """Twenty steps with checkpoints and validations in between."""
    small = {"train__steps": 20, "train__save_every": 7, "train__eval_every": 6} | changes
    if base is TEXT:
        small |= {"data__source": text_file(tmp_path)}
    return recipe_table(base, **small)


@pytest.fixture(scope="module")
def text_run(tmp_path_factory: pytest.TempPathFactory) -> TrainingReport:
    folder = tmp_path_factory.mktemp("text")
    return run(recipe_table(TEXT, data__source=text_file(folder)), folder / "run")


@pytest.fixture(scope="module")
def forecast_run(tmp_path_factory: pytest.TempPathFactory) -> TrainingReport:
    return run(FORECAST, tmp_path_factory.mktemp("forecast") / "run")


def test_text_model_beats_the_unigram_loss(text_run: TrainingReport) -> None:
    name, unigram = text_run.baseline
    assert name == "unigram guess"
    assert 3.5 < unigram < math.log(320)
    assert text_run.validation_loss < unigram - 0.4
    assert text_run.step == text_run.steps == 300


def test_forecast_beats_repeating_the_last_day(forecast_run: TrainingReport) -> None:
    _, naive = forecast_run.baseline
    assert forecast_run.validation_loss < 0.75 * naive
    assert forecast_run.shown["mean absolute error"] < forecast_run.shown["error of repeating the last 24 values"]


def test_transformers_opens_a_text_checkpoint(text_run: TrainingReport) -> None:
    transformers = pytest.importorskip("transformers")
    folder = text_run.folder
    module, config = load_checkpoint(folder)
    assert config["task"] == "text-generation"
    assert sum(p.numel() for p in module.parameters()) == text_run.parameters
    text = "The “with” statement — naïve\n\n   >>> x = 1\n"
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    opened = transformers.AutoTokenizer.from_pretrained(folder)
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert opened(text)["input_ids"] == tokenizer.encode(text).ids
    assert opened.eos_token_id == tokenizer.token_to_id("<|endoftext|>") == config["eos_token_id"]
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == config["eos_token_id"]
    ids = torch.tensor([tokenizer.encode(text).ids])
    logits = module(ids, torch.arange(ids.shape[1])[None])
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    torch.testing.assert_close(logits, model(ids).logits, rtol=0, atol=1e-4)


def test_forecast_checkpoint_records_the_scaling_of_values(forecast_run: TrainingReport) -> None:
    module, config = load_checkpoint(forecast_run.folder)
    assert config["task"] == "forecasting"
    assert (config["context_length"], config["prediction_length"]) == (24, 12)
    assert 40 < config["mean"] < 60
    assert 2 < config["std"] < 20
    assert module(input_values=torch.zeros(1, 24, 1)).shape == (1, 24, 12)


def test_run_writes_its_losses_and_pictures(text_run: TrainingReport, forecast_run: TrainingReport) -> None:
    for report, extra in ((text_run, "sample.txt"), (forecast_run, "forecast.png")):
        rows = list(csv.DictReader((report.folder / "loss.csv").open()))
        assert [int(row["step"]) for row in rows] == list(range(report.steps + 1))
        assert float(rows[-1]["validation_loss"]) == pytest.approx(report.validation_loss, rel=1e-5)
        for picture in report.folder.glob("*.png"):
            assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
            assert picture.stat().st_size > 20_000
        assert (report.folder / "loss.png").exists()
        assert (report.folder / extra).stat().st_size > 10


@pytest.mark.parametrize("task", BASES)
def test_ten_steps_and_ten_resumed_have_the_bits_of_twenty(task: str, tmp_path: Path) -> None:
    table = short(BASES[task], tmp_path, train__gradient_accumulation_steps=2)
    if task == "forecast":
        table["model"]["dropout"] = 0.1  # so that steps draw random numbers
    whole = run(table, tmp_path / "whole")
    first = run(table, tmp_path / "halves", stop_at=10)
    assert (first.step, first.steps) == (10, 20)
    second = run(table, tmp_path / "halves", resume=True)
    assert (second.step, second.validation_loss) == (20, whole.validation_loss)
    for name in ("training.safetensors", "model.safetensors"):
        a, b = load_file(tmp_path / "whole" / name), load_file(tmp_path / "halves" / name)
        assert a.keys() == b.keys()
        for key in a:
            np.testing.assert_array_equal(a[key].numpy(), b[key].numpy(), err_msg=key)
    assert (tmp_path / "whole" / "loss.csv").read_bytes() == (tmp_path / "halves" / "loss.csv").read_bytes()
    # The comparison can fail: another seed changes the dropout and the order of the data.
    other = run(recipe_table(table, train__seed=1), tmp_path / "other")
    assert other.validation_loss != whole.validation_loss


def test_resuming_a_finished_run_changes_nothing(tmp_path: Path) -> None:
    table = short(FORECAST, tmp_path)
    run(table, tmp_path / "run")
    before = (tmp_path / "run" / "training.safetensors").read_bytes()
    again = run(table, tmp_path / "run", resume=True)
    assert again.step == 20
    assert math.isfinite(again.validation_loss)
    assert (tmp_path / "run" / "training.safetensors").read_bytes() == before


def test_stop_request_ends_after_the_step_with_a_checkpoint(tmp_path: Path) -> None:
    table = short(FORECAST, tmp_path)
    calls: list[int] = []

    def stop_at_fifth() -> bool:
        calls.append(1)
        return len(calls) == 5

    assert run(table, tmp_path / "run", should_stop=stop_at_fifth).step == 5
    run(table, tmp_path / "run", resume=True)
    run(table, tmp_path / "whole")
    a, b = load_file(tmp_path / "run" / "model.safetensors"), load_file(tmp_path / "whole" / "model.safetensors")
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_write_that_fails_leaves_a_run_that_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = short(FORECAST, tmp_path)
    run(table, tmp_path / "whole")
    count = Counter[str]()
    replace = os.replace

    def full_disk(source: Path, target: Path) -> None:
        count[target.name] += 1
        if target.name == "model.safetensors" and count[target.name] == 2:  # between the two files of step 14
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(checkpoint_module.os, "replace", full_disk)
    with pytest.raises(TrainingError, match=r"model\.safetensors cannot be written: No space left on device"):
        run(table, tmp_path / "run")
    assert not list((tmp_path / "run").glob(".*partial*"))
    load_checkpoint(tmp_path / "run")  # still the model of step 7
    monkeypatch.undo()
    run(table, tmp_path / "run", resume=True)
    a, b = load_file(tmp_path / "run" / "training.safetensors"), load_file(tmp_path / "whole" / "training.safetensors")
    assert all(np.array_equal(a[name].numpy(), b[name].numpy(), equal_nan=True) for name in b)


def test_nothing_is_pickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("pickled")

    for module, name in ((torch, "save"), (torch, "load"), (pickle, "dump"), (pickle, "dumps"), (pickle, "load")):
        monkeypatch.setattr(module, name, refuse)
    table = short(TEXT, tmp_path)
    run(table, tmp_path / "run", stop_at=10)
    run(table, tmp_path / "run", resume=True)
    endings = {path.suffix for path in (tmp_path / "run").iterdir()}
    assert endings == {".safetensors", ".json", ".csv", ".png", ".txt"}


def test_accumulated_gradients_are_those_of_the_whole_batch(tmp_path: Path) -> None:
    table = short(TEXT, tmp_path)
    run(table, tmp_path / "whole")
    run(recipe_table(table, train__gradient_accumulation_steps=4), tmp_path / "parts")
    losses = [
        np.genfromtxt(tmp_path / name / "loss.csv", delimiter=",", skip_header=2)[:, 1] for name in ("whole", "parts")
    ]
    np.testing.assert_allclose(losses[1], losses[0], rtol=2e-4)  # float32 sums in another order, over 20 steps


@pytest.mark.parametrize("task", BASES)
def test_bfloat16_trains_nearly_the_same_and_keeps_float32_weights(task: str, tmp_path: Path) -> None:
    table = short(BASES[task], tmp_path)
    full = run(table, tmp_path / "full")
    half = run(recipe_table(table, train__precision="bfloat16"), tmp_path / "half")
    assert half.validation_loss != full.validation_loss
    assert half.validation_loss == pytest.approx(full.validation_loss, rel=0.03)
    assert {tensor.dtype for tensor in load_file(tmp_path / "half" / "model.safetensors").values()} == {torch.float32}


def test_two_processes_train_as_one_does(tmp_path: Path) -> None:
    table = short(TEXT, tmp_path, train__steps=10)
    (tmp_path / "r.toml").write_text(
        'task = "text"\n'
        + "".join(
            f"[{section}]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in table[section].items())
            for section in ("data", "model", "train")
        )
    )
    run(table, tmp_path / "one")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    arguments = ["-m", "edgeformer.train", str(tmp_path / "r.toml"), "-o", str(tmp_path / "two"), "--cpu"]
    done = subprocess.run([*launch, *arguments], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("validation loss") == 1  # only the first process prints
    losses = [
        np.genfromtxt(tmp_path / name / "loss.csv", delimiter=",", skip_header=2)[:, 1] for name in ("one", "two")
    ]
    np.testing.assert_allclose(losses[1], losses[0], rtol=2e-4)


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({"train__learning_rate": 1e-3}, {"resume": True}, r"train\.learning_rate: 0\.007, now 0\.001"),
        ({"model__hidden_dim": 64}, {"resume": True}, r"model\.hidden_dim: 32, now 64"),
        ({}, {}, "already holds a model; continue it with --resume"),
        ({}, {"resume": True, "stop_at": 0}, "stop_at is 0"),
    ],
)
def test_run_that_does_not_fit_its_folder_is_refused(
    change: dict[str, Any], options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    table = short(FORECAST, tmp_path)
    run(table, tmp_path / "run", stop_at=7)
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    with pytest.raises(TrainingError, match=message):
        run(recipe_table(table, **change), tmp_path / "run", **options)
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before


def test_resuming_on_other_data_is_refused(tmp_path: Path) -> None:
    table = short(TEXT, tmp_path)
    run(table, tmp_path / "run", stop_at=7)
    text_file(tmp_path, 20_000)
    with pytest.raises(TrainingError, match="the data is not what it was"):
        run(table, tmp_path / "run", resume=True)


def test_damaged_or_absent_training_state_is_refused(tmp_path: Path) -> None:
    table = short(FORECAST, tmp_path)
    with pytest.raises(TrainingError, match="nothing to resume"):
        run(table, tmp_path / "run", resume=True)
    run(table, tmp_path / "run", stop_at=7)
    path = tmp_path / "run" / "training.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(TrainingError, match="is damaged"):
        run(table, tmp_path / "run", resume=True)
    path.write_bytes((tmp_path / "run" / "model.safetensors").read_bytes())
    with pytest.raises(TrainingError, match="has format 'pt', expected 'edgeformer-training-1'"):
        run(table, tmp_path / "run", resume=True)
    assert run(table, tmp_path / "run", overwrite=True).step == 20


def test_loss_that_is_no_number_ends_the_run_and_keeps_the_checkpoint(tmp_path: Path) -> None:
    table = short(FORECAST, tmp_path, train__learning_rate=1e30, train__max_grad_norm=1e30, train__save_every=1)
    with pytest.raises(TrainingError, match=r"the loss is (nan|inf) at step \d+: try a lower train\.learning_rate"):
        run(table, tmp_path / "run")


def test_batch_that_does_not_divide_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="batch_size 16 is not a multiple of 1 processes times 3"):
        run(recipe_table(FORECAST, train__gradient_accumulation_steps=3), tmp_path / "run")


def test_every_pass_sees_every_window_once_in_a_new_order() -> None:
    seen = picks(seed=3, first=0, count=30, windows=10)
    for epoch in range(3):
        assert sorted(pick.window for pick in seen if pick.epoch == epoch) == list(range(10))
    assert [p.window for p in seen[:10]] != [p.window for p in seen[10:20]]
    assert picks(3, 13, 4, 10) == seen[13:17]  # a pick depends on its position alone, no state
    assert picks(4, 0, 30, 10) != seen


def test_learning_rate_warms_up_and_falls_to_its_end() -> None:
    options = TrainOptions(steps=100, warmup_steps=10, learning_rate=1.0, final_learning_rate=0.1)
    rates = [learning_rate(step, options) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * n for n in range(1, 11)])
    assert max(rates) == rates[10] == 1.0
    assert all(a > b for a, b in itertools.pairwise(rates[10:]))
    assert rates[-1] == pytest.approx(0.1)
    assert rates[54] == pytest.approx(0.55, abs=0.02)
