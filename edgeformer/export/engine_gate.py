"""The parity gate for engines: each one that is installed runs the written bundle and is compared with PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from edgeformer.bundle.bundle import Bundle
from edgeformer.bundle.manifest import read_json
from edgeformer.engines.base import Engine
from edgeformer.engines.choose import ORDER, create
from edgeformer.engines.native.options import NativeOptions
from edgeformer.errors import EngineUnavailable, ParityError, first_line
from edgeformer.export.check import parity
from edgeformer.export.check.graph_run import open_graphs
from edgeformer.export.passes.float16 import round_to_float16
from edgeformer.export.passes.rounding import round_activations
from edgeformer.export.progress import Progress
from edgeformer.export.quantize.weights import QuantizedWeight
from edgeformer.export.write import save_models

# Engines round the same activations by the same rule. But float sums in another order change on which side of a half
# single values lie, and later layers amplify that: the errors of two engines are two draws of the same distribution.
# Its quantiles over many rows agree: on SmolLM2 in q8, q4a and its GGUF's blocks those of onnxruntime and the native
# engine are 0.9 to 1.25 times those of the rounded graph. Twice is allowed (ROWS). Its largest value is that of the
# least stable row, 0.3 to 2.9 times: five times is allowed (WORST). With few rows it is the only bound (WORST_OF_FEW);
# on tiny models the largest of thousands of errors agrees to 5 %.
ROWS, WORST, WORST_OF_FEW = 2.0, 5.0, 3.0
# A float16 graph that rounds after every operator has about the largest error that an engine may have. The native one
# and onnxruntime's CPU provider compute in float32 and round less: 0.5 to 1 times its change on tiny models, 0.7 on
# SmolLM2. An engine that also sums in half precision adds as many roundings again; CUDA is not measured, so it is four.
FLOAT16 = 4.0


class EngineRun:
    """An engine as `parity` runs a graph (`parity.Runs`): its `past` is the engine's state.

    `position_ids` and `logits_to_keep` are passed only to graphs that have them: engines refuse unknown inputs.
    """

    def __init__(self, engine: Engine, inputs: Collection[str]) -> None:
        self.engine = engine
        self._left_out = {"position_ids", "logits_to_keep"} - set(inputs)

    def __call__(self, feeds: Mapping[str, Any], past: Any = None) -> tuple[dict[str, Any], Any]:
        """(outputs, the state after `feeds`); a new state without `past`."""
        state = self.engine.new_state() if past is None else past
        given = {name: value for name, value in feeds.items() if name not in self._left_out}
        return self.engine.forward([(given, state)])[0], state


def engine_gate(
    folder: Path, content: Mapping[str, Any], expected: parity.Expected, tolerance: parity.Tolerance, progress: Progress
) -> dict[str, Any]:
    """The result of each engine, for the manifest: {name: {passed, tolerance, worst, where, rows, steps}}.

    `content` is the manifest without the engines' results. An engine that cannot run on this machine has `unavailable`
    with the reason; one that fails or gives wrong numbers has `passed: false` and the `problem`: `auto` skips it.

    Raises:
        ParityError: no engine gives the right numbers.
    """
    bundle = _unsealed(folder, content)
    found: dict[str, Any] = {}
    for name in ORDER:
        try:
            engines = create(name, bundle, None, NativeOptions(kv="float32", use_disk_cache=False))
        except EngineUnavailable as error:
            found[name] = {"passed": None, "unavailable": str(error)[:500]}
            continue
        except Exception as error:
            found[name] = _failed(f"it cannot be loaded: {_summary(error)}")
            continue
        runs = {g: EngineRun(engine, content["graphs"][g]["inputs"]) for g, engine in engines.items()}
        progress.stage(f"check the engine {name} against PyTorch")
        try:
            found[name] = {"passed": True} | parity.gate(expected.against(runs), tolerance)
        except ParityError as error:
            found[name] = _failed(str(error))
        except Exception as error:
            found[name] = _failed(f"it fails: {_summary(error)}")
        del engines, runs
    if not any(one["passed"] for one in found.values()):
        problems = "; ".join(f"{name}: {one.get('problem') or one.get('unavailable')}" for name, one in found.items())
        raise ParityError(f"no engine gives PyTorch's numbers for this bundle. {problems}")
    return found


def engine_tolerance(
    models: Mapping[str, ir.Model],
    weights: Sequence[QuantizedWeight],
    block: int,
    expected: parity.Expected,
    scratch: Path,
) -> parity.Tolerance:
    """How much an engine with int8 activations may differ from PyTorch with the dequantized weights.

    It is ROWS, WORST or WORST_OF_FEW times the change that rounding the activations alone makes to the outputs, and
    parity.TOLERANCE for float sums in another order. The change is that of the quantized graph with
    `round_activations`, on onnxruntime. Rows are rounded one by one, so a text that is fed in pieces changes as the
    same text in one piece, which takes a fifth of the runs.
    """
    # Whether sums over a block are rounded too differs between engines. Only weights with minima need them: try both.
    minima = any(weight.blocks is not None and weight.blocks.minimum is not None for weight in weights)
    changes = [
        _changes(models, expected, scratch, partial(round_activations, block=max(32, block), sums=sums))
        for sums in ((False, True) if minima else (False,))
    ]
    rows = [parity.quantiles(each) for each in changes]
    worst = _worst(found for each in changes for found in each)
    bounds = {q: ROWS * _finite(max(each[q] for each in rows)) for q in rows[0]}
    return parity.Tolerance((WORST if bounds else WORST_OF_FEW) * worst, bounds) + parity.FLOAT32


def float16_tolerance(models: Mapping[str, ir.Model], expected: parity.Expected, scratch: Path) -> parity.Tolerance:
    """How much more a float16 graph may differ from PyTorch in float32.

    It is FLOAT16 times the change that rounding every value to float16 makes to the outputs of the float32 graphs.
    """
    changes = _changes(models, expected, scratch, round_to_float16)
    rows = parity.quantiles(changes)
    return parity.Tolerance(FLOAT16 * _worst(changes), {q: FLOAT16 * _finite(change) for q, change in rows.items()})


def _worst(changes: Iterable[parity.Comparison]) -> float:
    return _finite(max(found.worst for found in changes))


def _finite(change: float) -> float:
    return change if np.isfinite(change) else 0.0


def _changes(
    models: Mapping[str, ir.Model], expected: parity.Expected, scratch: Path, rounding: Callable[[ir.Model], object]
) -> list[parity.Comparison]:
    """Compares copies of the graphs that `rounding` has changed with PyTorch; each operator is run as written."""
    folder = scratch / "rounded"
    copies = {name: model.clone() for name, model in models.items()}
    for copy in copies.values():
        rounding(copy)
    save_models(copies, folder)
    return list(expected.in_one_piece().against(open_graphs(folder, copies, optimized=False)))


def _unsealed(folder: Path, content: Mapping[str, Any]) -> Bundle:
    """The bundle in `folder` before its manifest is written."""
    texts = [folder / name for name in ("config.json", "generation_config.json")]
    config, generation = (read_json(path) if path.is_file() else {} for path in texts)
    return Bundle(folder, {**content, "files": {path.name: {} for path in folder.iterdir()}}, config, generation)


def _failed(problem: str) -> dict[str, Any]:
    return {"passed": False, "problem": problem}


def _summary(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error)[:400]}"
