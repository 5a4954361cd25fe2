"""Other CPUs under qemu-user: aarch64 with and without dotprod and i8mm, x86-64 before AVX-512 and before AVX2.

`runner.cpp` runs each kernel on the same inputs and prints a hash of the output bits for each case. Reference: the
scalar table on this machine; every table on every CPU must give its bits. Needs g++, aarch64-linux-gnu-g++, qemu-user;
without them the tests are skipped, or fail with EDGEFORMER_REQUIRE_CROSS=1.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest
from support.cross import CPUS, ROOT, output, tool


def differing(found: list[str], expected: list[str]) -> list[str]:
    """Names of the cases whose bits differ."""
    assert [line.rsplit(" ", 1)[0] for line in found] == [line.rsplit(" ", 1)[0] for line in expected]
    return [a.rsplit(" ", 1)[0] for a, b in zip(found, expected, strict=True) if a != b]


@pytest.fixture(scope="session")
def expected(runners) -> list[str]:
    """The scalar table's lines on this machine."""
    lines = output([runners(platform.machine()), "scalar"])
    assert len(lines) > 300
    return lines


@pytest.mark.parametrize(("architecture", "cpu", "isas"), CPUS, ids=lambda v: v if isinstance(v, str) else "")
def test_every_cpu_gives_the_same_bits(runners, expected, architecture: str, cpu: str, isas: list[str]) -> None:
    emulator = [tool(f"qemu-{architecture}"), "-cpu", cpu]
    runner = runners(architecture)
    assert output([*emulator, runner, "--list"]) == isas
    for isa in isas:
        assert differing(output([*emulator, runner, isa]), expected) == [], f"{isa} on {cpu}"


def test_every_table_of_this_machine_gives_the_same_bits(runners, expected) -> None:
    runner = runners(platform.machine())
    for isa in output([runner, "--list"]):
        assert differing(output([runner, isa]), expected) == [], isa


def test_attention_in_one_piece_and_from_partials_has_one_hash(expected) -> None:
    lines = [line for line in expected if line.startswith("attention")]
    assert len(lines) == 2 * len(set(lines)) > 0


def test_a_changed_bit_is_seen(expected) -> None:
    name, value = expected[5].rsplit(" ", 1)
    changed = [*expected[:5], f"{name} {int(value, 16) ^ 1:016x}", *expected[6:]]
    assert differing(changed, expected) == [name]


def test_a_table_that_the_cpu_lacks_is_refused(runners) -> None:
    command = [tool("qemu-x86_64"), "-cpu", "Nehalem", runners("x86_64"), "avx2"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 1
    assert "needs avx2, fma, f16c" in result.stderr


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the extension of this machine is for another architecture")
@pytest.mark.parametrize(("cpu", "best"), [("Haswell", "avx2"), ("Nehalem", "scalar")])
def test_the_extension_built_here_runs_on_an_older_cpu(cpu: str, best: str) -> None:
    pytest.importorskip("edgeformer._native")
    code = (
        "import edgeformer._native as n; t = n.testing.Table(''); p = n.testing.ThreadPool(2);"
        "assert p.counts(3, 5, 0) == [0, 5, 4]; print(t.isa)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("EDGEFORMER_ISA", None)
    command = [tool("qemu-x86_64"), "-cpu", cpu, sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == [best]
