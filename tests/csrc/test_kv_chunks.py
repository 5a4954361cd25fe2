"""KV chunks that caches of several threads share, under ThreadSanitizer."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def stress_under_thread_sanitizer(
    tmp_path: Path, change: tuple[str, str, str] = ("kv_chunk.h", "", "")
) -> subprocess.CompletedProcess[str]:
    """Builds chunks_stress.cpp with a change of a file of csrc/program, and runs it."""
    compiler = shutil.which("g++") or pytest.skip("needs g++")
    source, out = shutil.copytree(ROOT / "csrc", tmp_path / "csrc"), tmp_path / "stress"
    name, old, new = change
    text = (source / "program" / name).read_text()
    assert old in text
    (source / "program" / name).write_text(text.replace(old, new) if old else text)
    flags = ["-std=c++17", "-O1", "-g", "-pthread", "-fsanitize=thread", f"-I{source}"]
    files = [source / name for name in ("program/kv_cache.cpp", "program/kv_slabs.cpp", "platform/posix.cpp")]
    files.append(ROOT / "tests" / "csrc" / "cross" / "chunks_stress.cpp")
    # the suite itself may run under a preloaded AddressSanitizer, which does not go with the other one
    clean = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    built = subprocess.run([compiler, *flags, *files, "-o", out], capture_output=True, text=True, env=clean)
    if "cannot find" in built.stderr and "tsan" in built.stderr:
        pytest.skip("this compiler has no ThreadSanitizer")
    assert built.returncode == 0, built.stderr
    return subprocess.run([out], capture_output=True, text=True, timeout=300, env=clean)


def test_shared_chunks_are_clean_under_thread_sanitizer(tmp_path: Path) -> None:
    result = stress_under_thread_sanitizer(tmp_path)
    assert "WARNING: ThreadSanitizer" not in result.stderr, result.stderr
    assert (result.returncode, result.stdout) == (0, "good\n"), result.stderr


@pytest.mark.parametrize(
    "change",
    [
        ("kv_chunk.h", "users.load(std::memory_order_acquire)", "users.load(std::memory_order_relaxed)"),
        ("kv_chunk.h", "return block_ && block_->users", "return false && block_->users"),
        ("kv_slabs.cpp", "lock_guard<std::mutex> lock(owner->mutex_)", "unique_lock<std::mutex> lock"),
        ("kv_cache.cpp", "if (!taken.zero) std::memset", "if (false) std::memset"),
    ],
    ids=["not acquired", "never copied", "given without a lock", "not cleared"],
)
def test_chunks_shared_wrongly_are_seen(tmp_path: Path, change: tuple[str, str, str]) -> None:
    result = stress_under_thread_sanitizer(tmp_path, change)
    seen = ("another's tokens", "not zero")
    assert "WARNING: ThreadSanitizer" in result.stderr or any(text in result.stdout for text in seen)
    assert result.returncode != 0


SLAB = 1 << 20  # kSlab in kv_slabs.cpp


@pytest.mark.parametrize("heads", [1, 9, 60])  # 240, 28 and 4 chunks in a slab
def test_slabs_are_no_larger_than_their_caches_need_and_end_with_them(heads: int) -> None:
    from edgeformer._native import testing

    cache = testing.KvCache("float32", 1, heads, 4, 4, 100_000)
    assert cache.bytes_of_slabs == 0
    for tokens in (1, 1_000, 40_000):
        cache.reserve(tokens)
        assert cache.bytes_alone <= cache.bytes_of_slabs < 1.2 * cache.bytes_alone + SLAB
    cache.truncate(0)
    assert cache.bytes_alone == 0
    assert cache.bytes_of_slabs <= SLAB  # one is kept for the next sequence


def test_a_chunk_larger_than_a_slab_gets_memory_of_its_own() -> None:
    from edgeformer._native import testing

    cache = testing.KvCache("float32", 1, 32, 128, 128, 1_000)
    cache.reserve(129)
    assert cache.bytes_alone <= cache.bytes_of_slabs < 1.001 * cache.bytes_alone
