"""The thread pool: phases in order, every chunk once, no CPU when idle, exceptions, fork, ThreadSanitizer."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

native = pytest.importorskip("edgeformer._native")
testing = native.testing
POOL_SOURCE = Path(__file__).parents[2] / "csrc" / "platform" / "threads.cpp"


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
@pytest.mark.parametrize("spin", [0, 200])
def test_every_chunk_runs_once_and_begin_sees_all_of_the_phase_before(threads: int, spin: int) -> None:
    pool = testing.ThreadPool(threads)
    phases, chunks = 200, 7
    for _ in range(20):
        seen = pool.counts(phases, chunks, spin)
        # phase p has chunks - p % 3 chunks, each adds one; every seventh phase is empty
        expected = [0] + [0 if p % 7 == 3 else chunks - p % 3 for p in range(phases - 1)]
        assert seen == expected


def test_a_run_without_phases_and_one_without_chunks_return() -> None:
    pool = testing.ThreadPool(2)
    assert pool.counts(0, 5, 0) == []
    pool.seconds(3, 4, 0, 0)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("in_begin", [False, True])
def test_an_exception_ends_the_run_and_the_pool_goes_on(threads: int, in_begin: bool) -> None:
    pool = testing.ThreadPool(threads)
    for _ in range(20):
        with pytest.raises(RuntimeError, match="begin failed" if in_begin else "work failed"):
            pool.throw(5, 10, 2, in_begin)
        assert pool.counts(3, 5, 0) == [0, 5, 4]


def test_runs_of_several_python_threads_take_turns() -> None:
    pool = testing.ThreadPool(3)
    failures = []

    def loop() -> None:
        for _ in range(50):
            if pool.counts(10, 5, 10)[1] != 5:
                failures.append("a run saw another's chunks")

    callers = [threading.Thread(target=loop) for _ in range(4)]
    for t in callers:
        t.start()
    for t in callers:
        t.join()
    assert not failures


def test_an_idle_pool_uses_no_cpu() -> None:
    pool = testing.ThreadPool(4)
    pool.counts(10, 10, 0)
    time.sleep(0.05)  # the spin is over
    before = time.process_time()
    time.sleep(0.5)
    assert time.process_time() - before < 0.02


def test_many_pools_start_and_stop() -> None:
    for _ in range(50):
        assert testing.ThreadPool(3).counts(2, 5, 0) == [0, 5]


def test_threads_below_one_are_refused() -> None:
    with pytest.raises(ValueError, match="threads is 0"):
        testing.ThreadPool(0)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child_works_and_its_parent_goes_on() -> None:
    if sys.flags.dev_mode:
        pytest.skip("fork of a threaded process")
    pool = testing.ThreadPool(3)
    assert pool.counts(3, 5, 0) == [0, 5, 4]
    child = os.fork()
    if child == 0:
        ok = pool.counts(20, 7, 10)[:3] == [0, 7, 6] and pool.threads == 3
        os._exit(0 if ok else 1)
    deadline = time.monotonic() + 20
    status = None
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        time.sleep(0.01)
    else:
        os.kill(child, 9)
        os.waitpid(child, 0)
        pytest.fail("the child hangs in the pool of its parent")
    assert os.waitstatus_to_exitcode(status) == 0
    assert pool.counts(3, 5, 0) == [0, 5, 4]


def stress_under_thread_sanitizer(tmp_path: Path, source: str) -> subprocess.CompletedProcess[str]:
    """Builds threads_stress.cpp with `source` as the text of threads.cpp, and runs it."""
    root, out = Path(__file__).parents[2], tmp_path / "stress"
    compiler = shutil.which("g++") or pytest.skip("needs g++")
    pool = tmp_path / "threads.cpp"
    pool.write_text(source)
    flags = ["-std=c++17", "-O1", "-g", "-pthread", "-fsanitize=thread", f"-I{root / 'csrc'}"]
    files = [root / "tests" / "csrc" / "cross" / "threads_stress.cpp", root / "csrc" / "platform" / "posix.cpp", pool]
    command = [compiler, *flags, *files, "-o", out]
    # the suite itself may run under a preloaded AddressSanitizer, which does not go with the other one
    clean = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    built = subprocess.run(command, capture_output=True, text=True, env=clean)
    if "cannot find" in built.stderr and "tsan" in built.stderr:
        pytest.skip("this compiler has no ThreadSanitizer")
    assert built.returncode == 0, built.stderr
    return subprocess.run([out], capture_output=True, text=True, timeout=300, env=clean)


def test_the_pool_is_clean_under_thread_sanitizer(tmp_path: Path) -> None:
    result = stress_under_thread_sanitizer(tmp_path, POOL_SOURCE.read_text())
    assert "WARNING: ThreadSanitizer" not in result.stderr, result.stderr
    assert (result.returncode, result.stdout) == (0, "good\n"), result.stderr


def test_a_pool_that_publishes_without_order_is_seen_by_thread_sanitizer(tmp_path: Path) -> None:
    right = POOL_SOURCE.read_text()
    wrong = right.replace("claim.store(word);", "claim.store(word, std::memory_order_relaxed);")
    assert wrong != right
    result = stress_under_thread_sanitizer(tmp_path, wrong)
    assert "WARNING: ThreadSanitizer" in result.stderr
    assert result.returncode != 0
