"""What is installed of ONNX Runtime: old, broken and doubled installations are refused with the reason."""

from __future__ import annotations

import sys
from importlib import metadata

import pytest

from edgeformer.bundle.bundle import Bundle
from edgeformer.engines import ort_install
from edgeformer.engines.onnxruntime import OrtEngine
from edgeformer.errors import EngineUnavailable


@pytest.mark.parametrize(
    ("bundle", "version", "expected"),
    [
        ("q8", "1.24.4", r"needs 1\.25 or newer \(older versions run q8 weights 15 to 50 times slower"),
        ("q8", "1.25.0", None),
        ("float", "1.24.4", None),
        ("float", "1.22.1", r"needs 1\.23 or newer"),
        ("float", "2.0.0.dev1", None),
    ],
)
def test_an_old_onnxruntime_is_refused_where_it_would_be_slow_or_fail(bundles, monkeypatch, bundle, version, expected):
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "__version__", version)
    opened = Bundle.open(bundles / bundle)
    if expected is None:
        OrtEngine(opened, threads=1)
    else:
        with pytest.raises(EngineUnavailable, match=expected):
            OrtEngine(opened, threads=1)


def test_both_wheels_are_noticed_and_explained(lm, monkeypatch):
    monkeypatch.setattr(metadata, "version", lambda name: {"onnxruntime": "1.32.0", "onnxruntime-gpu": "1.31.1"}[name])
    text = ort_install.both_wheels()
    assert "onnxruntime 1.32.0 and onnxruntime-gpu 1.31.1 are both installed" in text
    assert "pip uninstall -y onnxruntime onnxruntime-gpu" in text
    with pytest.warns(RuntimeWarning, match="are both installed"):
        OrtEngine(Bundle.open(lm), threads=1)


def test_one_wheel_is_no_problem(monkeypatch):
    def version(name):
        if name == "onnxruntime":
            return "1.32.0"
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", version)
    assert ort_install.both_wheels() is None
    assert ort_install.installed_wheels() == {"onnxruntime": "1.32.0"}


def test_a_missing_or_gutted_onnxruntime_is_explained(lm, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(EngineUnavailable, match="onnxruntime is"):
        OrtEngine(Bundle.open(lm))
    empty = type(sys)("onnxruntime")  # what uninstalling one of two wheels leaves: a folder without content
    monkeypatch.setitem(sys.modules, "onnxruntime", empty)
    with pytest.raises(EngineUnavailable, match="onnxruntime is broken"):
        OrtEngine(Bundle.open(lm))
