"""onnxruntime-genai through its Generator.

Options: session (session options that its genai_config.json takes, beside the number of threads).
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import numpy as np

og: Any = None
PAD = 2  # the model's pad token, as in its genai_config.json


def load_library() -> None:
    global og
    import onnxruntime_genai

    og = onnxruntime_genai


def versions() -> dict[str, str]:
    return {name: version(name) for name in ("onnxruntime-genai", "onnxruntime")}


class Loaded:
    def __init__(self, file: str, threads: int, options: dict[str, Any], context: int) -> None:
        config = og.Config(file)
        session = {"intra_op_num_threads": threads, "inter_op_num_threads": 1, **options.get("session", {})}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": session}}}))
        self._model = og.Model(config)

    def _generator(self, sequences: int, length: int, least: int) -> Any:
        params = og.GeneratorParams(self._model)
        params.set_search_options(do_sample=False, batch_size=sequences, max_length=length, min_length=least)
        return og.Generator(self._model, params)

    def generate(self, prompts: Sequence[Sequence[int]], new: int) -> tuple[list[float], list[int]]:
        total = max(map(len, prompts)) + new
        # max_length is what its caches are allocated for; min_length keeps the end token from ending a sequence
        generator = self._generator(len(prompts), total, total)
        generator.append_tokens(np.array(prompts, np.int32))
        times = []
        for _ in range(new):
            generator.generate_next_token()
            times.append(time.perf_counter())
        return times, [int(t) for t in generator.get_sequence(0)[len(prompts[0]) :]]

    def answer(self, prompts: Sequence[Sequence[int]], new: int) -> tuple[list[float], list[list[int]]]:
        """One batch, padded on the left: its Engine, which batches continuously, runs no graph of the model builder."""
        length = max(map(len, prompts))
        ids = np.full((len(prompts), length), PAD, np.int32)
        for row, prompt in zip(ids, prompts, strict=True):
            row[length - len(prompt) :] = prompt
        generator = self._generator(len(prompts), length + new, length + new)
        generator.append_tokens(ids)
        first = 0.0
        for _ in range(new):
            generator.generate_next_token()
            first = first or time.perf_counter()
        tokens = [[int(t) for t in generator.get_sequence(i)[length:]] for i in range(len(prompts))]
        return [first] * len(prompts), tokens

    def logits(self, ids: Sequence[int]) -> Any:
        generator = self._generator(1, len(ids) + 1, 0)
        generator.append_tokens(np.array([ids], np.int32))
        return np.array(generator.get_output("logits"))[0]
