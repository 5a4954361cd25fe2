"""Compares an engine's outputs with the reference values in the bundle, without torch.

`reference.npz` holds `input.NAME`, the outputs `bundle.NAME` that the same graph and weights gave on ONNX Runtime's
CPU at export, and the float model's own outputs `float.NAME` (of a language model both at the last positions only).
`reference.tolerance` of the manifest says for each output how far an engine may be from `bundle.NAME` (from
`float.NAME` where that is missing), as a share of the reference's range, largest minus smallest. The other one is
shown but has no tolerance: it shows what quantization cost, which the export measured.
"""

from __future__ import annotations

import math
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edgeformer.bundle.bundle import Bundle
from edgeformer.bundle.signature import IDS, PAST, Array
from edgeformer.engines.base import Engine
from edgeformer.engines.feed import encode_source, feed, joined
from edgeformer.errors import BundleError

ANSWER = "decoder_input_ids"  # the decoder's input in the reference of an encoder-decoder
LARGEST = 1 << 28  # bytes of all arrays of a reference: one run of the model on a few tokens
STEPS = (5, 1, 1, 1, 2)  # tokens a step: a prefill, decoding, a short prefill on a full cache; then what is left


# (inputs by name, expected outputs by (kind, name), tolerances by output)
Reference = tuple[dict[str, Array], dict[tuple[str, str], Array], dict[str, float]]


@dataclass(frozen=True)
class Check:
    """One output of one run compared with one reference. `worst` is the largest difference / range of the reference."""

    output: str
    reference: str
    run: str
    worst: float
    where: tuple[int, ...]
    tolerance: float | None

    @property
    def passed(self) -> bool:
        """Whether the difference is within the tolerance, or has none."""
        return self.tolerance is None or self.worst <= self.tolerance  # a NaN is never <=

    def __str__(self) -> str:
        verdict = (
            "no tolerance"
            if self.tolerance is None
            else f"{'at most' if self.passed else 'allowed'} {self.tolerance:g}"
        )
        place = f" at {list(self.where)}" if not self.passed else ""
        return f"{self.output} {self.run} against {self.reference}: {self.worst:.3g} of the range{place} ({verdict})"


def checks(
    bundle: Bundle, engines: Mapping[str, Engine], progress: Callable[[str], None] = lambda _: None
) -> Iterator[Check]:
    """The comparisons of every output: of the reference's inputs in one run, and step by step with a KV cache.

    `engines` has one for each graph of the bundle, as `choose` gives them. `progress` is called with each run's name.

    Raises:
        BundleError: there is no reference, it is damaged, or it does not fit the graph.
    """
    reference = read_reference(bundle)
    yield from compared(bundle, reference, outputs(bundle, engines, reference[0], progress))


def outputs(
    bundle: Bundle, engines: Mapping[str, Engine], inputs: dict[str, Array], progress: Callable[[str], None]
) -> Iterator[tuple[str, dict[str, Array]]]:
    """(run, outputs by name): the reference's inputs in one run, and step by step with a KV cache."""
    for run, work in _runs(bundle, engines, inputs).items():
        progress(f"running {run}")
        yield run, work()


def compared(bundle: Bundle, reference: Reference, found: Iterable[tuple[str, dict[str, Array]]]) -> Iterator[Check]:
    """The comparisons of what `outputs` gives.

    Raises:
        BundleError: the reference does not fit the graph.
    """
    _, references, tolerance = reference
    last = bundle.task == "text-generation"
    for run, arrays in found:
        for (kind, name), expected in references.items():
            if name not in arrays:
                raise BundleError(f"{bundle.path}: the reference has an output {name!r} that the graph does not have.")
            judged = kind == "bundle" or ("bundle", name) not in references
            allowed = tolerance.get(name) if judged else None
            yield compare(name, kind, run, arrays[name], expected, allowed, last=last)


def _runs(
    bundle: Bundle, engines: Mapping[str, Engine], inputs: dict[str, Array]
) -> dict[str, Callable[[], dict[str, Array]]]:
    """The runs of the reference's inputs by name; each returns the outputs by name."""
    if "encoder" in engines:
        if ANSWER not in inputs:
            raise BundleError(f"{bundle.path}: the reference has no {ANSWER}; export the model again.")
        ids, source = inputs[ANSWER], {name: value for name, value in inputs.items() if name != ANSWER}

        def answer(steps: Sequence[int]) -> dict[str, Array]:
            static = encode_source(bundle, engines["encoder"], source)
            decoder = engines["decoder"]
            return joined(feed(decoder, decoder.new_state(static), {IDS: ids}, chunk=None, steps=steps))

        return {"in one run": lambda: answer(()), "step by step": lambda: answer(STEPS)}
    engine = engines["model"]
    runs: dict[str, Callable[[], dict[str, Array]]] = {
        "in one run": lambda: engine.forward([(inputs, engine.new_state())])[0]
    }
    if any(name.startswith(PAST) for name in bundle.manifest["graphs"]["model"]["inputs"]) and IDS in inputs:
        runs["step by step"] = lambda: joined(feed(engine, engine.new_state(), inputs, chunk=None, steps=STEPS))
    return runs


