"""Threads that do not start, or never begin: work is done by the caller, and nothing waits for ever."""

from __future__ import annotations

import _thread
import threading

import numpy as np
import pytest
from support.own_process import run

from edgeformer import disk_cache, load, threads
from edgeformer.bundle import integrity
from edgeformer.decoding.constraints import grammar
from edgeformer.errors import BundleError, OutOfMemory
from edgeformer.threads import Beside

IDS = [5, 40, 17, 88]


def refuse(*_):
    raise RuntimeError("can't start new thread")


def never_begin(*_):
    """What `start_new_thread` looks like where the new thread finds no memory for its first steps."""


@pytest.fixture(params=[refuse, never_begin])
def no_thread(request, monkeypatch):
    """No thread starts, or none begins; `threading.Thread.start` would raise or wait for ever."""
    monkeypatch.setattr(threads, "BEGIN", 0.05)
    monkeypatch.setattr(grammar, "BEGIN", 0.05)
    monkeypatch.setattr(_thread, "start_new_thread", request.param)
    return monkeypatch


def tokens(model):
    return model.generate(IDS, max_new_tokens=4, ignore_eos=True).ids


# --------------------------------------------------------------------------------------------------------------- Beside


def test_work_runs_in_another_thread():
    beside = Beside(threading.get_ident)
    beside.start()
    assert beside.begins(60) and beside.wait(60) and not beside.claim()
    assert beside.result() != threading.get_ident()


