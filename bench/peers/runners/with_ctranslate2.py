"""CTranslate2 through its Generator; a callback sees every step."""

from __future__ import annotations

import time
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import numpy as np

package: Any = None


def load_library() -> None:
    global package
    import ctranslate2

    package = ctranslate2


def versions() -> dict[str, str]:
    return {"ctranslate2": version("ctranslate2")}


class Loaded:
    def __init__(self, file: str, threads: int, options: dict[str, Any], context: int) -> None:
        kind = options.get("compute_type", "default")
        self._model = package.Generator(file, intra_threads=threads, inter_threads=1, compute_type=kind)
        with open(f"{file}/vocabulary.json", encoding="utf-8") as text:
            import json

            self._words: list[str] = json.load(text)

    def generate(self, prompts: Sequence[Sequence[int]], new: int) -> tuple[list[float], list[int]]:
        times: dict[int, float] = {}

        def clock(step: Any) -> bool:
            times[step.step] = time.perf_counter()  # the last sequence of a step counts
            return False

        results = self._model.generate_batch(
            [[self._words[i] for i in ids] for ids in prompts],
            max_length=new,
            min_length=new,
            sampling_topk=1,
            include_prompt_in_result=False,
            cache_static_prompt=False,
            end_token=[],
            callback=clock,
        )
        return [times[step] for step in sorted(times)], list(results[0].sequences_ids[0])

    def logits(self, ids: Sequence[int]) -> Any:
        words = [[self._words[i] for i in ids]]
        return np.array(self._model.forward_batch(words).to_device(package.Device.cpu))[0]
