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
RUNS = 20  # under ThreadSanitizer: on a busy machine one thread may do all the work of a run
# The first thread that appends tokens from an odd position on waits, at most a minute, until a second one does.
# Relaxed: ThreadSanitizer sees no order between the two.
MEETING = """
  static std::atomic<int> arrived{0};
  if (sequence(run, 0).past % 2 && arrived.fetch_add(1, std::memory_order_relaxed) == 0) {
    for (int i = 0; i < 60000 && arrived.load(std::memory_order_relaxed) < 2; i++)
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    if (arrived.load(std::memory_order_relaxed) < 2) throw std::runtime_error("no second thread came");
  }
"""
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
    """Runs of the q8 model with 3 threads on the second-best table, which compiles faster than the best one."""
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


def appending(folder: Path, *faults: tuple[str, str]) -> Path:
    """attention_append.cpp with the meeting, and with texts replaced by others."""
    text = (ROOT / "csrc" / "ops" / "attention_append.cpp").read_text()
    start = "void Attention::append_rows(const Run& run, int64_t row, int64_t rows) const {\n"
    includes = "".join(f"#include <{name}>\n" for name in ("atomic", "chrono", "stdexcept", "thread"))
    for old, new in [(start, start + MEETING), *faults]:
        assert text.count(old) == 1
        text = text.replace(old, new)
    folder.mkdir()
    (folder / "attention_append.cpp").write_text(includes + text)
    return folder / "attention_append.cpp"


def test_tokens_that_share_bytes_and_not_a_thread_are_seen_by_thread_sanitizer(runners, dumps, tmp_path: Path) -> None:
    """Two threads append tokens of the second prompt: clean as it is, and a race where they split a pair of tokens."""
    result = next(under_thread_sanitizer(runners, dumps, appending(tmp_path / "right")))
    assert "WARNING: ThreadSanitizer" not in result.stderr, result.stderr
    assert (result.returncode, result.stdout.split()) == (0, dumps["q8"][1])

    split = ("r <= s.k_row ? s.k_row : r + (s.past + r - s.k_row) % 2;", "std::max(r, s.k_row);")
    result = next(under_thread_sanitizer(runners, dumps, appending(tmp_path / "wrong", split)))
    assert "WARNING: ThreadSanitizer: data race" in result.stderr
    assert "put_every_second" in result.stderr
