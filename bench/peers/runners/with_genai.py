"""onnxruntime-genai through its Generator.

Options: session (session options that its genai_config.json takes, beside the number of threads), batch (the most
requests that its Engine runs together).
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import numpy as np

og: Any = None


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
        settings: dict[str, Any] = {"model": {"decoder": {"session_options": session}}}
        if "batch" in options:
            settings["engine"] = {"static_batching": {"max_batch_size": options["batch"]}}
        config.overlay(json.dumps(settings))
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
        """Through its Engine. It needs a graph with all logits: with those of the last position it fails."""
        engine = og.Engine(self._model)
        requests = []
        for ids in prompts:
            options = og.RequestOptions()
            options.set_max_session_tokens(len(ids) + new)
            request = engine.create_request(options=options)
            turn = og.TurnOptions(request)
            turn.set_do_sample(False)
            turn.set_max_generated_tokens(new)
            turn.set_min_generated_tokens(new)  # keeps the end token from ending it
            request.begin_turn(np.array(ids, np.int32), turn)
            requests.append(request)  # one that is dropped is closed
        events = engine.create_event_buffer(4 * len(prompts))
        times, tokens = [0.0] * len(prompts), [list[int]() for _ in prompts]
        while engine.has_pending_requests():
            for event in engine.run(events):
                number = next(i for i, request in enumerate(requests) if request is event.request)
                if event.error_code != og.EngineErrorCode.NONE:
                    raise SystemExit(f"onnxruntime-genai's engine failed: {event.error_code}")
                if event.token is not None:
                    times[number] = times[number] or time.perf_counter()
                    tokens[number].append(int(event.token))
        return times, tokens

    def logits(self, ids: Sequence[int]) -> Any:
        generator = self._generator(1, len(ids) + 1, 0)
        generator.append_tokens(np.array([ids], np.int32))
        return np.array(generator.get_output("logits"))[0]
