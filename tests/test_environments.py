"""The package as users install it: on a device, with the GPU wheel but no GPU, and without a compiler."""

from __future__ import annotations

import json

import pytest
from support.environments import ROOT, Environment, build_wheel, run

pytestmark = pytest.mark.slow

RUNTIME_TESTS = (
    "engines/test_onnxruntime.py",
    "test_model.py",
    "decoding/test_generate.py",
    "tools/test_verify.py",
    "tools/test_doctor.py",
    "test_imports.py",
)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    return build_wheel(tmp_path_factory.mktemp("wheel"), EDGEFORMER_NATIVE="1")


@pytest.fixture(scope="module")
def device(wheel):
    """What a device has: no torch, no onnxruntime."""
    return Environment("device", wheel)


FIRST_TOKEN = """
import importlib.util, sys
for name in ("torch", "onnxruntime", "transformers"):
    assert importlib.util.find_spec(name) is None, name
import edgeformer
model = edgeformer.load(sys.argv[1])
assert model.engine.name == "native", model.explain()
print(model.generate([1, 17, 33], max_new_tokens=1, ignore_eos=True).ids)
"""


def test_a_device_needs_neither_torch_nor_onnxruntime(device, lm):
    assert json.loads(device.script(FIRST_TOKEN, lm))[0] >= 0


def test_a_device_runs_the_real_model(device, smollm2):
    assert json.loads(device.script(FIRST_TOKEN, smollm2("keep")))[0] >= 0


def test_export_without_the_toolchain_says_what_to_install(device):
    with pytest.raises(AssertionError, match=r"edgeformer export needs torch, .*: pip install 'torch=="):
        run(device.python, "-m", "edgeformer", "export", "x", "-o", "y", cwd=device.path)


NO_CUDA = """
import sys
import onnxruntime
import edgeformer
assert "CUDAExecutionProvider" in onnxruntime.get_available_providers(), "this must be the GPU wheel"
model = edgeformer.load(sys.argv[1])
assert model.engine.name != "cuda", model.explain()
print(model.explain())
assert edgeformer.load(sys.argv[1], engine="cpu").engine.name == "cpu"
try:
    edgeformer.load(sys.argv[1], engine="cuda")
except edgeformer.EngineUnavailable as error:
    print(error)
else:
    raise SystemExit("cuda was claimed without a GPU")
"""


@pytest.fixture(scope="module")
def gpu_wheel(wheel):
    return Environment("gpu", wheel, "onnxruntime-gpu", "pytest", "pytest-timeout", "pytest-benchmark", "hypothesis")


def test_the_gpu_wheel_without_a_gpu_claims_nothing(gpu_wheel, lm):
    assert "cuda" in gpu_wheel.script(NO_CUDA, lm)


def test_the_runtime_suite_passes_on_the_gpu_wheel(gpu_wheel):
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(gpu_wheel.path)}  # not CI: torch is missing there on purpose
    done = run(gpu_wheel.python, "-m", "pytest", "-q", "-x", *RUNTIME_TESTS, cwd=ROOT / "tests", env=environment)
    assert " passed" in done.stdout and "failed" not in done.stdout


def test_without_a_compiler_the_package_installs_and_says_what_is_missing(tmp_path, lm):
    broken = build_wheel(tmp_path, CC="/bin/false", CXX="/bin/false")
    environment = Environment("nocompiler", broken, "onnxruntime")
    report = environment.script("import edgeformer.tools.doctor as d; print(*d.examine(), sep=chr(10))")
    assert "native" in report and "extension" in report
    found = environment.script("import sys, edgeformer; print(edgeformer.load(sys.argv[1]).explain())", lm)
    assert "cpu" in found and "extension" in found
