"""How cost grows with the model: the same comparison over random weights of 0.5B and 1B, `--study sizes`.

There is no quality here: weights are noise. Each project's settings are those of the main study.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from bench.peers import models, pages, random_models
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
from bench.report import table

SIZES = {shape.name: shape for shape in random_models.SHAPES}
DEFAULT = "0.5B,1B"
TESTS = {"decode": "decode", "prefill128": "prefill 128", "prefill512": "prefill 512", "first": "first token, s"}
GIB_A_BILLION = 5.0  # peak of an export for 10**9 parameters: 2.6 GiB at 0.49, 5.8 at 1.24, 13.4 at 3.21
OPENVINO_INT8 = ("--weight-format", "int8")
TARGET = 0.85  # share of the memory limit that decoding should reach from 1B on


def available_gib() -> float:
    """Memory that a new process can have."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]) / 2**20


def bundle(shape: Shape, scheme: str, head: str | None = None, block: int | None = None) -> Path:
    """edgeformer's export of the whole model: traced, quantized, and checked against PyTorch, like everybody's.

    Raises:
        SetupFailed: the export failed, or wants more memory than is free. Nothing else is then stopped for it.
    """
    name, options = models.quantized(scheme, head, block)

    def make(folder: Path) -> None:
        need, there = GIB_A_BILLION * shape.parameters, available_gib()
        if need > there:
            raise SetupFailed(f"the export of {shape.name} takes about {need:.0f} GiB of memory, {there:.0f} are free")
        command = [sys.executable, "-m", "edgeformer.export", str(random_models.float_folder(shape)), "-o", str(folder)]
        command += [*options, "--tokens", "0"]
        if scheme in ("q4", "q4a"):
            command += ["--calibration", "none"]  # fitting noise takes its time and changes no speed
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
            pages.OURS,
            "q4, blocks of 64, q4 head",
            "with_edgeformer",
            HERE,
            partial(bundle, shape, "q4", "q4", 64),
            usual,
        ),
        (pages.OURS, "q4a, int8 head", "with_edgeformer", HERE, partial(bundle, shape, "q4a"), usual),
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


def share(saved: dict[str, Any], key: str, threads: int) -> float | None:
    """Decoding's share of what reading the weights alone would allow."""
    reached, bound = median(saved, key, threads, "decode"), pages.limit(saved, key, threads)
    return reached / bound if reached and bound else None


def median(saved: dict[str, Any], key: str, threads: int, test: str) -> float | None:
    found: float | None = saved["measured"].get(key, {}).get(str(threads), {}).get(test, {}).get("median")
    return found


def best_peer(saved: dict[str, Any], size: str, threads: int, test: str) -> tuple[str, float] | None:
    """(the fastest peer of a size, its number)."""
    keys = [k for k, c in saved["contestants"].items() if c["size"] == size and c["project"] != pages.OURS]
    found = [(key, value) for key in keys if (value := median(saved, key, threads, test))]
    if not found:
        return None
    return (min if test == "first" else max)(found, key=lambda pair: pair[1])


def size_table(saved: dict[str, Any], size: str) -> str:
    order = sorted(saved["threads"], reverse=True)
    rows = []
    for key, about in saved["contestants"].items():
        if about["size"] != size or key not in saved["measured"]:
            continue
        cells = [_both([median(saved, key, t, test) for t in order], 2 if test == "first" else 0) for test in TESTS]
        shares = [f"{found:.0%}" for t in order if (found := share(saved, key, t)) is not None]
        cells.insert(1, shares[0] + (f" ({shares[1]})" if len(shares) > 1 else "") if shares else "")
        cells += [pages.number(median(saved, key, order[0], name), digits) for name, digits in _PROCESS]
        shown = f"{about['project']} {about['name']}"
        shown = f"**{shown}**" if about["project"] == pages.OURS else shown
        rows.append([shown, pages.number(about["token_bytes"] / 1e6, 0), *cells])
    heads = list(TESTS.values())
    return table(["", "MB a token", heads[0], "of the memory limit", *heads[1:], "load, s", "peak MiB"], rows)


_PROCESS = (("load_s", 1), ("peak_mib", 0))


def _both(values: list[float | None], digits: int) -> str:
    most, *rest = [pages.number(value, digits) for value in values]
    return most + (f" ({rest[0]})" if rest and rest[0] else "")


def ratio_table(saved: dict[str, Any], sizes: list[str]) -> str:
    """edgeformer's files over the fastest peer, each test and number of threads."""
    order, rows = sorted(saved["threads"], reverse=True), []
    for key, about in saved["contestants"].items():
        if about["project"] != pages.OURS or about["size"] not in sizes or key not in saved["measured"]:
            continue
        cells = []
        for test in TESTS:
            parts = []
            for threads in order:
                own, best = median(saved, key, threads, test), best_peer(saved, about["size"], threads, test)
                if own and best:
                    parts.append(f"x {best[1] / own if test == 'first' else own / best[1]:.2f}")
            cells.append(parts[0] + (f" ({parts[1]})" if len(parts) > 1 else "") if parts else "")
        rows.append([key, *cells])
    return table(["over the fastest peer", *TESTS.values()], rows)


def text(saved: dict[str, Any], images: Path) -> str:
    """The block of docs/performance.md; draws the plot into `images`."""
    from bench.peers import plots

    sizes = list(dict.fromkeys(about["size"] for about in saved["contestants"].values()))
    parts = [pages.conditions(saved), "Tokens a second; 2 threads (1 thread)."]
    for size in sizes:
        shape = SIZES[size]
        parts += [f"### {size}: {shape.parameters:.2f}B parameters, the shape of {shape.of}", size_table(saved, size)]
    reached = [
        f"{key} {found:.0%}"
        for key, about in saved["contestants"].items()
        if about["project"] == pages.OURS and SIZES[about["size"]].parameters >= 1
        if (found := share(saved, key, max(saved["threads"])))
    ]
    if reached:
        parts.append(f"Of the memory limit from 1B on ({TARGET:.0%} is asked for): {', '.join(reached)}.")
    images.mkdir(parents=True, exist_ok=True)
    path = plots.sizes(saved, images / "peers-sizes.png", {name: SIZES[name].parameters for name in sizes})
    parts += [ratio_table(saved, sizes), f"![Speed against model size](images/{path.name})"]
    parts += [f"{key} is absent: {reason}" for key, reason in saved["absent"].items()]
    return "\n\n".join(parts)
