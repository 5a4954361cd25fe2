"""The native engine: lowers a bundle's graph to a short program of fused kernels and runs it in C++."""

from __future__ import annotations

from os import PathLike
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from edgeformer.engines.native.engine import Memory, NativeEngine, NativeState

__all__ = ["Memory", "NativeEngine", "NativeState", "describe"]


def describe(bundle_path: str | PathLike[str], graph: str = "model") -> str:
    """The lowered program of a bundle's `graph` (or of an .onnx file) as text, one operation a line: what the native
    engine runs.

    Raises:
        EngineUnavailable: some nodes cannot be lowered; the message names all of them.
        BundleError: the graph cannot be read.
    """
    from edgeformer.engines.native.engine import _graph_path
    from edgeformer.engines.native.program.lowering import lower_bundle
    from edgeformer.engines.native.program.program import describe

    program, _ = lower_bundle(_graph_path(bundle_path, graph)[0])
    return describe(program)


def __getattr__(name: str) -> object:
    if name in ("Memory", "NativeEngine", "NativeState"):
        from edgeformer.engines.native import engine

        return getattr(engine, name)
    raise AttributeError(name)