def read_reference(bundle: Bundle) -> Reference:
    """(inputs by name, expected outputs by (kind, name), tolerances by output) of the bundle's reference file.

    Raises:
        BundleError: there is none, it is damaged, or none of its outputs has a tolerance.
    """
    entry = bundle.manifest["reference"]
    if entry is None:
        raise BundleError(f"{bundle.path} holds no reference values, so nothing can be verified; export it again.")
    path = bundle.path / entry["file"]
    inputs: dict[str, Array] = {}
    outputs: dict[tuple[str, str], Array] = {}
    try:
        for key, array in _arrays(path):
            kind, _, name = key.partition(".")
            if kind == "input":
                inputs[name] = array
            elif kind in ("float", "bundle"):
                outputs[kind, name] = array
            else:
                raise BundleError(f"{path} holds {key!r}, expected input.*, float.* or bundle.*")
    except BundleError:
        raise
    except Exception as error:  # zipfile, zlib and numpy raise a dozen classes for damaged files
        raise BundleError(f"{path} cannot be read: {error}. Export or copy the bundle again.") from error
    tolerance = {name: float(value) for name, value in entry["tolerance"].items() if value is not None}
    if not inputs or not any(name in tolerance for _, name in outputs):
        raise BundleError(f"{path} holds nothing to compare: it needs inputs, outputs and a tolerance.")
    return inputs, outputs, tolerance


def _arrays(path: Path) -> Iterator[tuple[str, Array]]:
    """The names and arrays of an .npz file. The size of each is known before memory for it is taken.

    Raises:
        BundleError: the file is larger than any reference, unpacked, or an array has another size than its header says.
    """
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        total = sum(member.file_size for member in members)
        if total > LARGEST:
            raise BundleError(f"{path} unpacks to {total:,} bytes, expected at most {LARGEST:,}.")
        for member in members:
            with archive.open(member) as file:
                start = np.lib.format.read_magic(file)
                header = np.lib.format.read_array_header_1_0 if start == (1, 0) else np.lib.format.read_array_header_2_0
                shape, fortran, dtype = header(file)
                data = file.read(LARGEST)
            if dtype.hasobject or min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != len(data):
                raise BundleError(
                    f"{path}: {member.filename} has {len(data):,} bytes of data for {dtype}{list(shape)}; "
                    "export or copy the bundle again."
                )
            array: Array = np.frombuffer(data, dtype).reshape(shape, order="F" if fortran else "C")
            yield member.filename.removesuffix(".npy"), array


_BLOCK = 1 << 18  # values compared at once: float64 copies of all logits would be the peak of a load's memory


def compare(
    output: str, kind: str, run: str, got: Array, expected: Array, tolerance: float | None, *, last: bool = False
) -> Check:
    """The largest difference as a share of the reference's range; infinite for another shape, NaN or infinity.

    With `last` a reference that holds fewer positions (axis 1) holds the last ones.
    """
    skipped = max(0, got.shape[1] - expected.shape[1]) if last and got.ndim == expected.ndim == 3 else 0
    got = got[:, skipped:] if skipped else got
    if got.shape != expected.shape:
        return Check(
            output, kind, f"{run} (shape {list(got.shape)}, not {list(expected.shape)})", np.inf, (), tolerance
        )
    worst, at, lowest, highest = 0.0, 0, np.inf, -np.inf
    flat, wanted = got.reshape(-1), expected.reshape(-1)
    for begin in range(0, wanted.size, _BLOCK):
        block = wanted[begin : begin + _BLOCK].astype(np.float64)
        difference = np.abs(flat[begin : begin + _BLOCK].astype(np.float64) - block)
        difference[~np.isfinite(difference)] = np.inf
        lowest, highest = min(lowest, float(block.min())), max(highest, float(block.max()))
        place = int(difference.argmax())
        if difference[place] > worst:
            worst, at = float(difference[place]), begin + place
    where = tuple(int(i) for i in np.unravel_index(at, got.shape))
    where = (where[0], where[1] + skipped, *where[2:]) if skipped else where
    span = highest - lowest or 1.0  # a constant output is compared as it is
    return Check(output, kind, run, worst / span, where, tolerance)
