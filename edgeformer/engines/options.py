"""The options that choose and configure an engine, as `load` and the command line take them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

PANEL = "Engine"  # heading of these flags in --help


def option(default: Any, help: str, **metadata: Any) -> Any:  # noqa: A002 (the name that click gives it)
    """A field of an options dataclass and its flag; `edgeformer.cli.options` lists the keys of the metadata."""
    return field(default=default, metadata={"help": help, **metadata})


@dataclass(frozen=True)
class EngineOptions:
    """Which engine runs, and how. The fields are arguments of `load`, which checks them."""

    engine: str = option("auto", "auto, cuda, native or cpu.", flags=("--engine", "-e"), metavar="NAME", panel=PANEL)
    threads: int | None = option(
        None,
        "CPU threads.",
        flags=("--threads", "-t"),
        min=1,
        max=1024,
        default_text="the physical cores",
        panel=PANEL,
    )
    isa: str | None = option(None, "Native kernels to use: avx2, ...", panel=PANEL)
    kv: str = option("auto", "Native cache: auto (as weights and export say), int8 or float32.", panel=PANEL)
    context: int | None = option(None, "Native: tokens that the cache may hold.", min=1, panel=PANEL)
    tensorrt: str | None = option(None, "CUDA: TensorRT in float32 or float16.", metavar="TYPE", panel=PANEL)

    def arguments(self) -> dict[str, Any]:
        """The fields as keyword arguments of `load`."""
        return dict(vars(self))
