"""The aarch64 wheel in an arm64 Linux under qemu-user: the same bits as here on both NEON tables, and the commands."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("ziglang", reason="needs the extra `wheels`")
pytest.importorskip("edgeformer._native", reason="the native extension is not built")

from support.arm64 import Arm64
from support.wheel_builds import TIMEOUT

from wheels.build import ROOT

pytestmark = pytest.mark.timeout(TIMEOUT)
TOKENS = "6"
# Without SVE, which nothing here needs, and with a cheap stand-in for signed return addresses: seconds, not minutes.
NEWEST = "max,sve=off,pauth-impdef=on"
PORTABLE = ROOT / "tests/support/portable.py"


@pytest.fixture(scope="module")
def arm64() -> Arm64:
    return Arm64()


def lines(text: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in text.splitlines() if line.startswith("{")]


@pytest.mark.parametrize(
    ("cpu", "isas"),
    [(NEWEST, ["neon_i8mm", "neon_dotprod", "scalar"]), ("cortex-a76", ["neon_dotprod", "scalar"])],
)
def test_aarch64_gives_the_same_bits(arm64: Arm64, bundles: Path, cpu: str, isas: list[str]) -> None:
    names = [bundles / "float", bundles / "q8"]
    command = [sys.executable, PORTABLE, TOKENS, *names]
    here = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert here.returncode == 0, here.stderr
    expected = {(line["bundle"], line["sha256"], line["text"]) for line in lines(here.stdout)}
    assert len(expected) == len(names)
    there = lines(arm64.run(cpu, PORTABLE, TOKENS, *names))
    assert {(line["bundle"], line["sha256"], line["text"]) for line in there} == expected
    assert list(dict.fromkeys(line["isa"] for line in there)) == isas


def test_the_commands_run_on_aarch64(arm64: Arm64, q8: Path) -> None:
    assert arm64.run("cortex-a76", "-m", "edgeformer", "run", q8, "abc", "-n", "4", "-q", "--engine", "native")
    assert "native" in arm64.run("cortex-a76", "-m", "edgeformer", "verify", q8, "--engine", "native")


@pytest.mark.parametrize("name", ["float", "q8"])
def test_onnxruntime_gives_the_models_numbers_on_aarch64(arm64: Arm64, bundles: Path, name: str) -> None:
    told = arm64.run("cortex-a76", "-m", "edgeformer", "verify", bundles / name, "--engine", "cpu")
    assert f"{name} on cpu: the numbers are the model's" in told
