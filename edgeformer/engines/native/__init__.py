"""The native engine: lowers a bundle's graph to a short program of fused kernels and runs it in C++."""

from __future__ import annotations

from os import PathLike
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from edgeformer.engines.native.engine import Memory, NativeEngine, NativeState
    from edgeformer.engines.native.options import NativeOptions

__all__ = ["Memory", "NativeEngine", "NativeOptions", "NativeState", "describe"]


def describe(bundle_path: str | PathLike[str], graph: str = "model") -> str:
    """The program that the native engine runs for a bundle's `graph` (or an .onnx file), one operation a line.

    Raises:
        EngineUnavailable: some nodes cannot be lowered; the message names all of them.
        BundleError: the graph cannot be read.
    """
    from edgeformer.engines.native.engine import graph_file
    from edgeformer.engines.native.program.lowering import lower_bundle
    from edgeformer.engines.native.program.program import describe

    program, _ = lower_bundle(graph_file(bundle_path, graph)[0])
    return describe(program)


def __getattr__(name: str) -> object:
    if name in ("Memory", "NativeEngine", "NativeOptions", "NativeState"):
        from edgeformer.engines.native import engine

        return getattr(engine, name)
    raise AttributeError(name)
