"""The study of interrupts and of other threads' pace: what it counts, and the page that it writes."""

from __future__ import annotations

import signal
import threading
import time

import pytest

from bench import contract


@pytest.fixture
def handler():
    old = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, old)


def late(seconds):
    """Work that lets an interrupt through only after so long."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        time.sleep(seconds)
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    time.sleep(1)


def test_the_latency_is_that_of_the_work(handler, monkeypatch):
    main = threading.main_thread().ident
    # The timer's thread would take the signal that the main thread blocks.
    monkeypatch.setattr(contract.os, "kill", lambda pid, number: signal.pthread_kill(main, number))
    found = contract.interrupted(lambda: late(0.5), 0.1)
    assert found is not None
    assert found > 0.3


def test_an_interrupt_after_the_end_is_not_counted(handler):
    assert contract.interrupted(lambda: None, 0.05) is None


def test_a_thread_beside_work_that_holds_the_gil_is_slower():
    def busy():
        until = time.perf_counter() + 0.1
        while time.perf_counter() < until:
            pass

    assert contract.pace(busy) < 0.8 * contract.pace(None)


def test_the_page_has_a_row_a_measurement():
    numbers = {"median": 0.024, "min": 0.001, "max": 0.048, "n": 11}
    part = {"median": 0.85, "min": 0.8, "max": 0.9, "n": 3}
    run = {
        "machine": {"cpu": "a", "system": "b", "versions": {"numpy": "2"}, "date": "2026-11-29"},
        "bundle": "m",
        "prompt": 1500,
        "interrupts": [{"engine": "native", "work": "prompt", "seconds": numbers}],
        "paces": [{"engine": "native", "work": "decode", "same_process": part, "other_process": part}],
    }
    text = contract.page(run)
    assert "| native | prompt | 24 ms | 48 ms |" in text
    assert "| native | decode | 85%, least 80% | 85%, least 80% |" in text
