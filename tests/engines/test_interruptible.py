"""A long call of a library beside the main thread, which Ctrl-C reaches."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest

from edgeformer.engines import interruptible as module
from edgeformer.engines.interruptible import interruptible


def threads():
    return [thread for thread in threading.enumerate() if thread.name == "edgeformer call"]


@pytest.fixture
def interrupt(monkeypatch):
    """`interrupt()`: Ctrl-C after 50 ms."""
    old = signal.signal(signal.SIGINT, signal.default_int_handler)
    timers = []

    def after() -> None:
        timers.append(threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT)))
        timers[-1].start()

    yield after
    for timer in timers:
        timer.join()
    signal.signal(signal.SIGINT, old)


def test_results_and_errors_come_from_another_thread():
    assert interruptible(threading.get_ident) != threading.get_ident()
    with pytest.raises(ZeroDivisionError):
        interruptible(lambda: 1 // 0)
    assert not threads()


def test_outside_the_main_thread_it_is_a_plain_call():
    found = []
    other = threading.Thread(target=lambda: found.append(interruptible(threading.get_ident) == threading.get_ident()))
    other.start()
    other.join()
    assert found == [True]


def test_without_a_thread_it_is_a_plain_call(monkeypatch):
    def refuse(self):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    assert interruptible(threading.get_ident) == threading.get_ident()
    with pytest.raises(ZeroDivisionError):
        interruptible(lambda: 1 // 0)


def test_ctrl_c_stops_the_call_and_waits_for_its_end(interrupt):
    stop, ended = threading.Event(), []

    def work():
        assert stop.wait(60)
        time.sleep(0.05)
        ended.append(True)

    interrupt()
    with pytest.raises(KeyboardInterrupt):
        interruptible(work, stop.set)
    assert ended == [True]


def test_ctrl_c_leaves_a_call_that_cannot_be_stopped(interrupt):
    release = threading.Event()
    interrupt()
    with pytest.raises(KeyboardInterrupt):
        interruptible(lambda: release.wait(60))
    assert len(threads()) == 1
    release.set()
    threads()[0].join(60)


def test_ctrl_c_inside_the_start_of_the_thread_stops_the_call(monkeypatch):
    start, stop, ended = threading.Thread.start, threading.Event(), []

    def interrupted(self):
        start(self)
        raise KeyboardInterrupt

    monkeypatch.setattr(module.threading.Thread, "start", interrupted)
    with pytest.raises(KeyboardInterrupt):
        interruptible(lambda: ended.append(stop.wait(60)), stop.set)
    assert ended == [True]