def test_an_error_of_the_work_is_the_callers():
    beside = Beside(lambda: 1 // 0)
    beside.start()
    with pytest.raises(ZeroDivisionError):
        beside.result()


def test_a_signal_between_taking_a_lock_and_giving_it_back_stops_nobody():
    """Ctrl-C while a thread's end is noticed: whoever waits for it again does not wait for ever."""
    work = Beside(lambda: 5)
    work.start()
    assert work.wait(10) and work.begins(10)
    for mark in (work._begun, work._done):
        assert mark._lock.acquire(blocking=False)  # as the interrupted wait leaves it
    assert work.begins(0.1) and work.wait(0.1)
    work.settle()
    assert work.result() == 5


def test_the_caller_does_what_no_thread_has_begun(no_thread):
    beside = Beside(threading.get_ident)
    beside.start()
    assert not beside.begins(0.01) and not beside.wait(0.01)
    assert beside.result() == threading.get_ident()


def test_a_thread_that_begins_after_the_caller_does_nothing(monkeypatch):
    late, calls = [], []
    monkeypatch.setattr(_thread, "start_new_thread", lambda begin, _: late.append(begin))
    beside = Beside(lambda: calls.append(1))
    beside.start()
    beside.result()
    late[0]()
    assert calls == [1]


def test_a_thread_that_nobody_can_replace_is_an_error(no_thread):
    with pytest.raises(OutOfMemory, match=r"for the test: the system refused.*raise the limits"):
        threads.start(threading.Thread(target=print), "the test")


def test_a_thread_whose_own_start_never_returns_is_an_error(monkeypatch):
    """`Thread.start` itself waits, in a thread that is lost."""
    monkeypatch.setattr(threads, "BEGIN", 0.05)
    release = threading.Event()
    thread = threading.Thread(target=print)
    monkeypatch.setattr(thread, "start", lambda: release.wait(60))
    with pytest.raises(OutOfMemory, match="for the test"):
        threads.start(thread, "the test")
    release.set()


# ---------------------------------------------------------------------------------------------- what is done in threads


@pytest.fixture
def large(monkeypatch):
    """The bundles of the tests count as large ones, whose files are hashed in a thread."""
    monkeypatch.setattr(integrity, "SMALL", 0)


def test_a_load_packs_and_hashes_without_threads(q8, cache_folder, large, no_thread):
    found = tokens(load(q8, "native", threads=1))
    no_thread.undo()
    assert found == tokens(load(q8, "native", threads=1, check="sizes"))


def test_a_wrong_hash_is_found_without_threads(q8, copy_of, cache_folder, large, no_thread):
    copy = copy_of(q8)
    data = bytearray((copy / "model.onnx.data").read_bytes())
    data[-1] ^= 1
    (copy / "model.onnx.data").write_bytes(data)
    with pytest.raises(BundleError, match=r"model\.onnx\.data has the right size but other content"):
        load(copy, "native", threads=1)


def test_an_error_of_the_hashes_in_their_thread_is_no_success(q8, cache_folder, large, monkeypatch):
    """It was printed by the thread, and the bundle counted as checked."""

    def fail(*_):
        raise MemoryError("hashes")

    monkeypatch.setattr(integrity, "hash_problems", fail)
    with pytest.raises(MemoryError, match="hashes"):
        load(q8, "native", threads=1)
    monkeypatch.undo()
    assert not list(cache_folder.glob("*.hashed"))


def test_a_write_to_the_cache_without_a_thread_is_done_at_the_end(cache_folder, no_thread):
    disk_cache.write_behind("a", np.arange(100, dtype=np.uint8), b"note")
    assert disk_cache.read_mapped("a") is None
    disk_cache.finish()
    assert disk_cache.read_mapped("a")[1] == b"note"


def test_a_scheduler_without_a_thread_says_so_and_the_next_call_works(lm, no_thread):
    model = load(lm, "native", threads=1)
    with model.scheduler(max_sequences=1) as scheduler:
        with pytest.raises(OutOfMemory, match="for the scheduler"):
            scheduler.add(IDS, max_new_tokens=4, ignore_eos=True)
        no_thread.undo()
        assert scheduler.add(IDS, max_new_tokens=4, ignore_eos=True).result(60).ids == tokens(model)


def test_masks_are_computed_without_a_thread(lm, no_thread):
    pytest.importorskip("llguidance")
    model = load(lm, "native", threads=1)
    grammar._beside.cache_clear()
    found = model.generate(IDS, max_new_tokens=8, regex="[a-z]{3}").text
    assert grammar._beside() is None
    grammar._beside.cache_clear()
    no_thread.undo()
    assert model.generate(IDS, max_new_tokens=8, regex="[a-z]{3}").text == found


# ------------------------------------------------------------------------------------------------- limits of the system

LOADS = """
from edgeformer import disk_cache
from edgeformer.bundle import integrity
integrity.SMALL = 0
os.environ["EDGEFORMER_CACHE"] = ""  # each load packs and hashes
def loads():
    return tokens(load(PATH, ENGINE, threads=1))
before = loads()
"""


def test_threads_under_a_limit_of_memory_never_wait_for_ever(q8):
    """`Thread.start` waits for ever at some of these limits: the script would not end."""
    run(
        LOADS
        + """
failed = 0
for extra in range(0, 1 << 20, 1 << 15):
    limit(extra + (8 << 20))  # a thread's stack is 8 MB of address space
    try:
        loads()
    except (EdgeformerError, MemoryError):
        failed += 1
    limit(None)
assert failed, "no load failed"
assert loads() == before
""",
        q8,
        "native",
        timeout=300,
    )


NOBODY = """
import ctypes
if os.getuid() == 0:  # the limit does not count for root; files are opened as root all the same
    os.setresuid(65534, 65534, 0)
    ctypes.CDLL(None).setfsuid(0)
resource.setrlimit(resource.RLIMIT_NPROC, (0, resource.getrlimit(resource.RLIMIT_NPROC)[1]))
try:
    threading.Thread(target=print).start()
    raise SystemExit("a thread started")
except RuntimeError:
    pass
"""


def test_a_load_works_where_the_system_refuses_threads(q8):
    run(
        LOADS
        + NOBODY
        + """
assert loads() == before
try:
    load(PATH, ENGINE, threads=1).scheduler().add(IDS, max_new_tokens=1)
    raise SystemExit("a scheduler without a thread")
except OutOfMemory as error:
    assert "ulimit -u" in str(error), error
""",
        q8,
        "native",
    )
