"""The command `python -m edgeformer.train`: help, errors, interruption."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("accelerate")
from support.training import text_file

TINY = """
task = "text"
[data]
source = "text.txt"
vocab_size = 320
sequence_length = 32
sample_tokens = 5
[model]
hidden_size = 32
num_hidden_layers = 1
[train]
steps = 100000
batch_size = 4
save_every = 5
"""


def cli(*arguments: str | Path, code: int = 0) -> str:
    command = [sys.executable, "-m", "edgeformer.train", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == code, done.stderr[-3000:]
    assert "Traceback" not in done.stderr
    return done.stdout + done.stderr


def test_help_has_examples_and_does_not_import_torch() -> None:
    code = "import sys, typer.testing as t; from edgeformer.train.__main__ import app; "
    code += "r = t.CliRunner().invoke(app, ['--help']); print(r.output); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "python -m edgeformer.train demo-text" in done.stdout
    assert "--resume" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["nothing.toml"], 2, "error: no recipe nothing.toml"),
        (["demo-text", "--data", "nothing.txt"], 5, "error: text nothing.txt cannot be read"),
        (["demo-text", "--set", "steps"], 2, "expected SECTION.KEY=VALUE"),
        (["demo-text", "--set", "train.stepz=4"], 2, "did you mean 'steps'"),
    ],
)
def test_mistake_is_one_message_and_no_traceback(arguments: list[str], code: int, message: str, tmp_path: Path) -> None:
    assert message in cli(*arguments, "-o", tmp_path / "run", code=code)


def test_interrupted_run_keeps_its_step_and_resumes(tmp_path: Path) -> None:
    text_file(tmp_path)
    (tmp_path / "tiny.toml").write_text(TINY)
    command = [sys.executable, "-m", "edgeformer.train", str(tmp_path / "tiny.toml"), "-o", str(tmp_path / "run")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 120
        while not (tmp_path / "run" / "loss.csv").exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, err[-3000:]
    assert "of 100000; --resume goes on from there" in out
    assert "loss=" in err  # the progress bar
    steps_done = int((tmp_path / "run" / "loss.csv").read_text().splitlines()[-1].split(",")[0])
    assert steps_done >= 5
    out = cli(tmp_path / "tiny.toml", "-o", tmp_path / "run", "--resume", "--stop-at", str(steps_done + 3))
    assert f"stopped at step {steps_done + 3} of 100000" in out
