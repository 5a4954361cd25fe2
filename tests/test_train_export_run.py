"""Train, export and run each of the project's own models; the last step without torch."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="training needs torch")
pytest.importorskip("accelerate", reason="training needs accelerate")

from support import training

import edgeformer
from edgeformer.export import ExportOptions, export
from edgeformer.models import load_checkpoint
from edgeformer.train.loop import train
from edgeformer.train.options import RunOptions
from edgeformer.train.recipe import make_recipe

ENGINES = ("cpu", "native")


def test_a_decoder_is_trained_exported_and_run(tmp_path):
    table = training.recipe_table(training.TEXT, train__steps=150)
    table["data"]["source"] = training.text_file(tmp_path)
    train(make_recipe(table), tmp_path / "run", RunOptions(cpu=True))
    manifest = export(ExportOptions(str(tmp_path / "run"), tmp_path / "b", quantize="q8", tokens=256))
    assert manifest["task"] == "text-generation"
    assert manifest["accuracy"]["perplexity_float"] < 200, "of 320 tokens: it has learned something"
    module, _ = load_checkpoint(tmp_path / "run")
    for engine in ENGINES:
        model = edgeformer.load(tmp_path / "b", engine=engine)
        ids = model.tokenizer.encode("The class statement")
        with torch.no_grad():
            expected = module(torch.tensor([ids]), torch.arange(len(ids))[None])[0].numpy()
        found = model.logits(ids)
        assert np.abs(found - expected).max() < 0.05 * np.ptp(expected), engine
        assert model.generate("The class statement", max_new_tokens=8).text


def test_an_encoder_is_trained_exported_and_run(tmp_path):
    table = training.recipe_table(training.FORECAST, train__steps=120)
    train(make_recipe(table), tmp_path / "run", RunOptions(cpu=True))
    export(ExportOptions(str(tmp_path / "run"), tmp_path / "b", quantize="q8"))
    module, _ = load_checkpoint(tmp_path / "run")
    history = np.sin(np.arange(24, dtype=np.float32) / 24 * 2 * np.pi)[None, :, None]
    with torch.no_grad():
        expected = module(torch.from_numpy(history)).numpy()
    for engine in ENGINES:
        found = edgeformer.load(tmp_path / "b", engine=engine)(input_values=history)["output"]
        assert found.shape == expected.shape
        assert np.abs(found - expected).max() < 0.05 * np.ptp(expected), engine


def test_running_a_bundle_never_imports_torch(lm):
    program = (
        "import sys, json, edgeformer\n"
        "model = edgeformer.load(sys.argv[1])\n"
        "model.generate('hello', max_new_tokens=3)\n"
        "print(json.dumps([name for name in ('torch', 'transformers', 'onnxscript') if name in sys.modules]))\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(lm)], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []
