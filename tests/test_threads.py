"""The thread pool: phases in order, no lost or doubled chunk, idle without CPU, exceptions, fork."""

from __future__ import annotations

import os
import sys
import threading
import time

import pytest

native = pytest.importorskip("edgeformer._native")
testing = native.testing


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
