"""Replays the seeds of the fuzz targets of the C++ module; kernels give the scalar table's bits on odd shapes."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("edgeformer._native", reason="the native extension is not built")
from support import fuzz_native, fuzz_targets


@pytest.mark.parametrize("name", fuzz_native.TARGETS)
def test_the_seeds_of_a_target_give_typed_errors_or_none(name):
    for seed in fuzz_native.seeds(name):
        fuzz_targets.run(fuzz_native.TARGETS[name], seed)


def test_kernels_that_give_other_bits_are_a_finding(monkeypatch):
    """The last bit of one value, in one of two tables."""

    def case(_):
        results = iter([np.ones(3, np.float32), np.array([1, 1, np.nextafter(np.float32(1), 2)], np.float32)])
        return lambda table: next(results)

    monkeypatch.setattr(fuzz_native, "CASES", (case,))
    with pytest.raises(AssertionError):
        fuzz_targets.run(fuzz_native.kernels, b"")


def test_the_end_of_a_run_is_read():
    from support.fuzz_all import numbers

    text = "INFO: Loaded 1 modules   (47965 inline 8-bit counters): 47965 [0x7f)\n#1876\tDONE   cov: 2164 ft: 61\n"
    assert numbers(text + "stat::number_of_executed_units: 1876\n") == {"runs": 1876, "reached": 2164, "edges": 47965}
    with pytest.raises(ValueError, match="no run"):
        numbers("Segmentation fault")
