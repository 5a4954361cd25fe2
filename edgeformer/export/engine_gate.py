"""The gate for engines: each one that is installed runs the written bundle, and its numbers are compared too."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgeformer.bundle.bundle import Bundle
from edgeformer.engines.base import Engine
from edgeformer.engines.choose import ORDER, create
from edgeformer.engines.native.options import NativeOptions
from edgeformer.errors import EngineUnavailable, ParityError, first_line
from edgeformer.export.check import parity
from edgeformer.export.check.parity import Check
from edgeformer.export.progress import Progress
from edgeformer.export.quantize.plan import Quantized
from edgeformer.machine import default_threads

# Engines round the same activations by the same rule, but float sums in another order let single values fall to the
# other side of a half, and layers amplify that. So an engine's errors are other draws of the same size. On tiny models
# the largest of thousands is the same to 5 %; on SmolLM2 in q4, with ids from both ends of its vocabulary, those of
# onnxruntime and of the native engine are 2.1 and 2.2 times those of the rounded graph. Three times is allowed.
SPREAD = 3.0

Checks = Callable[[Mapping[str, "Running"]], Iterator[Check]]


class Running:
    """An engine as `parity` runs a graph: what it returns as past is the engine's state.

    Positions, and how many logits to keep, are given to graphs that take them; an engine refuses what it does not know.
    """

    def __init__(self, engine: Engine, inputs: Collection[str]) -> None:
        self.engine = engine
        self._left_out = {"position_ids", "logits_to_keep"} - set(inputs)

    def __call__(self, feeds: Mapping[str, Any], past: Any = None) -> tuple[dict[str, Any], Any]:
        state = self.engine.new_state() if past is None else past
        given = {name: value for name, value in feeds.items() if name not in self._left_out}
        return self.engine.forward([(given, state)])[0], state


def engine_gate(
    folder: Path, content: Mapping[str, Any], checks: Checks, tolerance: float, progress: Progress
) -> dict[str, Any]:
    """What each engine gave, for the manifest: {name: {passed, tolerance, worst, where, steps}}.

    `content` is the manifest as far as it is known. An engine that cannot run here has `unavailable` with the reason;
    one whose numbers are wrong, or that fails, has `passed: false` and the `problem`: `auto` will not take it.

    Raises:
        ParityError: no engine gives the right numbers.
    """
    bundle = _unsealed(folder, content)
    found: dict[str, Any] = {}
    for name in ORDER:
        try:
            engines = create(name, bundle, default_threads(), NativeOptions(kv="float32", use_disk_cache=False))
        except EngineUnavailable as error:
            found[name] = {"passed": None, "unavailable": str(error)[:500]}
            continue
        except Exception as error:
            found[name] = _failed(f"it cannot be loaded: {_told(error)}")
            continue
        running = {g: Running(engine, content["graphs"][g]["inputs"]) for g, engine in engines.items()}
        progress.stage(f"check the engine {name} against PyTorch")
        try:
            found[name] = {"passed": True} | parity.gate(checks(running), tolerance)
        except ParityError as error:
            found[name] = _failed(str(error))
        except Exception as error:
            found[name] = _failed(f"it fails: {_told(error)}")
        del engines, running
    if not any(one["passed"] for one in found.values()):
        problems = "; ".join(f"{name}: {one.get('problem') or one.get('unavailable')}" for name, one in found.items())
        raise ParityError(f"no engine gives PyTorch's numbers for this bundle. {problems}")
    return found


def sum_roundings(weights: Sequence[Quantized]) -> tuple[bool, ...]:
    """The values of `sums` to try with `round_activations`: both only where weights have minima."""
    return (False, True) if any(w.blocks is not None and w.blocks.minimum is not None for w in weights) else (False,)


def bound(rounded: Iterator[Check], exact: float = parity.TOLERANCE) -> float:
    """How far an engine with int8 activations may be off: `SPREAD` times what their rounding alone moves the outputs
    (`rounded` compares a graph with `passes.rounding` in it to PyTorch), and what float sums may differ by.
    """
    moved = max(check.worst for check in rounded)
    return SPREAD * (moved if np.isfinite(moved) else 0.0) + exact


def _unsealed(folder: Path, content: Mapping[str, Any]) -> Bundle:
    from edgeformer.bundle.manifest import read_json

    texts = [folder / name for name in ("config.json", "generation_config.json")]
    config, generation = (read_json(path) if path.is_file() else {} for path in texts)
    return Bundle(folder, {**content, "files": {path.name: {} for path in folder.iterdir()}}, config, generation)


def _failed(problem: str) -> dict[str, Any]:
    return {"passed": False, "problem": problem}


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error)[:400]}"
