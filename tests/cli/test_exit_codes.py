"""Every command ends with the documented exit codes; see edgeformer/cli/exit_codes.py."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
from typer.testing import CliRunner

import edgeformer as package
from edgeformer.cli import exit_codes
from edgeformer.cli.app import app
from edgeformer.errors import BundleError, EngineUnavailable, ExportError, InputError, ParityError, TrainingError

COMMANDS = (
    "export", "train", "run", "chat", "embed", "classify", "transcribe", "serve", "inspect", "verify", "bench",
    "doctor",
)  # fmt: skip
# What each command calls for its work, and arguments with which it gets there. BUNDLE is a folder that is none.
WORK = {
    "export": ("edgeformer.export.pipeline.export", ["model", "-o", "BUNDLE"]),
    "train": ("edgeformer.train.__main__.run", ["demo-text", "-o", "BUNDLE"]),
    "run": ("edgeformer.cli.run.run_prompt", ["BUNDLE", "text"]),
    "chat": ("edgeformer.cli.chat.talk", ["BUNDLE"]),
    "embed": ("edgeformer.cli.embed.print_vectors", ["BUNDLE", "text"]),
    "classify": ("edgeformer.cli.classify.print_labels", ["BUNDLE", "text"]),
    "transcribe": ("edgeformer.cli.transcribe.print_transcripts", ["BUNDLE", "speech.wav"]),
    "serve": ("edgeformer.cli.serve.serve", ["BUNDLE"]),
    "inspect": ("edgeformer.cli.inspect.print_bundle", ["BUNDLE"]),
    "verify": ("edgeformer.cli.verify.check", ["BUNDLE"]),
    "bench": ("edgeformer.cli.bench.print_rates", ["BUNDLE"]),
    "doctor": ("edgeformer.cli.doctor.report", []),
}
ERRORS = [
    (None, 0),
    (ParityError("the numbers differ"), 1),
    (InputError("an argument is out of its range"), 2),
    (BundleError("the bundle is damaged"), 3),
    (EngineUnavailable("the engine cannot run here"), 4),
    (ExportError("no such operator"), 5),
    (TrainingError("the loss is nan"), 5),
    (OSError(28, "No space left on device"), 5),
    (KeyboardInterrupt(), 130),
]
TOOLCHAIN = {"export": "edgeformer.export.__main__", "train": "edgeformer.train.__main__"}


def _call(edgeformer, command, arguments):
    """(exit code, stdout + stderr). export and train are run as their own programs, which `edgeformer` starts."""
    if command not in TOOLCHAIN:
        code, out, err = edgeformer(command, *arguments)
        return code, out + err
    pytest.importorskip("torch")
    module = pytest.importorskip(TOOLCHAIN[command])
    result = CliRunner().invoke(module.app, arguments)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


def test_the_table_has_every_command():
    assert {info.name or info.callback.__name__ for info in app.registered_commands} == set(COMMANDS) == set(WORK)


@pytest.mark.parametrize(("error", "code"), ERRORS, ids=[type(error).__name__ for error, _ in ERRORS])
@pytest.mark.parametrize("command", COMMANDS)
def test_an_error_ends_with_its_code(edgeformer, monkeypatch, tmp_path, command, error, code):
    if command == "export" and error is None:
        pytest.skip("its result is a manifest: tests/export")

    def work(*_, **__):
        if error is not None:
            raise error
        return 0

    target, arguments = WORK[command]
    if command in TOOLCHAIN:
        pytest.importorskip("torch")
    monkeypatch.setattr(target, work)
    arguments = [str(tmp_path / "bundle") if argument == "BUNDLE" else argument for argument in arguments]
    found, text = _call(edgeformer, command, arguments)
    assert found == code, text
    assert "Traceback" not in text
    if error is not None:
        assert (getattr(error, "strerror", None) or str(error) or "interrupted") in text


@pytest.mark.parametrize("command", COMMANDS)
def test_an_unknown_option_ends_with_2(edgeformer, command):
    code, text = _call(edgeformer, command, ["--frobnicate"])
    assert code == 2
    assert "frobnicate" in text


@pytest.mark.parametrize("command", COMMANDS)
def test_help_ends_with_0(edgeformer, command):
    assert _call(edgeformer, command, ["--help"])[0] == 0


@pytest.mark.parametrize("command", [command for command in COMMANDS if command not in TOOLCHAIN])
def test_a_missing_bundle_ends_with_3(edgeformer, stdin, tmp_path, command):
    stdin("text\n")
    arguments = {"run": ["text"], "embed": ["text"], "classify": ["text"], "transcribe": ["speech.wav"]}
    code, _, err = edgeformer(command, tmp_path / "nowhere", *arguments.get(command, []))
    assert code == 3
    assert "nowhere" in err


@pytest.mark.parametrize("command", [("run", "text"), ("chat",), ("verify",), ("bench", "-p", 4)], ids=lambda c: c[0])
def test_an_engine_that_cannot_run_ends_with_4(edgeformer, lm, stdin, monkeypatch, command):
    monkeypatch.setattr("edgeformer.engines.ort_install.cuda_driver_problem", lambda: "there is no NVIDIA driver")
    stdin("text\n")
    code, _, err = edgeformer(command[0], lm, *command[1:], "-e", "cuda")
    assert code == 4
    assert "CUDA" in err


def test_failed_checks_end_with_1(edgeformer, lm, copy_of, reseal, monkeypatch):
    damaged = copy_of(lm)
    with np.load(damaged / "reference.npz") as file:
        arrays = {name: file[name] for name in file.files}
    arrays["bundle.logits"][0, 0, 0] += 50
    np.savez(damaged / "reference.npz", **arrays)
    reseal(damaged)
    assert edgeformer("verify", damaged, "-e", "cpu")[0] == 1
    monkeypatch.setattr("edgeformer.cli.doctor.examine", lambda: iter(()))
    assert edgeformer("doctor")[0] == 1


def test_what_is_wrong_for_the_toolchain_ends_with_2(edgeformer, tmp_path):
    assert _call(edgeformer, "train", ["nothing.toml"])[0] == 2
    assert _call(edgeformer, "train", ["demo-text", "--set", "train.stepz=4"])[0] == 2
    assert _call(edgeformer, "export", ["nothing.toml"])[0] == 2
    assert _call(edgeformer, "export", ["model", "-o", str(tmp_path / "b"), "--quantize", "q2"])[0] == 2


def test_edgeformer_ends_with_the_code_of_the_program_it_starts(tmp_path):
    pytest.importorskip("torch")
    command = [sys.executable, "-m", "edgeformer", "train", "nothing.toml", "-o", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": os.path.dirname(os.path.dirname(package.__file__))}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert (done.returncode, "no recipe nothing.toml" in done.stderr) == (2, True)


def test_the_help_lists_the_codes(edgeformer):
    out = " ".join(edgeformer("--help")[1].split())
    codes = {
        exit_codes.DONE: "done",
        exit_codes.CHECK_FAILED: "a check failed",
        exit_codes.USAGE: "wrong arguments",
        exit_codes.BAD_BUNDLE: "bad bundle",
        exit_codes.NO_ENGINE: "engine cannot run",
        exit_codes.REFUSED: "refused",
    }
    assert "Exit codes: " + ", ".join(f"{code} {words}" for code, words in codes.items()) in out
