"""`load` and the Model: which engine runs and why, prompts, logits, calls."""

from __future__ import annotations

import sys

import numpy as np
import pytest

import edgeformer
from edgeformer import model as module
from edgeformer.engines import choose
from edgeformer.errors import BundleError, EngineUnavailable, InputError
from edgeformer.model import load
from edgeformer.tasks import text_generation


def test_an_engine_asked_for_by_name_runs_or_raises(lm, monkeypatch):
    assert load(lm, "cpu").engine.name == "cpu"
    monkeypatch.setitem(sys.modules, "edgeformer._native", None)
    with pytest.raises(EngineUnavailable, match="native extension"):
        load(lm, "native")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(EngineUnavailable, match="onnxruntime is"):
        load(lm, "cpu")


def test_auto_takes_the_first_that_runs_and_says_why_not_the_others(lm, monkeypatch):
    monkeypatch.setattr("edgeformer.engines.ort_install.cuda_driver_problem", lambda: "there is no NVIDIA driver")
    monkeypatch.setitem(sys.modules, "edgeformer._native", None)
    model = load(lm, threads=1)
    choice = model.explain()
    assert choice.engine == model.engine.name == "cpu"
    assert list(choice.reasons) == ["cuda", "native", "cpu"]
    assert "no NVIDIA driver" in choice.reasons["cuda"]
    assert "native extension is not installed" in choice.reasons["native"]
    assert "chosen" in choice.reasons["cpu"]
    assert str(choice).count("\n") == 2
    assert str(choice).splitlines()[2].startswith("* cpu")


def test_auto_that_finds_nothing_names_every_reason(lm, monkeypatch):
    monkeypatch.setattr("edgeformer.engines.ort_install.cuda_driver_problem", lambda: "there is no NVIDIA driver")
    monkeypatch.setitem(sys.modules, "edgeformer._native", None)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(EngineUnavailable) as error:
        load(lm)
    for part in ("no NVIDIA driver", "native extension is not installed", "onnxruntime is"):
        assert part in str(error.value)


def test_engines_after_the_chosen_one_are_not_tried(lm, monkeypatch):
    made = {"model": load(lm, "cpu").engine}
    tried = []

    def create(name, *rest):
        tried.append(name)
        return made

    monkeypatch.setattr(choose, "create", create)
    choice = load(lm).explain()
    assert tried == ["cuda"]
    assert choice.reasons["cpu"] == "not tried: cuda comes first"


@pytest.mark.parametrize(
    ("name", "order"),
    [("forecast", ["cuda", "cpu", "native"]), ("float", ["cuda", "native", "cpu"]), ("q8", ["cuda", "native", "cpu"])],
)
def test_float_models_without_a_cache_try_onnxruntime_first(bundles, monkeypatch, name, order):
    monkeypatch.setattr("edgeformer.engines.ort_install.cuda_driver_problem", lambda: "there is no NVIDIA driver")
    choice = load(bundles / name).explain()
    assert list(choice.reasons) == order
    assert choice.engine == order[1]
    if name == "forecast":
        assert "run faster on cpu" in choice.reasons["native"]
        monkeypatch.setitem(sys.modules, "onnxruntime", None)
        assert load(bundles / name).explain().engine == "native"


def test_an_isa_asks_for_the_native_engine(lm, monkeypatch):
    with pytest.raises(InputError, match="isa='avx2' is an option of the native engine"):
        load(lm, "cpu", isa="avx2")
    seen = []

    def create(name, bundle, threads, native, *rest):
        seen.append((name, native.isa))
        raise EngineUnavailable("no")

    monkeypatch.setattr(choose, "create", create)
    with pytest.raises(EngineUnavailable):
        load(lm, isa="avx2")
    assert seen == [("native", "avx2")]  # never another engine instead


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"engine": "gpu"}, "engine is 'gpu', expected auto, cuda, native, cpu"),
        ({"threads": 0}, "threads is 0"),
        ({"threads": 1.5}, "threads is 1.5"),
        ({"threads": True}, "threads is True"),
    ],
)
def test_wrong_options_are_refused(lm, options, expected):
    with pytest.raises(InputError, match=expected):
        load(lm, **options)


def test_auto_threads_are_the_cores_that_may_be_used(lm, monkeypatch):
    monkeypatch.setattr(choose, "default_threads", lambda: 3)
    assert load(lm, "native", "auto").engine.threads == load(lm, "native").engine.threads == 3
    with pytest.raises(InputError, match="threads is 'all'"):
        load(lm, threads="all")


def test_hashes_are_checked_unless_told_not_to(lm, copy_of):
    damaged = copy_of(lm)
    data = bytearray((damaged / "model.onnx.data").read_bytes())
    data[1000] ^= 1
    (damaged / "model.onnx.data").write_bytes(data)
    load(damaged, "cpu", check="sizes")
    for check in ({}, {"check": "once"}, {"check": "hashes"}):
        with pytest.raises(BundleError, match="other content"):
            load(damaged, "cpu", **check)
    with pytest.raises(InputError, match="check is 'all'"):
        load(damaged, "cpu", check="all")


def test_logits_of_every_position_are_float32(bundles, monkeypatch):
    ids = [5, 17, 90, 200, 31]
    for name in ("float", "float16"):
        model = load(bundles / name, "cpu", threads=1)
        logits = model.logits(ids)
        assert logits.dtype == np.float32
        assert logits.shape == (5, model.bundle.vocab_size)
        np.testing.assert_allclose(model.logits(np.array(ids)[:3]), logits[:3], atol=1e-2)
        monkeypatch.setattr(text_generation, "CHUNK", 2)
        np.testing.assert_allclose(model.logits(ids), logits, atol=1e-2)
        for bad in ([], [[1, 2]], [400], [1.5]):
            with pytest.raises(InputError):
                model.logits(bad)


def test_a_model_without_tokens_is_called_with_its_arrays(bundles):
    model = load(bundles / "forecast", "cpu", threads=1)
    assert not model.is_language_model
    assert model.tokenizer is None
    outputs = model(values=np.zeros((2, 3, 5), np.float32))
    assert list(outputs) == ["forecast"]
    assert outputs["forecast"].shape == (2, 3, 3)
    with pytest.raises(InputError, match=r"is a forecasting model and has no generate\(\); call it: model\(values\)"):
        model.generate("x")
    with pytest.raises(InputError, match="has no logits"):
        model.logits([1])
    with pytest.raises(InputError, match=r"value is not an input.*\n?.*values is missing"):
        model(value=np.zeros((2, 3, 5)))
    assert "forecasting on cpu" in repr(model)


def test_info_holds_what_a_log_wants(lm):
    info = load(lm, "cpu", threads=1).info
    assert info["engine"] == "cpu"
    assert info["threads"] == 1
    assert info["quantization"]["scheme"] == "none"
    assert info["context"] == 256
    assert len(info["fingerprint"]) == 64
    with pytest.raises(EngineUnavailable, match="cannot predict its memory"):
        load(lm, "cpu", threads=1).memory(100)


def test_load_is_the_packages_own_name(lm):
    assert edgeformer.load is load
    assert edgeformer.Model is module.Model
    assert isinstance(edgeformer.Bundle.open(lm), edgeformer.Bundle)
    with pytest.raises(AttributeError, match="no attribute 'frobnicate'"):
        _ = edgeformer.frobnicate
    assert set(edgeformer.__all__) <= set(dir(edgeformer))
    assert all(getattr(edgeformer, name) for name in edgeformer.__all__)
