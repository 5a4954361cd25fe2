"""A long call of a library beside the main thread, which Ctrl-C reaches."""

from __future__ import annotations

import _thread
import os
import signal
import threading
import time

import pytest

from edgeformer.engines import interruptible as module
from edgeformer.engines.interruptible import interruptible


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


def test_outside_the_main_thread_it_is_a_plain_call():
    found = []
    other = threading.Thread(target=lambda: found.append(interruptible(threading.get_ident) == threading.get_ident()))
    other.start()
    other.join()
    assert found == [True]


def test_without_a_thread_it_is_a_plain_call(monkeypatch):
    def refuse(*_):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(_thread, "start_new_thread", refuse)
    assert interruptible(threading.get_ident) == threading.get_ident()
    with pytest.raises(ZeroDivisionError):
        interruptible(lambda: 1 // 0)


def test_a_thread_that_begins_too_late_or_never_does_nothing(monkeypatch):
    """A thread that finds no memory for its first steps ends without a word."""
    late, calls = [], []
    monkeypatch.setattr(module, "_START", 0.02)
    monkeypatch.setattr(_thread, "start_new_thread", lambda run, _: late.append(run))
    assert interruptible(lambda: calls.append(1) or threading.get_ident()) == threading.get_ident()
    late[0]()
    assert calls == [1]


def test_an_interrupt_of_a_call_that_the_caller_does_itself_waits_for_nothing(monkeypatch, interrupt):
    monkeypatch.setattr(module, "_START", 0.01)
    monkeypatch.setattr(_thread, "start_new_thread", lambda *_: None)
    interrupt()
    with pytest.raises(KeyboardInterrupt):
        interruptible(lambda: time.sleep(60), lambda: None)


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
    release, ended = threading.Event(), threading.Event()
    interrupt()
    with pytest.raises(KeyboardInterrupt):
        interruptible(lambda: release.wait(60) and ended.set())
    assert not ended.is_set()
    release.set()
    assert ended.wait(60)


@pytest.mark.parametrize("begins", [True, False])
def test_ctrl_c_inside_the_start_of_the_thread_stops_the_call(monkeypatch, begins):
    start, stop, ended = _thread.start_new_thread, threading.Event(), []

    def interrupted(run, arguments):
        if begins:
            start(run, arguments)
            time.sleep(0.2)
        raise KeyboardInterrupt

    monkeypatch.setattr(_thread, "start_new_thread", interrupted)
    with pytest.raises(KeyboardInterrupt):
        interruptible(lambda: ended.append(stop.wait(60)), stop.set)
    assert ended == [True] * begins
