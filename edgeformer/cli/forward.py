"""`edgeformer export` and `edgeformer train` run `python -m edgeformer.export` and `python -m edgeformer.train`."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Sequence
from importlib.util import find_spec

from edgeformer.errors import EngineUnavailable

NEEDS = {"export": ("torch", "transformers", "onnxscript", "onnx_ir", "onnxruntime"), "train": ("torch", "accelerate")}


def forward(half: str, arguments: Sequence[str]) -> None:
    """Run the module with these arguments; it raises SystemExit.

    Raises:
        EngineUnavailable: its packages are not installed.
    """
    missing = [name for name in NEEDS[half] if find_spec(name) is None]
    if missing:
        raise EngineUnavailable(
            f"edgeformer {half} needs {', '.join(missing)}: pip install 'edgeformer[{half}]' (on a workstation; "
            f"a device that only runs bundles does not need it)."
        )
    before = sys.argv
    sys.argv = [f"edgeformer {half}", *arguments]
    try:
        runpy.run_module(f"edgeformer.{half}", run_name="__main__", alter_sys=True)
    finally:
        sys.argv = before
