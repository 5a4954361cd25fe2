"""The parity gate: a graph gives the numbers that PyTorch gives, or no bundle is written.

Here are the comparison of two sets of outputs, the tolerances, and what the checks of all kinds of models share.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from edgeformer.bundle.signature import F32
from edgeformer.errors import ParityError
from edgeformer.export.source import Source

T = TypeVar("T")
F64 = NDArray[np.float64]

# Fractions of the range (maximum - minimum) of PyTorch's output. Two float32 programs that order their sums differently
# differ by about 1e-6 of it after a few dozen layers; a wrong mask, position or weight changes it by 1e-2 and more.
TOLERANCE = 1e-4
SHORT_PIECES = (5, 1, 1, 1, 2)  # tokens fed to a graph with a KV cache: a prefill, single tokens, and two at once
SHORTER = (267, 139, 67, 37)  # lengths of a long text; the first that the model's context allows is used
QUANTILES = (0.5, 0.9, 0.98)  # of the rows' largest differences; see `Tolerance`
LEAST_ROWS = 100  # below, quantiles depend on single rows
_BLOCK = 1 << 20  # elements compared at once: 8 MB in float64
_BORDERS = (129, 257, 513)  # the native KV cache grows in chunks of 128 tokens, one pass has at most 512 rows


@dataclass(frozen=True)
class Comparison:
    """The largest difference between two sets of outputs, as a fraction of the reference's range, and where it is."""

    name: str
    worst: float
    where: str
    rows: tuple[F64, ...] = ()  # of each output: the largest difference of each row (of the last axis), as `worst`


def quantiles(comparisons: Sequence[Comparison]) -> dict[float, float]:
    """{q of QUANTILES: that quantile of the rows' largest differences}; empty if there are fewer than LEAST_ROWS."""
    rows = [values for found in comparisons for values in found.rows]
    if sum(map(len, rows)) < LEAST_ROWS:
        return {}
    found = np.quantile(np.concatenate(rows), QUANTILES, method="higher")
    return {q: float(value) for q, value in zip(QUANTILES, found, strict=True)}


@dataclass(frozen=True)
class Tolerance:
    """How far a graph or an engine may be from PyTorch, as fractions of an output's range.

    Where activations are rounded, a few inputs of a large model are unstable: one value that falls on the other side of
    a half changes all logits of a row. The bound of the worst value has to allow that, so it sees little else. The
    quantiles of all rows do not depend on those few: they see an error of the size of the rounding itself.
    """

    worst: float  # of any value
    rows: Mapping[float, float] = field(default_factory=dict)  # `quantiles` of the comparisons; empty: not bounded

    def __add__(self, more: Tolerance) -> Tolerance:
        """Both errors at once. A row without a bound of its own has that of the worst value."""
        rows = {q: self.rows.get(q, self.worst) + more.rows.get(q, more.worst) for q in {*self.rows, *more.rows}}
        return Tolerance(self.worst + more.worst, dict(sorted(rows.items())))


FLOAT32 = Tolerance(TOLERANCE)


def compare_outputs(name: str, reference: Mapping[str, F32], found: Mapping[str, Any]) -> Comparison:
    """The largest difference over all outputs.

    Raises:
        ParityError: an output is missing, has another shape, or is not finite where the reference is.
    """
    worst, where, rows = 0.0, "", list[F64]()
    for output, expected in reference.items():
        actual = found.get(output)
        if actual is None or actual.shape != expected.shape:
            got = "nothing" if actual is None else f"shape {actual.shape}"
            raise ParityError(
                f"parity, {name}: output {output!r} has {got}, PyTorch gives shape {expected.shape}. An `if` on a size "
                "is decided once, while tracing: write the forward so that it is right at every size."
            )
        if not expected.size:
            continue
        if not np.isfinite(expected).all():
            raise ParityError(f"parity, {name}: PyTorch itself gives NaN or infinity in {output!r}; check the weights.")
        span = float(expected.max() - expected.min()) or 1.0
        differences, places = _row_differences(np.asarray(actual), np.asarray(expected))
        rows.append(differences / span)
        row = int(rows[-1].argmax())
        if rows[-1][row] >= worst:
            position = np.unravel_index(places[row], expected.shape)
            worst, where = float(rows[-1][row]), f"{output}[{', '.join(str(int(i)) for i in position)}]"
            where += f": {float(actual[position]):.6g}, PyTorch {float(expected[position]):.6g}"
    return Comparison(name, worst, where, tuple(rows))


