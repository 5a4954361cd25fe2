"""The default export of models with unusual caches or contexts.

Latent attention caches one compressed vector for each token, and a linear layer reads the cache itself; a decoder-only
Whisper calls its context `max_target_positions`; Moshi embeds one token more than its head can score.
"""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the exporter needs torch")
transformers = pytest.importorskip("transformers", reason="the models are transformers' own")
pytest.importorskip("onnxruntime", reason="the exporter's checks need onnxruntime")
pytest.importorskip("edgeformer._native", reason="the native extension is not built")

import edgeformer
from bench.coverage.models import tiny
from edgeformer.bundle.bundle import Bundle
from edgeformer.bundle.context import NAMES, context_length
from edgeformer.engines.native.engine import NativeEngine
from edgeformer.errors import ExportError
from edgeformer.export import ExportOptions, export
from edgeformer.export.graphs import trace_model
from edgeformer.export.passes.linear_layers import linear_layers
from edgeformer.export.progress import Silent
from edgeformer.export.quantize import calibrate
from edgeformer.export.source import Source
from edgeformer.export.sources.hub.hub import language_model
from edgeformer.export.write import save_graph

UNUSUAL = ("minicpm3", "whisper", "moshi")


@pytest.fixture(scope="module")
def traced():
    """`traced(name)`: the tiny model's float graph; each is traced once."""
    made = {}

    def get(name):
        if name not in made:
            made[name] = trace_model(language_model(tiny(name), name))
        return made[name]

    return get


@pytest.mark.parametrize("name", UNUSUAL)
def test_the_default_export_gives_a_bundle_that_runs(name, traced, tmp_path):
    manifest = export(ExportOptions(name, tmp_path / "bundle"), traced=traced(name))
    assert manifest["quantization"]["scheme"] == "q4a"
    assert "calibration" in str(manifest["quantization"])
    ids = [(7 * i) % 116 + 3 for i in range(40)]
    with torch.no_grad():
        expected = traced(name).source.module(torch.tensor([ids]), use_cache=False).logits[0].numpy()
    for engine in ("cpu", "native"):
        model = edgeformer.load(tmp_path / "bundle", engine, 1)
        found = model.logits(ids)
        # four bits: a weight errs by at most 1/30 of its block's range, 0.1 of its deviation in the rms; nine linear
        # layers in a row that add like noise cost 0.3, twice that is allowed. Unrelated logits would differ by 1.4.
        assert np.std(found - expected) <= 0.6 * np.std(expected), engine
        assert len(model.generate(ids, max_new_tokens=5, ignore_eos=True).ids) == 5


def test_a_layer_that_reads_the_cache_itself_has_its_own_inputs(traced, tmp_path):
    """A latent's up-projection: its input is an output of the cache; the reference is from PyTorch's hooks."""
    shared, path = traced("minicpm3"), tmp_path / "model.onnx"
    save_graph(shared.models["model"].clone(), path)
    layers = {layer.weight.name: layer for layer in linear_layers(shared.models["model"])}
    reading = {name: layer for name, layer in layers.items() if str(layer.x.name).startswith("present.")}
    assert len(reading) == 2, "one up-projection a layer reads the cache; if none does, this test is about nothing"
    seen = {}
    hooks = [
        part.register_forward_pre_hook(lambda _, given, key=key: seen.update({f"{key}.weight": given[0]}))
        for key, part in shared.source.module.named_modules()
        if isinstance(part, torch.nn.Linear)
    ]
    ids = np.random.default_rng(3).integers(3, 119, (3, 20))
    with torch.no_grad():
        shared.source.module(torch.from_numpy(ids), use_cache=False)
    for hook in hooks:
        hook.remove()
    sizes = {(layer.x.name,): layer.inputs for layer in layers.values()}
    (found,) = calibrate.hessians(calibrate.Calibration(path, ids, "test"), sizes, Silent())
    for name, layer in layers.items():
        x = seen[name].flatten(0, -2).double()
        expected = (x.T @ x / ids.size).numpy()
        # float32 sums of 60 products: 60 * 2^-24 of the largest
        np.testing.assert_allclose(found[(layer.x.name,)], expected, atol=60 * 2**-24 * np.abs(expected).max() + 1e-6)


@pytest.mark.parametrize("field", NAMES)
def test_every_config_name_of_the_context_length_is_known_everywhere(field, copy_of, reseal, lm):
    """The exporter, the bundle and the native engine use one function."""
    assert context_length({field: 48}) == context_length({"text_config": {field: 48}}) == 48
    assert context_length({field: None, "vocab_size": 48}) is None
    assert context_length({field: True}) is context_length({field: -1}) is None
    source = Source(torch.nn.Identity(), (), (), "text-generation", "test", config={field: 48})
    assert source.context == 48
    assert dataclasses.replace(source, config={}).context is None
    bundle = copy_of(lm)
    (bundle / "config.json").write_text(json.dumps({"vocab_size": 90, field: 48}))
    reseal(bundle)
    assert Bundle.open(bundle).context == 48
    assert NativeEngine.from_bundle(bundle, threads=1).context == 48


def test_calibration_text_longer_than_the_positions_is_refused(traced, tmp_path, monkeypatch):
    """A table of 256 positions, shorter than the context in the config, that `learned_positions` does not find."""
    monkeypatch.setattr(calibrate, "LENGTH", 300)
    monkeypatch.setattr("edgeformer.export.source.learned_positions", lambda *_: None)
    shared = traced("whisper")
    wrong = dataclasses.replace(shared.source, config={**shared.source.config, "max_target_positions": 4096})
    with pytest.raises(ExportError, match=r"does not run on calibration text of 257 tokens .*--calibration none"):
        export(
            ExportOptions("whisper", tmp_path / "bundle", tokens=0, calibration_tokens=300),
            traced=dataclasses.replace(shared, source=wrong),
        )
    assert not (tmp_path / "bundle").exists()
