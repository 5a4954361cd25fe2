"""The command `edgeformer export`: its flags are the options, its exit codes those of all commands."""

from __future__ import annotations

import dataclasses

import pytest

pytest.importorskip("torch", reason="the toolchain needs torch")
pytest.importorskip("transformers", reason="the toolchain needs transformers")
pytest.importorskip("onnxruntime", reason="the exporter's checks need onnxruntime")

from typer.testing import CliRunner

import edgeformer.export.pipeline
from edgeformer.errors import BundleError, ExportError, ParityError
from edgeformer.export.__main__ import app
from edgeformer.export.options import ExportOptions

PARSED = {
    "output": ("b", "b"),
    "quantize": ("q8", "q8"),
    "block": ("64", "64"),
    "head": ("q4", "q4"),
    "calibration": ("mine.txt", "mine.txt"),
    "calibration_tokens": ("256", "256"),
    "dtype": ("float16", "float16"),
    "adapter": ("a", "a"),
    "weights": ("w.pt", "w.pt"),
    "tokenizer": ("t", "t"),
    "input": ("x=float32[batch,3]", "('x=float32[batch,3]',)"),
    "output_names": ("y", "('y',)"),
    "architecture": ("BertModel", "BertModel"),
    "task": ("forecasting", "forecasting"),
    "text": ("t.txt", "t.txt"),
    "tokens": ("0", "0"),
    "overwrite": (None, "True"),
    "allow_missing": ("pooler.*", "('pooler.*',)"),
    "memory_limit": ("6G", "6G"),
}


@pytest.fixture
def command(monkeypatch):
    """`command(*arguments, error=None)` -> (exit code, output, the options that `export` was called with)."""

    def call(*arguments, error=None):
        seen = []

        def export(options, _):
            seen.append(options)
            raise error or ExportError("stop here")

        monkeypatch.setattr(edgeformer.export.pipeline, "export", export)
        result = CliRunner().invoke(app, arguments)
        return result.exit_code, result.output + result.stderr, seen

    return call


def test_every_option_is_a_flag(command):
    assert PARSED.keys() | {"source"} == {field.name for field in dataclasses.fields(ExportOptions)}
    arguments = ["model"]
    for name, (text, _) in PARSED.items():
        flag = {"output_names": "--output-name"}.get(name, f"--{name.replace('_', '-')}")
        arguments += [flag] if text is None else [flag, text]
    (options,) = command(*arguments)[2]
    assert {name: str(getattr(options, name)) for name in PARSED} == {name: text for name, (_, text) in PARSED.items()}


def test_what_is_not_given_has_the_default(command):
    (options,) = command("model", "-o", "b")[2]
    assert options == ExportOptions("model", options.output)


def test_a_flag_wins_over_the_recipe(command, tmp_path):
    (tmp_path / "r.toml").write_text('source = "x"\ntokens = 512\nquantize = "q8"\n')
    (options,) = command(str(tmp_path / "r.toml"), "--tokens", "0")[2]
    assert (options.tokens, options.quantize, str(options.output)) == (0, "q8", "r")


def test_the_help_shows_every_flag_with_its_default(command):
    code, text, _ = command("--help")
    assert code == 0
    assert all(f"--{name.replace('_', '-')}" in text for name in PARSED if name != "output_names")
    assert "1024]" in text


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ParityError("logits are off"), 1),
        (BundleError("the folder exists"), 3),
        (ExportError("cannot be traced"), 5),
        (OSError(28, "No space left on device"), 5),
        (KeyboardInterrupt(), 130),
    ],
)
def test_an_error_has_its_exit_code_and_no_traceback(command, error, code):
    found, text, seen = command("model", "-o", "b", error=error)
    assert seen
    assert found == code
    assert "Traceback" not in text
    assert (str(error) or "interrupted") in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["model"], "-o FOLDER"),
        (["model", "-o", "b", "--quantize", "q2"], "quantize is 'q2'"),
        (["model", "-o", "b", "--block", "many"], "--block"),
        (["model", "-o", "b", "--frobnicate"], "frobnicate"),
        (["no-such-recipe.toml"], "cannot be read"),
    ],
)
def test_wrong_arguments_end_with_2(command, arguments, words):
    code, text, seen = command(*arguments)
    assert code == 2
    assert words in text
    assert not seen
