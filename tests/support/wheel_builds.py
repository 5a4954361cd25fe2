"""Wheels of other systems for the tests that run them: built by zig, or around an extension that was built before."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from wheels.build import ROOT, build_extensions
from wheels.pack import platform_wheel, pure_wheel
from wheels.targets import Target

TIMEOUT = 3600  # seconds: compiling stands before the first test, on a machine that may be busy


def wanted() -> None:
    """Skips unless these tests were asked for: `.ci/run` and `make check-wheels` do that."""
    if os.environ.get("EDGEFORMER_TEST_WHEELS", "0") in ("", "0"):
        pytest.skip("builds a wheel with zig, minutes; say make check-wheels, or set EDGEFORMER_TEST_WHEELS=1")


def missing(told: str) -> None:
    """Skips with the reason; in CI, fails."""
    pytest.fail(told) if os.environ.get("CI") else pytest.skip(told)


def built_wheel(target: Target, python: str, folder: Path) -> Path:
    """The wheel in `folder`. EDGEFORMER_EXTENSION_<TARGET> may name the extension; else zig builds it."""
    place, given = ROOT / "build" / "wheels", os.environ.get(f"EDGEFORMER_EXTENSION_{target.name.upper()}")
    # beside another process of `pytest -n` there is one core for this
    jobs = 1 if "PYTEST_XDIST_WORKER" in os.environ else os.cpu_count() or 1
    extension = Path(given) if given else build_extensions(target, [python], place, jobs)[python]
    folder.mkdir(exist_ok=True, parents=True)
    return platform_wheel(pure_wheel(place / "pure"), extension, target, python, folder)
