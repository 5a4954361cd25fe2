"""The options that choose and configure an engine, as `load` and the command line take them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

PANEL = "Engine"  # heading of these flags in --help


def _option(default: Any, help: str, **metadata: Any) -> Any:  # noqa: A002 (the name that click gives it)
    """A field and its flag; `edgeformer.cli.options` lists the keys of the metadata."""
    return field(default=default, metadata={"help": help, "panel": PANEL, **metadata})


@dataclass(frozen=True)
class EngineOptions:
    """Which engine runs, and how. The fields are arguments of `load`, which checks them."""

    engine: str = _option("auto", "auto, cuda, native or cpu.", flags=("--engine", "-e"), metavar="NAME")
    threads: int | None = _option(None, "Default: physical cores.", flags=("--threads", "-t"), min=1, max=1024)
    isa: str | None = _option(None, "Native kernels to use: avx2, ...")
    kv: str = _option("auto", "Native cache: auto (as the weights), int8 or float32.")
    context: int | None = _option(None, "Native: tokens that the cache may hold.", min=1)

    def arguments(self) -> dict[str, Any]:
        """The fields as keyword arguments of `load`."""
        return dict(vars(self))
