"""Arguments of an export, its recipes and its command that have a wrong type or are out of range: refused by name."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from edgeformer.errors import BundleError, ExportError
from edgeformer.export import ExportOptions, read_recipe
from edgeformer.export.__main__ import app

NAN, INF = float("nan"), float("inf")
TEXTS = (5, True, 1.5, b"x", ["x"], "a\0b", "\ud800")  # where a text is expected
PATHS = (5, True, 1.5, b"x", ["x"], "", "a\0b", "\ud800")
COUNTS = (-1, 2**31, 2**63, 10**400, 1.5, 5.0, NAN, INF, "5", True, [5], np.int64(5))
LISTS = ("x", b"x", 5, True, [5], [None], {"x": 1}, None)

OPTIONS = {
    "source": (*TEXTS, "", None),
    "output": (*PATHS, None),
    "quantize": (*TEXTS, "", "q2", "Q8", NAN),
    "block": (*COUNTS, 0, 24, 256, None),
    "head": (*TEXTS, "", "q2"),
    "calibration": TEXTS,
    "calibration_tokens": (*COUNTS, 0),
    "dtype": (*TEXTS, "", "float64", None),
    "adapter": PATHS,
    "weights": PATHS,
    "tokenizer": PATHS,
    "input": LISTS,
    "output_names": LISTS,
    "architecture": TEXTS,
    "task": TEXTS,
    "text": PATHS,
    "tokens": (*COUNTS, None),
    "overwrite": (0, 1, "yes", "", None, [True], np.bool_(True)),
    "allow_missing": LISTS,
    "memory_limit": (0, -5, -1.5, NAN, INF, "", "x", "6X", "-1G", "9" * 400, 10**400, 2**63, True, b"6G", ["6G"]),
}
CASES = [(name, value) for name, values in OPTIONS.items() for value in values]


def test_every_option_is_tried():
    assert OPTIONS.keys() == {field.name for field in dataclasses.fields(ExportOptions)}


@pytest.mark.parametrize(("name", "value"), CASES, ids=[f"{name}={value!r:.20}" for name, value in CASES])
def test_an_option_out_of_its_range_is_refused_by_name(name, value):
    with pytest.raises(ExportError, match=rf"{name} is .*(expected|choose|write|give)"):
        ExportOptions(**{"source": "model", "output": Path("b"), name: value})


def test_texts_are_paths_and_lists_are_tuples():
    made = ExportOptions("model", "b", weights="w", input=["x=float32[2]"], memory_limit="6G")
    assert made == ExportOptions("model", Path("b"), weights=Path("w"), input=("x=float32[2]",), memory_limit="6G")


RECIPES = {
    "source = 5": "source is 5",
    'output = ""': "output is ''",
    "output = 5": "output is 5",
    "weights = [1]": r"weights is \[1\]",
    'tokens = "5"': "tokens is '5'",
    "tokens = 1.5": "tokens is 1.5",
    "tokens = nan": "tokens is nan",
    "tokens = 99999999999": "tokens is 99999999999",
    "tokens = 2026-11-30": "tokens is datetime",
    'input = "x"': "input is 'x'",
    "overwrite = 1": "overwrite is 1",
    "calibration = 5": "calibration is 5",
    "block = true": "block is True",
    "block = {}": "block is {}",
}


@pytest.mark.parametrize("line", RECIPES)
def test_a_wrong_line_of_a_recipe_is_refused_by_name(tmp_path, line):
    first = "" if line.startswith("source") else 'source = "model"\n'
    (tmp_path / "r.toml").write_text(f"{first}{line}\n")
    with pytest.raises(ExportError, match=RECIPES[line]):
        read_recipe(tmp_path / "r.toml")


FLAGS = [
    ("--tokens", "-1"),
    ("--tokens", "1.5"),
    ("--tokens", "nan"),
    ("--tokens", str(2**70)),
    ("--block", "0"),
    ("--block", "-32"),
    ("--calibration-tokens", "0"),
    ("--memory-limit", "-1"),
    ("--memory-limit", "9" * 400),
    ("--quantize", ""),
    ("--head", "q2"),
    ("--dtype", "int4"),
]


@pytest.mark.parametrize(("flag", "value"), FLAGS)
def test_a_wrong_flag_ends_with_2_and_its_name(tmp_path, flag, value):
    done = CliRunner().invoke(app, ["no-such-model", "-o", str(tmp_path / "b"), flag, value])
    assert done.exit_code == 2, done.output
    assert flag.strip("-").replace("-", "_") in done.output.replace("-", "_")
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("wrong", [None, 5, "model", {"source": "model"}, ("model", "b")], ids=repr)
def test_what_are_no_options_and_no_model_is_refused(tmp_path, wrong):
    pytest.importorskip("torch", reason="the toolchain needs torch")
    from edgeformer.export import export, language_model, module_source

    good = ExportOptions("model", tmp_path / "b")
    with pytest.raises(ExportError, match="options is"):
        export(wrong)
    if wrong is not None:
        with pytest.raises(ExportError, match="traced is"):
            export(good, traced=wrong)
    with pytest.raises(ExportError, match="module is"):
        module_source(wrong, good, "mine")
    with pytest.raises(ExportError, match="model is"):
        language_model(wrong, "mine")
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    "source", ["nowhere", "/nowhere/x.gguf", "no_module:make", "x" * 5000, ".", "a:b:c", "~"], ids=lambda s: s[:20]
)
def test_a_source_that_is_none_is_refused(tmp_path, source):
    pytest.importorskip("torch", reason="the toolchain needs torch")
    from edgeformer.export import export

    with pytest.raises(ExportError, match=r".{20}"):
        export(ExportOptions(source, tmp_path / "b"))
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("output", ["x" * 5000, "/proc/none/b", "/dev/null", "."])
def test_a_place_where_nothing_can_be_written_is_refused(output, monkeypatch, tmp_path):
    pytest.importorskip("torch", reason="the toolchain needs torch")
    import torch

    from edgeformer.export import export, module_source

    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").write_text("")
    options = ExportOptions("mine", output, quantize="none", input=("x=float32[batch,4]",))
    with pytest.raises((BundleError, ExportError), match=r".{20}"):
        export(options, traced=module_source(torch.nn.Linear(4, 4), options, "mine"))
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
