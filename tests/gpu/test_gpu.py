"""The engine `cuda` on a machine that has an NVIDIA GPU; skipped, with the reason, where it cannot run.

Nobody has run these tests yet: no such machine was available. `edgeformer doctor` says what is missing.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import edgeformer
from edgeformer.engines.ort_install import cuda_driver_problem
from edgeformer.engines.ort_providers import CUDA, PRECISIONS, TENSORRT
from edgeformer.tools.doctor import _try_provider
from edgeformer.tools.verify import verify

problem = cuda_driver_problem()
if problem is not None:
    pytest.skip(problem, allow_module_level=True)
onnxruntime = pytest.importorskip("onnxruntime")


def need(provider: str) -> None:
    if provider not in onnxruntime.get_available_providers():
        pytest.skip(f"this onnxruntime has no {provider}")
    missing = _try_provider(onnxruntime, provider)
    if missing is not None:
        pytest.skip(missing)


@pytest.fixture(autouse=True)
def cuda() -> None:
    need(CUDA)


@pytest.mark.parametrize("name", ["float", "float16", "q8", "forecast"])
def test_the_numbers_are_those_of_the_bundles_reference(bundles: Path, name: str) -> None:
    report = verify(bundles / name, "cuda")
    assert report.passed, report


def test_cuda_is_what_auto_takes(lm: Path) -> None:
    assert edgeformer.load(lm).engine.name == "cuda"


def test_a_long_text_steps_on_as_on_the_cpu(lm: Path) -> None:
    """The cache stays on the device for 100 steps; the logits stay within the bundle's tolerance of those here."""
    ids = np.random.default_rng(1).integers(3, 300, 120)
    engines = [edgeformer.load(lm, name).engine for name in ("cuda", "cpu")]
    found = []
    for engine in engines:
        state = engine.new_state()
        rows = [engine.forward([({"input_ids": ids[None, :20]}, state)])[0]["logits"][0, -1]]
        rows += [engine.forward([({"input_ids": [[token]]}, state)])[0]["logits"][0, -1] for token in ids[20:]]
        found.append(np.stack(rows))
    assert np.abs(found[0] - found[1]).max() <= engines[0].tolerance * np.ptp(found[1])


@pytest.mark.parametrize("precision", PRECISIONS)
def test_tensorrt(bundles: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str) -> None:
    need(TENSORRT)
    monkeypatch.setenv("EDGEFORMER_CACHE", str(tmp_path))
    values = np.random.default_rng(0).standard_normal((3, 7, 5)).astype(np.float32)
    expected = edgeformer.load(bundles / "forecast", "cpu")(values=values)["forecast"]
    found = edgeformer.load(bundles / "forecast", "cuda", tensorrt=precision)(values=values)["forecast"]
    # float16 has 11 bits; TensorRT may use TF32's 11 for float32 too
    assert np.abs(found - expected).max() <= 2**-8 * np.ptp(expected)
    assert list((tmp_path / "tensorrt").rglob("*.engine"))
