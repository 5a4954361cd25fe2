"""How cost grows with the model: the same comparison over random weights of 0.5B and 1B, `--study sizes`.

Quality is not measured: weights are noise. Each project's settings are those of the main study.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from bench.peers import models, random_models
from bench.peers.contestants import (
    GENAI,
    GENAI_INT4_HEAD,
    HERE,
    LLAMA,
    OPENVINO,
    OPENVINO_CONVERT,
    OPENVINO_INT4,
    Contestant,
)
from bench.peers.environments import Environment, SetupFailed, run
from bench.peers.random_models import Shape
from bench.peers.results import OURS

SIZES = {shape.name: shape for shape in random_models.SHAPES}
DEFAULT = "0.5B,1B"
GIB_A_BILLION = 5.0  # peak of an export for 10**9 parameters: 2.6 GiB at 0.49, 5.8 at 1.24, 13.4 at 3.21
OPENVINO_INT8 = ("--weight-format", "int8")


def available_gib() -> float:
    """Memory that a new process can have."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]) / 2**20


def bundle(shape: Shape, scheme: str, head: str | None = None, block: int | None = None) -> Path:
    """edgeformer's export of the whole model: traced, quantized, and checked against PyTorch.

    Raises:
        SetupFailed: the export failed, or needs more memory than is free. The study goes on without this file.
    """
    name, options = models.quantized(scheme, head, block)

    def make(folder: Path) -> None:
        need, there = GIB_A_BILLION * shape.parameters, available_gib()
        if need > there:
            raise SetupFailed(f"the export of {shape.name} takes about {need:.0f} GiB of memory, {there:.0f} are free")
        command = [sys.executable, "-m", "edgeformer.export", str(random_models.float_folder(shape)), "-o", str(folder)]
        command += [*options, "--tokens", "0"]
        if scheme in ("q4", "q4a"):
            command += ["--calibration", "none"]  # calibration on noise takes time and does not change the speed
        log = models.LOGS / f"edgeformer-{shape.name}-{name}.log"
        run(command, log, models.OFFLINE, f"export {name} of {shape.name}")

    return models.write_whole(shape.root / "edgeformer" / name, make)


def llama(shape: Shape, kind: str) -> Path:
    return models.gguf(LLAMA, kind, random_models.float_gguf(shape), shape.root)


def genai(shape: Shape) -> Path:
    source, options = random_models.float_folder(shape), (*GENAI_INT4_HEAD, "prune_lm_head=true")
    return models.genai(GENAI, "int4", options, name="int4", source=source, root=shape.root)


def openvino(shape: Shape, options: tuple[str, ...], name: str) -> Path:
    source = random_models.float_folder(shape)
    return models.openvino(OPENVINO_CONVERT, options, name=name, source=source, root=shape.root)


def contestants(shape: Shape) -> tuple[Contestant, ...]:
    """Who takes part at this size."""
    usual = "as in the main study"
    rows: tuple[tuple[str, str, str, Environment, Callable[[], Path], str], ...] = (
        (
            OURS,
            "q4, blocks of 64, q4 head",
            "with_edgeformer",
            HERE,
            partial(bundle, shape, "q4", "q4", 64),
            usual,
        ),
        (OURS, "q4a, int8 head", "with_edgeformer", HERE, partial(bundle, shape, "q4a"), usual),
        ("llama.cpp", "Q4_0", "with_llama", LLAMA, partial(llama, shape, "Q4_0"), usual),
        ("llama.cpp", "Q4_0, Q4_0 head", "with_llama", LLAMA, partial(llama, shape, "Q4_0-head"), usual),
        ("llama.cpp", "Q8_0", "with_llama", LLAMA, partial(llama, shape, "Q8_0"), usual),
        ("onnxruntime-genai", "int4, int4 head", "with_genai", GENAI, partial(genai, shape), usual),
        ("OpenVINO GenAI", "int4", "with_openvino", OPENVINO, partial(openvino, shape, OPENVINO_INT4, "int4"), usual),
        ("OpenVINO GenAI", "int8", "with_openvino", OPENVINO, partial(openvino, shape, OPENVINO_INT8, "int8"), usual),
    )
    needs = {OPENVINO.name: (OPENVINO_CONVERT,)}
    return tuple(Contestant(*row, needs=needs.get(row[3].name, ()), size=shape.name) for row in rows)


def chosen(sizes: str) -> tuple[Contestant, ...]:
    """Those of the sizes named, for example "0.5B,1B".

    Raises:
        SystemExit: a size is none of SIZES.
    """
    names = [name.strip() for name in sizes.split(",")]
    if unknown := [name for name in names if name not in SIZES]:
        raise SystemExit(f"no size {', '.join(unknown)}; there are {', '.join(SIZES)}")
    return tuple(c for name in names for c in contestants(SIZES[name]))
