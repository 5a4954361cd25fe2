"""OpenVINO GenAI: LLMPipeline for one sequence, ContinuousBatchingPipeline for several.

The pipelines give no logits, so quality is that of the same model file run by OpenVINO with the same properties.
Options: backend ("PA" or "SDPA"), properties (of the CPU plugin, beside the number of threads).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

ov: Any = None
genai: Any = None


def load_library() -> None:
    global ov, genai
    import openvino
    import openvino_genai

    ov, genai = openvino, openvino_genai


def versions() -> dict[str, str]:
    return {name: version(name) for name in ("openvino", "openvino-genai")}


class Loaded:
    def __init__(self, file: str, threads: int, options: dict[str, Any], context: int) -> None:
        self._file, self._options = file, options
        self._properties = {
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": 1,
            "PERFORMANCE_HINT": "LATENCY",
            **options.get("properties", {}),
        }
        self._pipe: Any = None
        self._batch: Any = None
        self._network: Any = None
        if options.get("quality"):
            self._network = ov.Core().compile_model(Path(file) / "openvino_model.xml", "CPU", self._properties)
        else:
            backend = options.get("backend", "PA")
            extra = {"scheduler_config": self._scheduler()} if backend == "PA" else {}
            self._pipe = genai.LLMPipeline(file, "CPU", ATTENTION_BACKEND=backend, **extra, **self._properties)

    @staticmethod
    def _scheduler() -> Any:
        config = genai.SchedulerConfig()
        config.enable_prefix_caching = False
        config.max_num_batched_tokens = 2048
        return config

    @staticmethod
    def _greedy(new: int) -> Any:
        config = genai.GenerationConfig()
        config.max_new_tokens, config.min_new_tokens, config.ignore_eos, config.do_sample = new, new, True, False
        return config

    def generate(self, prompts: Sequence[Sequence[int]], new: int) -> tuple[list[float], list[int]]:
        if len(prompts) > 1:
            return self._generate_batch(prompts, new)
        times: list[float] = []

        class Clock(genai.StreamerBase):  # type: ignore[misc]
            def write(self, token: Any) -> Any:
                now = time.perf_counter()
                times.extend([now] * (len(token) if isinstance(token, list) else 1))
                return genai.StreamingStatus.RUNNING

            def end(self) -> None:
                pass

        result = self._pipe.generate(ov.Tensor(np.array(prompts, np.int64)), self._greedy(new), Clock())
        return times, [int(t) for t in result.tokens[0]]

    def _requests(self, prompts: Sequence[Sequence[int]], new: int) -> list[Any]:
        if self._batch is None:
            self._batch = genai.ContinuousBatchingPipeline(self._file, self._scheduler(), "CPU", self._properties, {})
        return [
            self._batch.add_request(i, ov.Tensor(np.array([ids], np.int64)), self._greedy(new))
            for i, ids in enumerate(prompts)
        ]

    def answer(self, prompts: Sequence[Sequence[int]], new: int) -> tuple[list[float], list[list[int]]]:
        handles = self._requests(prompts, new)
        times: dict[int, float] = {}
        while self._batch.has_non_finished_requests():
            self._batch.step()
            now = time.perf_counter()
            for number, handle in enumerate(handles):
                if number not in times and handle.can_read():
                    times[number] = now
        tokens = [[int(t) for t in handle.read_all()[0].generated_ids] for handle in handles]
        return [times[number] for number in range(len(prompts))], tokens

    def _generate_batch(self, prompts: Sequence[Sequence[int]], new: int) -> tuple[list[float], list[int]]:
        handles = self._requests(prompts, new)
        times = []
        while self._batch.has_non_finished_requests():
            self._batch.step()
            times.append(time.perf_counter())
        tokens = [int(t) for t in handles[0].read_all()[0].generated_ids]
        return times, tokens

    def logits(self, ids: Sequence[int]) -> Any:
        request = self._network.create_infer_request()
        request.reset_state()
        count = len(ids)
        feeds = {
            "input_ids": np.array([ids], np.int64),
            "attention_mask": np.ones((1, count), np.int64),
            "position_ids": np.arange(count, dtype=np.int64)[None],
            "beam_idx": np.zeros(1, np.int32),
        }
        names = {name for port in self._network.inputs for name in port.names}
        request.infer({name: value for name, value in feeds.items() if name in names})
        return request.get_tensor("logits").data[0].copy()
