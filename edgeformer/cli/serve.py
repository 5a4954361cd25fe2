"""`edgeformer serve`: models over HTTP."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from edgeformer.engines.options import EngineOptions
from edgeformer.errors import InputError, pip_install

if TYPE_CHECKING:
    from edgeformer.server.options import ServeOptions


def serve(bundles: Sequence[str], options: ServeOptions, engine: EngineOptions) -> None:
    """Serve the bundles until the process is told to end.

    Raises:
        InputError: an option is wrong, or a package of the server is missing.
    """
    try:
        from edgeformer.server import run
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("edgeformer"):
            raise
        needed = pip_install("starlette", "uvicorn", "msgspec", "prometheus-client")
        raise InputError(f"The server needs {error.name}: {needed}") from error
    run.serve(bundles, options, engine.arguments())
