"""Replays the seeds of the fuzz targets of the C++ module; kernels give the scalar table's bits on odd shapes."""

from __future__ import annotations

import pytest

pytest.importorskip("edgeformer._native", reason="the native extension is not built")
from support import fuzz_native, fuzz_targets


@pytest.mark.parametrize("name", fuzz_native.TARGETS)
def test_the_seeds_of_a_target_give_typed_errors_or_none(name):
    for seed in fuzz_native.seeds(name):
        fuzz_targets.run(fuzz_native.TARGETS[name], seed)
