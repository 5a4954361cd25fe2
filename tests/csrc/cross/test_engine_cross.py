"""The whole engine on other CPUs under qemu-user: a tiny model generates there what it generates here, bit for bit.

The program is lowered and the weights are read here, in Python; `engine_runner.cpp` gets both in one file and runs the
same C++ engine without Python: memory, phases, caches, operations, kernels, threads.
"""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

native = pytest.importorskip("edgeformer._native", reason="the native extension is not built")

from support.cross import CPUS, ROOT, output, tool
from support.dump import dump

STEPS = 4
PROMPTS = (33, 102)
RUNS = 20  # under ThreadSanitizer
FORMS = [("q8", "int8"), ("float", "float32")]  # the bundle, its cache


@pytest.fixture(scope="module")
def dumps(bundles, tmp_path_factory):
    """form -> (the file, the hashes that this machine's extension gives). The prompts are longer than a KV chunk, so
    attention is split; the second starts at an odd position, where two tokens share a pair of values in the cache."""
    folder = tmp_path_factory.mktemp("dumps")
    prompts = [np.random.default_rng(0).integers(0, 90, (1, length)) for length in PROMPTS]
    return {name: (folder / name, dump(bundles / name, folder / name, kv, prompts, STEPS)) for name, kv in FORMS}


@pytest.mark.parametrize(("architecture", "cpu", "isas"), CPUS, ids=lambda v: v if isinstance(v, str) else "")
def test_every_cpu_generates_the_same_bits(runners, dumps, architecture: str, cpu: str, isas: list[str]) -> None:
    emulator = [tool(f"qemu-{architecture}"), "-cpu", cpu]
    runner = runners(architecture, "engine_runner")
    for path, expected in dumps.values():
        for isa in isas:
            for threads in ("1", "3") if isa == isas[0] else ("1",):
                assert output([*emulator, runner, path, isa, threads]) == expected, f"{path.name} {isa} on {cpu}"


def test_the_runner_gives_this_machines_bits(runners, dumps) -> None:
    for path, expected in dumps.values():
        assert len(set(expected)) == len(PROMPTS) + STEPS
        assert output([runners(platform.machine(), "engine_runner"), path, "scalar", "2"]) == expected


def test_another_weight_is_seen_and_a_cut_file_refused(runners, dumps, tmp_path: Path) -> None:
    path, expected = dumps["float"]
    runner, data, wrong = runners(platform.machine(), "engine_runner"), path.read_bytes(), tmp_path / "wrong"
    row = np.frombuffer(data, np.uint8).copy()
    row[len(row) // 2] ^= 1  # the middle of the file is a weight's float
    wrong.write_bytes(row.tobytes())
    assert output([runner, wrong, "scalar", "1"]) != expected
    wrong.write_bytes(data[:-9])
    result = subprocess.run([runner, wrong, "scalar", "1"], capture_output=True, text=True)
    assert result.returncode == 1
    assert "cut short" in result.stderr


def under_thread_sanitizer(runners, dumps, *instead: Path) -> Iterator[subprocess.CompletedProcess[str]]:
    """Runs of the q8 model with 3 threads on the second-best table, which compiles in a sixth of the best one's time.

    On a busy machine one thread may do all the work of a run, without a race: so there are several runs.
    """
    isa = next((isa for isa in ("avx2", "neon_dotprod") if isa in native.isas()), None)
    if isa is None:
        pytest.skip("needs AVX2 or NEON's dot products")
    runner = runners(platform.machine(), "engine_runner", isa, *instead)
    for _ in range(RUNS):
        yield subprocess.run([runner, dumps["q8"][0], isa, "3"], capture_output=True, text=True, timeout=300)


def test_the_engine_is_clean_under_thread_sanitizer(runners, dumps) -> None:
    for result in under_thread_sanitizer(runners, dumps):
        assert "WARNING: ThreadSanitizer" not in result.stderr, result.stderr
        assert (result.returncode, result.stdout.split()) == (0, dumps["q8"][1])


def test_tokens_that_share_bytes_and_not_a_thread_are_seen_by_thread_sanitizer(runners, dumps, tmp_path: Path) -> None:
    right = (ROOT / "csrc" / "ops" / "attention_append.cpp").read_text()
    wrong = right.replace("r <= s.k_row ? s.k_row : r + (s.past + r - s.k_row) % 2;", "std::max(r, s.k_row);")
    assert wrong != right
    (tmp_path / "attention_append.cpp").write_text(wrong)
    results = under_thread_sanitizer(runners, dumps, tmp_path / "attention_append.cpp")
    race = next((r.stderr for r in results if "WARNING: ThreadSanitizer: data race" in r.stderr), "no run saw a race")
    assert "put_every_second" in race
