"""The study of interrupts and of other threads' pace: what it counts, and the page that it writes."""

from __future__ import annotations

import signal
import threading
import time

import pytest

from bench import contract, export_interrupts
from edgeformer import load


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
    assert "export" not in text
    run["paces"].append(run["paces"][0] | {"work": "prompt", "held": 0.012})
    waits = {"count": 1240, "median": 0.0011, "longest": 0.19}
    run["export"] = [{"stage": "trace", "seconds": 12.34, "waits": waits, "latency": 0.205}]
    text = contract.page(run | {"disturbed": ["gil"], "dates": {"interrupts": "2026-11-29", "gil": "2026-11-30"}})
    assert "| native | decode | 85%, least 80% | 85%, least 80% | not measured |" in text
    assert "| native | prompt | 85%, least 80% | 85%, least 80% | 1.2% |" in text
    assert "| trace | 12.3 s | 1,240 | 1 ms | 190 ms | 205 ms |" in text
    assert "Measured: interrupts 2026-11-29, gil 2026-11-30 (beside other work)." in text


def test_what_python_does_beside_the_engine_is_held(lm):
    """A planted second of Python: nearly all of the CPU time. The engine alone: less than all of it."""
    model = load(lm, "native", threads=1)

    def work():
        model.generate([5, 40, 17], max_new_tokens=4, ignore_eos=True)

    def slow():
        work()
        until = time.thread_time() + 1
        while time.thread_time() < until:
            pass

    work()
    share = contract.held(model, slow)
    assert share is not None and share > 0.9
    assert 0 < contract.held(model, lambda: model.logits([3 + i % 300 for i in range(250)])) < 0.9
    assert contract.held(load(lm, "cpu", threads=1), work) is None


# ------------------------------------------------------------------------------------------------------- in an export


@pytest.fixture
def exporting(monkeypatch, handler, tmp_path):
    """The study with a stand-in for the export: three stages of 0.6 s, the second of which blocks signals."""
    pytest.importorskip("torch", reason="the toolchain needs torch")
    from edgeformer.export import pipeline

    monkeypatch.setattr(export_interrupts, "gguf_path", lambda: tmp_path / "m.gguf")
    main = threading.main_thread().ident
    monkeypatch.setattr(export_interrupts.os, "kill", lambda pid, number: signal.pthread_kill(main, number))

    def use(leaves):
        def export(options, progress):
            for number in range(3):
                progress.stage(f"stage {number}")
                try:
                    if number == 1:
                        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGALRM})
                    time.sleep(0.6)
                    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGALRM})
                except KeyboardInterrupt:
                    if leaves:
                        (options.output.parent / "half").mkdir()
                    raise

        monkeypatch.setattr(pipeline, "export", export)

    return use


def test_a_stage_that_lets_no_interrupt_through_is_seen(exporting, monkeypatch):
    exporting(leaves=False)
    found = {row["stage"]: row for row in export_interrupts.measure()}
    assert found.keys() == {"stage 0", "stage 1", "stage 2"}
    blocked, others = found.pop("stage 1"), found.values()
    assert blocked["waits"]["longest"] > 0.3 and blocked["latency"] > 0.3  # they would be 0.55 s
    assert all(row["waits"]["count"] > 3 for row in others)


def test_an_export_that_leaves_something_is_seen(exporting):
    exporting(leaves=True)
    with pytest.raises(RuntimeError, match=r"left \['half'\]"):
        export_interrupts.measure()
