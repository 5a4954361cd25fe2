"""The parity check on the device, without torch: the bundle's own reference values against an engine.

`reference.npz` holds `input.NAME`, the outputs `bundle.NAME` that the same graph and weights gave on ONNX Runtime's
CPU at export, and the float model's own outputs `float.NAME` (of a language model both at the last positions only).
`reference.tolerance` of the manifest says for each output how far an engine may be from `bundle.NAME` (from
`float.NAME` where that is missing), as a share of the reference's range, largest minus smallest. The other one is
shown, not judged: it says what quantization cost, which the export measured.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from edgeformer.bundle import Bundle
from edgeformer.engine import Engine
from edgeformer.errors import BundleError
from edgeformer.model import EngineName, Model, load
from edgeformer.signature import IDS, PAST, POSITIONS

Array = np.ndarray[Any, Any]

ANSWER = "decoder_input_ids"  # what an encoder-decoder's reference has decoded
STEPS = (5, 1, 1, 1, 2)  # tokens a step: a prefill, decoding, a short prefill on a full cache; then what is left


@dataclass(frozen=True)
class Check:
    """One output compared with one reference, in one way of running. `worst` is a share of the reference's range."""

    output: str
    reference: str
    run: str
    worst: float
    where: tuple[int, ...]
    tolerance: float | None

    @property
    def passed(self) -> bool:
        return self.tolerance is None or self.worst <= self.tolerance  # a NaN is never <=

    def __str__(self) -> str:
        judged = (
            "not judged" if self.tolerance is None else f"{'at most' if self.passed else 'allowed'} {self.tolerance:g}"
        )
        place = f" at {list(self.where)}" if not self.passed else ""
        return f"{self.output} {self.run} against {self.reference}: {self.worst:.3g} of the range{place} ({judged})"


@dataclass(frozen=True)
class Report:
    """What `verify` found."""

    path: str
    engine: str
    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    def as_dict(self) -> dict[str, Any]:
        checks = [asdict(check) | {"passed": check.passed} for check in self.checks]
        return {"path": self.path, "engine": self.engine, "passed": self.passed, "checks": checks}


def verify(
    path: str | os.PathLike[str],
    engine: EngineName = "auto",
    threads: int | None = None,
    *,
    isa: str | None = None,
    kv: str = "float32",
    progress: Callable[[str], None] = lambda step: None,
) -> Report:
    """The reference run on this machine's engine, as a whole and step by step with the KV cache.

    All hashes are checked first. The native engine's cache is float32 unless `kv` says "int8": the reference knows no
    quantized cache, and its tolerance has no room for one where the weights are float. `progress` is told each
    step's name.

    Raises:
        BundleError: the bundle is damaged, or holds no reference that can be judged.
        EngineUnavailable: the engine cannot run here.
    """
    progress("checking hashes")
    bundle = Bundle.open(path, check="hashes")
    inputs, references, tolerance = read_reference(bundle)
    progress("loading")
    model = load(path, engine, threads, isa=isa, kv=kv)
    runs = _runs(model, inputs)
    checks = []
    for run, work in runs.items():
        progress(f"running {run}")
        outputs = work()
        for (kind, name), expected in references.items():
            if name not in outputs:
                raise BundleError(f"{bundle.path}: the reference has an output {name!r}, the graph has not.")
            judged = kind == "bundle" or ("bundle", name) not in references
            allowed = tolerance.get(name) if judged else None
            last = model.is_language_model
            checks.append(compare(name, kind, run, outputs[name], expected, allowed, last=last))
    return Report(str(bundle.path), _engine_name(model), tuple(checks))


def _runs(model: Model, inputs: dict[str, Array]) -> dict[str, Callable[[], dict[str, Array]]]:
    """The ways of running the reference's inputs, each giving the outputs by name."""
    graphs = model.bundle.manifest["graphs"]
    if "encoder" in graphs:
        if ANSWER not in inputs:
            raise BundleError(f"{model.bundle.path}: the reference has no {ANSWER}; export the model again.")
        ids, source = inputs[ANSWER], {name: value for name, value in inputs.items() if name != ANSWER}

        def answer(steps: Sequence[int]) -> dict[str, Array]:
            return {"logits": model.pair.logits(model.pair.encode(source), ids, steps)}

        return {"in one run": lambda: answer(()), "step by step": lambda: answer(STEPS)}
    runs: dict[str, Callable[[], dict[str, Array]]] = {"in one run": lambda: _whole(model.engine, inputs)}
    if any(name.startswith(PAST) for name in graphs["model"]["inputs"]) and IDS in inputs:
        runs["step by step"] = lambda: stepwise(model.engine, inputs, STEPS)
    return runs


def read_reference(bundle: Bundle) -> tuple[dict[str, Array], dict[tuple[str, str], Array], dict[str, float]]:
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
        with np.load(path, allow_pickle=False) as file:
            for key in file.files:
                kind, _, name = key.partition(".")
                if kind == "input":
                    inputs[name] = file[key]
                elif kind in ("float", "bundle"):
                    outputs[kind, name] = file[key]
                else:
                    raise BundleError(f"{path} holds {key!r}, expected input.*, float.* or bundle.*")
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        if isinstance(error, BundleError):
            raise
        raise BundleError(f"{path} cannot be read: {error}. Export or copy the bundle again.") from error
    tolerance = {name: float(value) for name, value in entry["tolerance"].items() if value is not None}
    if not inputs or not any(name in tolerance for _, name in outputs):
        raise BundleError(f"{path} holds nothing that can be judged: it needs inputs, outputs and a tolerance.")
    return inputs, outputs, tolerance


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
    wanted = expected.astype(np.float64)
    difference = np.abs(got.astype(np.float64) - wanted)
    difference[~np.isfinite(difference)] = np.inf
    where = tuple(int(i) for i in np.unravel_index(int(difference.argmax()), difference.shape))
    where = (where[0], where[1] + skipped, *where[2:]) if skipped else where
    span = float(wanted.max() - wanted.min()) or 1.0  # a constant output is compared as it is
    return Check(output, kind, run, float(difference.max()) / span, where, tolerance)


def stepwise(engine: Engine, inputs: dict[str, Array], steps: Sequence[int]) -> dict[str, Array]:
    """The outputs of running `inputs` some tokens at a time through one state, joined along the sequence axis."""
    length = inputs[IDS].shape[1]
    ends = [int(end) for end in np.cumsum(steps) if end < length] + [length]
    state, start = engine.new_state(), 0
    parts: list[dict[str, Array]] = []
    for end in ends:
        cut = {name: a[:, start:end] if name in (IDS, POSITIONS) else a for name, a in inputs.items()}
        parts += engine.forward([(cut, state)])
        start = end
    return {name: np.concatenate([part[name] for part in parts], axis=1) for name in parts[0]}


def _whole(engine: Engine, inputs: dict[str, Array]) -> dict[str, Array]:
    return engine.forward([(inputs, engine.new_state())])[0]


def _engine_name(model: Model) -> str:
    return model.engine.name