def _row_differences(found: np.ndarray[Any, Any], expected: np.ndarray[Any, Any]) -> tuple[F64, NDArray[np.int64]]:
    """(the largest absolute difference of each row, infinite where `found` is NaN; their places in the flat arrays).

    In blocks: the float64 copies stay small, and Ctrl-C comes between two of them.
    """
    width = expected.shape[-1] if expected.ndim > 1 else expected.size
    found, expected = found.reshape(-1, width), expected.reshape(-1, width)
    largest, places = np.empty(len(expected)), np.empty(len(expected), np.int64)
    step = max(1, _BLOCK // width)
    for start in range(0, len(expected), step):
        rows = slice(start, start + step)
        difference = np.abs(found[rows].astype(np.float64) - expected[rows])
        difference[np.isnan(difference)] = np.inf
        columns = difference.argmax(1)
        largest[rows] = difference[np.arange(len(columns)), columns]
        places[rows] = (start + np.arange(len(columns))) * width + columns
    return largest, places


def gate(comparisons: Iterator[Comparison], tolerance: Tolerance = FLOAT32) -> dict[str, Any]:
    """Consumes the comparisons and returns their numbers for the manifest.

    Raises:
        ParityError: one is over the tolerance; the message names the output, the position and the difference.
    """
    done = []
    for found in comparisons:
        if not found.worst <= tolerance.worst:
            raise ParityError(
                f"parity, {found.name}: {found.where}; off by {found.worst:.2e} of the output's range, "
                f"allowed {tolerance.worst:.0e}."
            )
        done.append(found)
    measured = quantiles(done)
    for q, bound in tolerance.rows.items():
        if q in measured and not measured[q] <= bound:
            raise ParityError(
                f"parity: {1 - q:.0%} of all rows are off by {measured[q]:.2e} of the output's range or more, "
                f"allowed {bound:.0e}."
            )
    worst = max(done, key=lambda found: found.worst)
    return {
        "tolerance": tolerance.worst,
        "worst": worst.worst,
        "where": f"{worst.name}: {worst.where}",
        **({"rows": _rows(measured, tolerance)} if tolerance.rows and measured else {}),
        "steps": [{"name": one.name, "worst": one.worst, "where": one.where} for one in done],
    }


def _rows(measured: Mapping[float, float], tolerance: Tolerance) -> list[dict[str, float]]:
    return [{"quantile": q, "worst": measured[q], "tolerance": bound} for q, bound in tolerance.rows.items()]


class Runs(Protocol):
    """A graph that can be run: a file on plain onnxruntime (`OrtGraph`), or an engine (`engine_gate.EngineRun`)."""

    def __call__(self, feeds: Mapping[str, Any], past: Any = None) -> tuple[dict[str, Any], Any]:
        """(outputs, what to pass as `past` with the tokens that follow)."""


class Expected(Protocol):
    """PyTorch's outputs for a set of inputs.

    They are computed all at once, before any is compared: PyTorch and the graph read their weights from different
    mapped files, and where memory has room for only one, alternating between them would read both from disk each time.
    """

    def against(self, graphs: Mapping[str, Runs]) -> Iterator[Comparison]:
        """Compares what the graphs {name in the bundle: graph} give for the same inputs."""

    def one_sample(self) -> Expected:
        """One short input alone: enough where only the values of the weights have changed."""

    def in_one_piece(self) -> Expected:
        """The same inputs with as few runs as possible: enough where no cache is in question."""


def at_longest(lengths: Sequence[int], source: Source, make: Callable[[int], T]) -> T | None:
    """What `make` gives for the first of `lengths` that the model can run; None if it can run none of them."""
    for length in lengths:
        if source.context is None or length <= source.context:
            try:
                return make(length)
            except (IndexError, RuntimeError, ValueError):  # a shorter table of positions that was not found
                continue
    return None


def long_pieces(length: int) -> tuple[int, ...]:
    """Sizes with the sum `length`, in which a text is fed: prefills, and single tokens across each of `_BORDERS`."""
    found: list[int] = []
    at = 0
    for border in (*(b for b in _BORDERS if b + 7 < length), length - 2):
        found += [border - 2 - at, 1, 1, 1, 1]
        at = border + 2
    return tuple(found)


def without_padding(outputs: Mapping[str, Any], feeds: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """The outputs with zeros at padding tokens, where they have a row for each token: those rows have no meaning."""
    mask = feeds.get("attention_mask")
    if mask is None:
        return dict(outputs)
    seen = mask.numpy() != 0  # [batch, sequence]

    def masked(value: Any) -> Any:
        per_token = value.ndim >= 3 and value.shape[:2] == seen.shape
        return np.where(seen.reshape(*seen.shape, *[1] * (value.ndim - 2)), value, 0) if per_token else value

    return {name: masked(value) for name, value in outputs.items()}


def unpadded(ids: torch.Tensor, source: Source) -> torch.Tensor:
    """The token ids of `source`'s first input with another id in place of the padding token."""
    padding = source.config.get("pad_token_id")
    if not isinstance(padding, int):
        return ids
    return torch.where(ids == padding, (padding + 1) % source.inputs[0].high, ids)
