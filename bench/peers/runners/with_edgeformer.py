"""edgeformer on its native engine, through the engine's own call and an argmax; `stream` is the public token loop.

Options: engine, kv, loop ("engine", "stream" or "scheduler"), speculation (of the scheduler).
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

package: Any = None


def load_library() -> None:
    global package
    sys.path.insert(0, str(Path(__file__).resolve().parents[3]))
    import edgeformer
    from edgeformer import load  # noqa: F401  its modules: a library's import is not its load

    package = edgeformer


def versions() -> dict[str, str]:
    return {"edgeformer": package.__version__, "isa": os.environ.get("EDGEFORMER_ISA", "") or _best_isa()}


def _best_isa() -> str:
    from edgeformer import _native

    return str(_native.isas()[0])


class Loaded:
    def __init__(self, file: str, threads: int, options: dict[str, Any], context: int) -> None:
        engine, kv = options.get("engine", "native"), options.get("kv", "int8")
        self._model = package.load(file, engine=engine, threads=threads, kv=kv, context=context)
        self._stream = options.get("loop") == "stream"
        self._speculation = options.get("speculation", "off")

    def _step(self, states: Sequence[Any], ids: Sequence[Sequence[int]]) -> Any:
        one = np.array(1, np.int64)
        pairs = [
            ({"input_ids": np.array([row], np.int64), "logits_to_keep": one}, state)
            for row, state in zip(ids, states, strict=True)
        ]
        return [int(out["logits"][0, -1].argmax()) for out in self._model.engine.forward(pairs)]

    def generate(self, prompts: Sequence[Sequence[int]], new: int) -> tuple[list[float], list[int]]:
        if self._stream:
            return self._generate_stream(prompts, new)
        states = [self._model.engine.new_state() for _ in prompts]
        rows: Sequence[Sequence[int]] = prompts
        times, tokens = [], []
        for _ in range(new):
            chosen = self._step(states, rows)
            times.append(time.perf_counter())
            tokens.append(chosen[0])
            rows = [[token] for token in chosen]
        return times, tokens

    def _generate_stream(self, prompts: Sequence[Sequence[int]], new: int) -> tuple[list[float], list[int]]:
        if len(prompts) > 1:
            raise NotImplementedError("model.stream generates one text")
        times, tokens = [], []
        for piece in self._model.stream(list(prompts[0]), max_new_tokens=new, ignore_eos=True, temperature=0.0):
            if piece.id is not None:
                times.append(time.perf_counter())
                tokens.append(piece.id)
        return times, tokens

    def answer(self, prompts: Sequence[Sequence[int]], new: int) -> tuple[list[float], list[list[int]]]:
        times, tokens = [], []
        # As generate() runs a list: nobody watches. OpenVINO runs up to 2,048 rows of prompts a step, too.
        with self._model.scheduler(max_sequences=len(prompts), stretch=None) as scheduler:
            settings = {"max_new_tokens": new, "ignore_eos": True, "temperature": 0.0, "speculation": self._speculation}
            added = [(time.perf_counter(), scheduler.add(list(ids), **settings)) for ids in prompts]
            for began, answer in added:
                result = answer.result()
                times.append(began + result.timings.queue_seconds + result.timings.first_token_seconds)
                tokens.append(list(result.ids))
        return times, tokens

    def logits(self, ids: Sequence[int]) -> Any:
        return self._model.logits(list(ids))
