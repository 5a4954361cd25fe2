"""KV chunks that caches of several threads share, under ThreadSanitizer."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def stress_under_thread_sanitizer(
    tmp_path: Path, change: tuple[str, str] = ("", "")
) -> subprocess.CompletedProcess[str]:
    """Builds chunks_stress.cpp with a change of kv_chunk.h, and runs it."""
    compiler = shutil.which("g++") or pytest.skip("needs g++")
    source, out = shutil.copytree(ROOT / "csrc", tmp_path / "csrc"), tmp_path / "stress"
    header = source / "program" / "kv_chunk.h"
    text = header.read_text()
    assert change[0] in text
    header.write_text(text.replace(*change) if change[0] else text)
    flags = ["-std=c++17", "-O1", "-g", "-pthread", "-fsanitize=thread", f"-I{source}"]
    files = [source / "program" / "kv_cache.cpp", source / "platform" / "posix.cpp"]
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
        ("users.load(std::memory_order_acquire)", "users.load(std::memory_order_relaxed)"),
        ("return block_ && block_->users", "return false && block_->users"),
    ],
    ids=["not acquired", "never copied"],
)
def test_chunks_shared_wrongly_are_seen(tmp_path: Path, change: tuple[str, str]) -> None:
    result = stress_under_thread_sanitizer(tmp_path, change)
    assert "WARNING: ThreadSanitizer" in result.stderr or "another's tokens" in result.stdout
    assert result.returncode != 0
