"""The parity gate: a graph gives the numbers that PyTorch gives, or no bundle is written.

Here are the comparison of two sets of outputs, the tolerances, and what the checks of all kinds of models share.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
import torch

from edgeformer.bundle.signature import F32
from edgeformer.errors import ParityError
from edgeformer.export.source import Source

T = TypeVar("T")

# Fractions of the range (maximum - minimum) of PyTorch's output. Two float32 programs that order their sums differently
# differ by about 1e-6 of it after a few dozen layers; a wrong mask, position or weight changes it by 1e-2 and more.
TOLERANCE = 1e-4
# Half precision rounds at 2**-11 = 5e-4 of a value. A few hundred such roundings on the way to a logit add up as their
# square root, to about 1e-2 of the range; a wrong graph was already refused in float32.
FLOAT16_TOLERANCE = 2e-2
SHORT_PIECES = (5, 1, 1, 1, 2)  # tokens fed to a graph with a KV cache: a prefill, single tokens, and two at once
SHORTER = (267, 139, 67, 37)  # lengths of a long text; the first that the model's context allows is used
_BLOCK = 1 << 20  # elements compared at once: 8 MB in float64
_BORDERS = (129, 257, 513)  # the native KV cache grows in chunks of 128 tokens, one pass has at most 512 rows


@dataclass(frozen=True)
class Comparison:
    """The largest difference between two sets of outputs, as a fraction of the reference's range, and where it is."""

    name: str
    worst: float
    where: str


def compare_outputs(name: str, reference: Mapping[str, F32], found: Mapping[str, Any]) -> Comparison:
    """The largest difference over all outputs.

    Raises:
        ParityError: an output is missing, has another shape, or is not finite where the reference is.
    """
    worst = Comparison(name, 0.0, "")
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
        distance, place = _largest_difference(np.asarray(actual), np.asarray(expected))
        value, position = distance / span, np.unravel_index(place, expected.shape)
        if value >= worst.worst:
            where = f"{output}[{', '.join(str(int(i)) for i in position)}]"
            worst = Comparison(
                name, value, f"{where}: {float(actual[position]):.6g}, PyTorch {float(expected[position]):.6g}"
            )
    return worst


def _largest_difference(found: np.ndarray[Any, Any], expected: np.ndarray[Any, Any]) -> tuple[float, int]:
    """(the largest absolute difference, infinite where `found` is NaN; its place in the flat arrays).

    In blocks: the float64 copies stay small, and Ctrl-C comes between two of them.
    """
    found, expected = found.reshape(-1), expected.reshape(-1)
    worst, place = -1.0, 0
    for start in range(0, len(expected), _BLOCK):
        difference = np.abs(found[start : start + _BLOCK].astype(np.float64) - expected[start : start + _BLOCK])
        difference[np.isnan(difference)] = np.inf
        at = int(difference.argmax())
        if difference[at] > worst:
            worst, place = float(difference[at]), start + at
    return worst, place


def gate(comparisons: Iterator[Comparison], tolerance: float = TOLERANCE) -> dict[str, Any]:
    """Consumes the comparisons and returns their numbers for the manifest.

    Raises:
        ParityError: one is over the tolerance; the message names the output, the position and the difference.
    """
    done = []
    for found in comparisons:
        if not found.worst <= tolerance:
            raise ParityError(
                f"parity, {found.name}: {found.where}; off by {found.worst:.2e} of the output's range, "
                f"allowed {tolerance:.0e}."
            )
        done.append(found)
    worst = max(done, key=lambda found: found.worst)
    return {
        "tolerance": tolerance,
        "worst": worst.worst,
        "where": f"{worst.name}: {worst.where}",
        "steps": [asdict(found) for found in done],
    }


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
