"""Replays the seeds of the fuzz targets of the C++ module; kernels give the scalar table's bits on odd shapes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("edgeformer._native", reason="the native extension is not built")
from support import fuzz_all, fuzz_native, fuzz_targets


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


PLANTED = """
import ctypes, sys
planted = ctypes.CDLL(sys.argv[1]).planted
planted.argtypes = [ctypes.c_char_p, ctypes.c_size_t]
planted(b"12345678", 8)
print("not seen")
"""


@pytest.mark.parametrize("sanitized", [True, False])
def test_a_planted_write_behind_an_array_is_reported(tmp_path, sanitized):
    """As `make sanitize` runs the engine: a library built by the compiler with AddressSanitizer, loaded into Python.

    `make fuzz` does the same with clang and libFuzzer before it begins (`support.fuzz_all.missed`).
    """
    compiler = shutil.which("g++") or pytest.skip("needs g++")
    (tmp_path / "planted.cpp").write_text(fuzz_all.WRITE)
    flags = ["-fsanitize=address,undefined"] * sanitized
    library = str(tmp_path / "planted.so")
    command = [compiler, "-O1", "-g1", "-shared", "-fPIC", *flags, str(tmp_path / "planted.cpp"), "-o", library]
    subprocess.run(command, check=True, timeout=600)
    found = subprocess.run([compiler, "-print-file-name=libasan.so"], capture_output=True, text=True, check=True)
    env = {**os.environ, "LD_PRELOAD": found.stdout.strip() if sanitized else "", "ASAN_OPTIONS": "detect_leaks=0"}
    done = subprocess.run(
        [sys.executable, "-c", PLANTED, library], capture_output=True, text=True, env=env, timeout=600
    )
    assert ("heap-buffer-overflow" in done.stderr) == sanitized, done.stderr
    assert ("not seen" in done.stdout) != sanitized


def test_the_planted_defects_have_the_flags_of_the_module():
    setup = (fuzz_all.ROOT / "setup.py").read_text()
    assert all(f'"{flag}"' in setup for flag in fuzz_all.FLAGS)


def test_the_end_of_a_run_is_read():
    from support.fuzz_all import numbers

    text = "INFO: Loaded 1 modules   (47965 inline 8-bit counters): 47965 [0x7f)\n#1876\tDONE   cov: 2164 ft: 61\n"
    assert numbers(text + "stat::number_of_executed_units: 1876\n") == {"runs": 1876, "reached": 2164, "edges": 47965}
    with pytest.raises(ValueError, match="no run"):
        numbers("Segmentation fault")
