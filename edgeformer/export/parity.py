"""The gate: the written graph gives the numbers that PyTorch gives, or nothing is written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from edgeformer.errors import ParityError
from edgeformer.export.run import Graph, steps
from edgeformer.export.source import Source, run
from edgeformer.export.trace import axes

F32 = NDArray[np.float32]

# Of the reference's range. Two float32 programs that order their sums differently drift apart by about 1e-6 of it in a
# few dozen layers; a wrong mask, position or weight moves it by 1e-2 and more.
TOLERANCE = 1e-4
IN_CACHE = "in the cache"
STEPS = (5, 1, 1, 1, 2)  # a prefill, single tokens, and a pair
_SHAPES = ((1, 9), (2, 5), (2, 12), (3, 1), (1, 17))  # (first axis, all other axes)


@dataclass(frozen=True)
class Check:
    """One comparison: the largest difference as a fraction of the reference's range, and where it is."""

    name: str
    worst: float
    where: str


def compare(name: str, reference: Mapping[str, F32], found: Mapping[str, Any]) -> Check:
    """The worst difference over all outputs.

    Raises:
        ParityError: an output is missing, has another shape, or is not finite where the reference is.
    """
    worst = Check(name, 0.0, "")
    for output, expected in reference.items():
        actual = found.get(output)
        if actual is None or actual.shape != expected.shape:
            got = "nothing" if actual is None else f"shape {actual.shape}"
            raise ParityError(
                f"parity, {name}: output {output!r} has {got}, PyTorch gives shape {expected.shape}. An `if` on a size "
                "is decided once, while tracing: write what holds at every size."
            )
        if not expected.size:
            continue
        if not np.isfinite(expected).all():
            raise ParityError(f"parity, {name}: PyTorch itself gives NaN or infinity in {output!r}; check the weights.")
        span = float(expected.max() - expected.min()) or 1.0
        difference = np.abs(np.asarray(actual, np.float64) - expected) / span
        difference[np.isnan(difference)] = np.inf
        position = np.unravel_index(int(difference.argmax()), difference.shape)
        value = float(difference[position])
        if value >= worst.worst:
            where = f"{output}[{', '.join(str(int(i)) for i in position)}]"
            worst = Check(
                name, value, f"{where}: {float(actual[position]):.6g}, PyTorch {float(expected[position]):.6g}"
            )
    return worst


def gate(checks: Iterator[Check], tolerance: float = TOLERANCE) -> dict[str, Any]:
    """Runs the checks; their numbers for the manifest.

    Raises:
        ParityError: one is over the tolerance; the message says which output, position and size.
    """
    done = []
    for check in checks:
        if not check.worst <= tolerance:
            raise ParityError(
                f"parity, {check.name}: {check.where}; off by {check.worst:.2e} of the output's range, "
                f"allowed {tolerance:.0e}."
            )
        done.append(check)
    worst = max(done, key=lambda check: check.worst)
    return {
        "tolerance": tolerance,
        "worst": worst.worst,
        "where": f"{worst.name}: {worst.where}",
        "steps": [asdict(check) for check in done],
    }


def whole(source: Source, graph: Graph, count: int = 3) -> Iterator[Check]:
    """Every output at `count` shapes, all in one call.

    PyTorch's are made first, all of them: the two hold their weights in different files, and where memory has room for
    one, reading now this and now that one would fetch both anew at every turn.
    """
    done = []
    for seed, (first, other) in enumerate(_SHAPES[:count]):
        names = axes(source.inputs)
        sizes = {axis: first if index == 0 else other for index, axis in enumerate(names)}
        feeds = {value.name: value.sample(sizes, seed + index) for index, value in enumerate(source.inputs)}
        shown = ", ".join(f"{axis} {size}" for axis, size in sizes.items())
        done.append((shown, feeds, run(source, feeds)))
    for shown, feeds, reference in done:
        outputs, _ = graph({name: value.numpy() for name, value in feeds.items()})
        yield compare(shown, *(without_padding(values, feeds) for values in (reference, outputs)))


def without_padding(outputs: Mapping[str, Any], feeds: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Outputs with a row for each token are zero where the token is padding: what stands there means nothing."""
    mask = feeds.get("attention_mask")
    if mask is None:
        return dict(outputs)
    seen = mask.numpy() != 0  # [batch, sequence]

    def shown(value: Any) -> Any:
        per_token = value.ndim >= 3 and value.shape[:2] == seen.shape
        return np.where(seen.reshape(*seen.shape, *[1] * (value.ndim - 2)), value, 0) if per_token else value

    return {name: shown(value) for name, value in outputs.items()}


def stepwise(source: Source, graph: Graph, batches: tuple[int, ...] = (1, 2)) -> Iterator[Check]:
    """Logits of tokens fed through the cache in `STEPS`, against PyTorch's single forward without one."""
    done = []
    for batch in batches:
        sizes = {"batch": batch, "sequence": sum(STEPS)}
        feeds = {value.name: value.sample(sizes, 7 * batch) for value in source.inputs}
        done.append((batch, feeds["input_ids"].numpy(), run(source, feeds)))
    for batch, ids, reference in done:
        found = steps(graph, ids, STEPS)
        start = 0
        for length in STEPS:
            part = slice(start, start + length)
            name = f"batch {batch}, tokens {start} to {start + length - 1} after {start} {IN_CACHE}"
            yield compare(name, {"logits": reference["logits"][:, part]}, {"logits": found[:, part]})
            start += length


def float_checks(source: Source, path: Path, has_cache: bool) -> Iterator[Check]:
    """All checks of a float graph."""
    graph = Graph(path, mapped=True)
    yield from whole(source, graph)
    if has_cache:
        yield from stepwise(source, graph)
