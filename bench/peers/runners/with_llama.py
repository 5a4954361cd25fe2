"""llama.cpp through llama-cpp-python's C API: one llama_decode a step, no Python in the token loop but an argmax.

Options: flash_attn (-1 lets llama.cpp choose), ubatch, kv_unified (one cache for all sequences).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import numpy as np

api: Any = None


def load_library() -> None:
    global api
    import llama_cpp

    api = llama_cpp
    api.llama_backend_init()


def versions() -> dict[str, str]:
    return {
        "llama-cpp-python": version("llama-cpp-python"),
        "llama.cpp": api.llama_print_system_info().decode(),
    }


BATCH = 2048  # llama.cpp's own default


class Loaded:
    def __init__(self, file: str, threads: int, options: dict[str, Any], context: int) -> None:
        params = api.llama_model_default_params()
        params.n_gpu_layers = 0
        self._model = api.llama_model_load_from_file(file.encode(), params)
        if not self._model:
            raise SystemExit(f"llama.cpp cannot load {file}")
        self._vocab = api.llama_vocab_n_tokens(api.llama_model_get_vocab(self._model))
        self._threads, self._options = threads, options
        self._contexts: dict[tuple[int, int], Any] = {}
        self._size = context
        self._context(1)

    def _context(self, sequences: int, each: int = 256) -> Any:
        """One for so many sequences of `each` tokens; a single one has room for the whole context."""
        if (sequences, each) not in self._contexts:
            params = api.llama_context_default_params()
            params.n_ctx = self._size if sequences == 1 else each * sequences
            params.n_batch, params.n_ubatch = BATCH, self._options.get("ubatch", 512)
            params.n_seq_max = sequences
            params.n_threads = params.n_threads_batch = self._threads
            params.flash_attn_type = self._options.get("flash_attn", -1)
            params.kv_unified = self._options.get("kv_unified", False)
            params.no_perf = True
            made = api.llama_init_from_model(self._model, params)
            if not made:
                raise SystemExit("llama.cpp cannot make a context")
            self._contexts[sequences, each] = made
        return self._contexts[sequences, each]

    def _decode(self, context: Any, rows: Sequence[tuple[int, int, int, bool]]) -> None:
        """Rows are (token, position, sequence, wants logits); of more than a batch, the last one's logits stay."""
        for start in range(0, len(rows), BATCH):
            self._decode_batch(context, rows[start : start + BATCH])

    def _decode_batch(self, context: Any, rows: Sequence[tuple[int, int, int, bool]]) -> None:
        batch = api.llama_batch_init(len(rows), 0, 1)
        batch.n_tokens = len(rows)
        for i, (token, position, sequence, wanted) in enumerate(rows):
            batch.token[i], batch.pos[i] = token, position
            batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = 1, sequence, wanted
        code = api.llama_decode(context, batch)
        api.llama_batch_free(batch)
        if code:
            raise SystemExit(f"llama_decode returned {code}")

    def _rows(self, context: Any, count: int) -> Any:
        return np.ctypeslib.as_array(api.llama_get_logits(context), shape=(count, self._vocab))

    def generate(self, prompts: Sequence[Sequence[int]], new: int) -> tuple[list[float], list[int]]:
        context = self._context(len(prompts))
        api.llama_memory_clear(api.llama_get_memory(context), True)
        rows = [(t, i, s, i == len(p) - 1) for s, p in enumerate(prompts) for i, t in enumerate(p)]
        times, tokens = [], []
        for step in range(new):
            self._decode(context, rows)
            chosen = self._rows(context, len(prompts)).argmax(-1)
            times.append(time.perf_counter())
            tokens.append(int(chosen[0]))
            rows = [(int(t), len(p) + step, s, True) for s, (t, p) in enumerate(zip(chosen, prompts, strict=True))]
        return times, tokens

    def answer(self, prompts: Sequence[Sequence[int]], new: int) -> tuple[list[float], list[list[int]]]:
        """As its server schedules: a batch has the rows of all sequences that decode, then prompts as they fit."""
        context = self._context(len(prompts), self._size)
        api.llama_memory_clear(api.llama_get_memory(context), True)
        tokens: list[list[int]] = [[] for _ in prompts]
        times, done = [0.0] * len(prompts), [0] * len(prompts)  # tokens that the cache holds
        while any(len(answer) < new for answer in tokens):
            rows: list[tuple[int, int, int, bool]] = []
            asked = []
            for number, answer in enumerate(tokens):
                if answer and len(answer) < new:
                    rows.append((answer[-1], done[number], number, True))
                    asked.append(number)
                    done[number] += 1
            for number, prompt in enumerate(prompts):
                piece = prompt[done[number] : done[number] + BATCH - len(rows)] if not tokens[number] else []
                ends = bool(piece) and done[number] + len(piece) == len(prompt)
                rows += [(t, done[number] + i, number, ends and i == len(piece) - 1) for i, t in enumerate(piece)]
                done[number] += len(piece)
                asked += [number] * ends
            self._decode_batch(context, rows)
            chosen = self._rows(context, len(asked)).argmax(-1)
            now = time.perf_counter()
            for number, token in zip(asked, chosen, strict=True):
                times[number] = times[number] or now
                tokens[number].append(int(token))
        return times, tokens

    def logits(self, ids: Sequence[int]) -> Any:
        context = self._context(1)
        api.llama_memory_clear(api.llama_get_memory(context), True)
        self._decode(context, [(t, i, 0, True) for i, t in enumerate(ids)])
        return self._rows(context, len(ids))
