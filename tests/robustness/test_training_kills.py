"""Training that is killed, or refused by its disk, at each write, fsync and rename of its checkpoints goes on with the
bits of a whole run."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("accelerate")
from safetensors import safe_open
from support import damage_study, faults
from support.training import FORECAST, recipe_table

from edgeformer.errors import TrainingError

# One process imports torch; each run is a child of fork(), so that it can be killed. The parent itself never trains:
# torch's threads would not be in the children.
SCRIPT = """
import json, os, sys, traceback
from pathlib import Path
root, out, table = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
numbers = json.loads(sys.argv[4])  # of the errors, step by step; 0 is a kill
sys.path[:0] = [root, root + "/tests"]
from safetensors import safe_open
import matplotlib.pyplot, torch, torch._dynamo
torch.set_num_threads(1)
from support import faults
from edgeformer.errors import TrainingError
import edgeformer.train.forecast as forecast
import edgeformer.train.loop as loop
from edgeformer.train.loop import train
from edgeformer.train.options import RunOptions
from edgeformer.train.recipe import make_recipe

loop.loss_picture = forecast.forecast_picture = lambda *args: None  # they take longer than the rest

def child(folder, at=0, number=0, **options):
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    fault = (lambda: os._exit(9)) if number == 0 else faults.refusing(number)
    code = 1
    try:
        with faults.Steps(at, fault, ("fsync", "replace", "mkdir")):
            train(make_recipe(table), folder, RunOptions(cpu=True, **options))
        code = 0
    except TrainingError as error:
        code = 3
        if os.strerror(number) not in str(error) or str(folder) not in str(error):
            code = 4
        print(error, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)

def bits(folder):
    # Not the file: the order of its header's texts is any.
    found = [(folder / "loss.csv").read_bytes()]
    for name in ("training.safetensors", "model.safetensors"):
        with safe_open(folder / name, framework="np") as file:
            found.append(sorted(file.metadata().items()))
            found += [(key, file.get_tensor(key).tobytes()) for key in sorted(file.keys())]
    return found

assert child(out / "whole") == 0
whole, report = bits(out / "whole"), []
for step in range(1, 200):
    folder, number = out / str(step), numbers[step % len(numbers)]
    code = child(folder, step, number)
    assert code in (0, 9 if number == 0 else 3), (code, step)
    if code == 0:
        break
    left = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
    began = "training.safetensors" in left
    resumed = child(folder, resume=True) if began else child(folder, overwrite=True)
    assert resumed == 0, (step, left)
    assert bits(folder) == whole, (step, left)
    after = sorted(path.name for path in folder.iterdir())
    report.append([began, [name for name in left if "partial" in name], [name for name in after if "partial" in name]])
(out / "report.json").write_text(json.dumps(report))
"""


def draw_loss(folder: Path) -> None:
    from edgeformer.train.picture import loss_picture

    loss_picture(folder / "loss.png", np.array([[1, 3.0, 3.0, 0.1], [2, 2.0, 2.5, 0.1]]), "nats", ("unigrams", 4.0))


def draw_forecast(folder: Path) -> None:
    from edgeformer.train.picture import Forecast, forecast_picture

    forecast_picture(folder / "forecast.png", Forecast(np.zeros(24), np.zeros(24), np.ones(24), 12, "kW", 0.5))


def write_sample(folder: Path) -> None:
    from edgeformer.train.text import TextTask

    TextTask.finish(cast("Any", SimpleNamespace(sample=lambda _: "a text \u20ac")), cast("Any", None), folder)


def refused(write: Callable[[Path], None], folder: Path) -> str | None:
    """The message of a TrainingError; None where everything was written."""
    try:
        write(folder)
    except TrainingError as error:
        return str(error)
    return None


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EIO, errno.EDQUOT], ids=os.strerror)
@pytest.mark.parametrize(
    ("write", "name"), [(draw_loss, "loss.png"), (draw_forecast, "forecast.png"), (write_sample, "sample.txt")]
)
def test_pictures_and_samples_that_the_disk_refuses_are_typed_errors_and_leave_the_old_ones(
    write: Callable[[Path], None], name: str, number: int, tmp_path: Path
) -> None:
    write(tmp_path)
    whole = (tmp_path / name).read_bytes()
    for step in range(1, 20):
        (tmp_path / name).write_bytes(b"old")
        with faults.Steps(step, faults.refusing(number), ("fsync", "replace")) as steps:
            message = refused(write, tmp_path)
        assert steps.count < step if message is None else name in message and os.strerror(number) in message
        found = (tmp_path / name).read_bytes()
        assert os.listdir(tmp_path) == [name]
        if steps.count < step:
            break
        assert found in (b"old", whole)
    assert step > 4, "the writer's steps were not seen"
    assert found == whole


@pytest.fixture(scope="module")
def table() -> dict[str, Any]:
    changes = {"train__steps": 2, "train__save_every": 1, "train__eval_every": 2, "train__eval_batches": 1}
    table = recipe_table(FORECAST, data__hours=600, **changes)
    table["model"]["dropout"] = 0.1  # so that steps draw random numbers
    return table


def run(table: dict[str, Any], out: Path, numbers: list[int]) -> list[Any]:
    """For each step: whether there was a checkpoint, and the partial files after the fault and after the next run."""
    command = [sys.executable, "-c", SCRIPT, str(damage_study.ROOT), str(out), json.dumps(table), json.dumps(numbers)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads((out / "report.json").read_text())
    assert len(report) > 20, len(report)
    assert {began for began, _, _ in report} == {False, True}  # faults before and after the first checkpoint
    assert not any(after for _, _, after in report)
    with safe_open(out / "1" / "training.safetensors", framework="pt") as file:
        assert file.metadata()["step"] == "2"
    return report


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_run_killed_at_any_write_goes_on_with_the_same_bits(table: dict[str, Any], tmp_path: Path) -> None:
    report = run(table, tmp_path, [0])
    assert any(left for _, left, _ in report)  # some kills leave half a file, which the next run removes


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_run_refused_by_its_disk_ends_with_a_typed_error_and_goes_on_with_the_same_bits(
    table: dict[str, Any], tmp_path: Path
) -> None:
    report = run(table, tmp_path, [errno.ENOSPC, errno.EROFS, errno.EIO, errno.EDQUOT])
    assert not any(left for _, left, _ in report)  # an error leaves no half file
