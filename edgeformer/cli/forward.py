"""`edgeformer export` and `edgeformer train` run `python -m edgeformer.export` and `python -m edgeformer.train`."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Sequence

from edgeformer.errors import EngineUnavailable, pip_install
from edgeformer.tools.toolchain import missing_packages


def forward(command: str, arguments: Sequence[str]) -> None:
    """Run the module of `command` ("export" or "train") with these arguments; it raises SystemExit.

    Raises:
        EngineUnavailable: its packages are not installed.
    """
    missing = missing_packages(command)
    if missing:
        raise EngineUnavailable(
            f"edgeformer {command} needs {', '.join(missing)}: {pip_install(*missing)} (on a workstation; a device "
            "that only runs bundles needs none of them)."
        )
    before = sys.argv
    sys.argv = [f"edgeformer {command}", *arguments]
    try:
        runpy.run_module(f"edgeformer.{command}", run_name="__main__", alter_sys=True)
    finally:
        sys.argv = before
