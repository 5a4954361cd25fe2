"""Requests of mixed lengths on the peers: what a runner counts, llama.cpp's batches, the contestants."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from bench.decoding import peers, setting
from bench.peers.contestants import ALL
from bench.peers.runners import measure, with_llama


class Server:
    """A runner that answers with as many tokens as it likes."""

    def __init__(self, tokens: int) -> None:
        self.tokens, self.asked = tokens, list[list[int]]()

    def answer(self, prompts: list[list[int]], new: int) -> tuple[list[float], list[list[int]]]:
        self.asked.append([len(prompt) for prompt in prompts])
        now = measure.time.perf_counter()
        return [now + 1.0 + i for i in range(len(prompts))], [[5] * (2 if new == 2 else self.tokens)] * len(prompts)


def test_requests_have_a_rate_and_a_wait_for_their_first_token() -> None:
    runs = [[[1] * 20, [1] * 40], [[2] * 20, [2] * 40]]
    job = {"tests": [{"name": "2 requests", "kind": "requests", "runs": runs, "new": 8}]}
    server = Server(8)
    found = measure.measure(server, job)
    assert server.asked == [[16, 16], [20, 40], [20, 40]], "the first, short run warms up"
    assert found["2 requests"]["value"] > 0 and found["2 requests"]["tokens"] == [[5] * 8] * 2
    assert found["2 requests, first"]["value"] == pytest.approx(1.5, abs=0.1)
    with pytest.raises(SystemExit, match="8 each were due"):
        measure.measure(Server(7), job)


@pytest.mark.parametrize("batch", [4, 7, 100])
def test_llama_batches_are_those_of_its_server(monkeypatch: pytest.MonkeyPatch, batch: int) -> None:
    """Every token runs once, at its place in its sequence, and the logits asked for are the last ones of each."""
    monkeypatch.setattr(with_llama, "BATCH", batch)
    monkeypatch.setattr(
        with_llama, "api", SimpleNamespace(llama_memory_clear=lambda *_: None, llama_get_memory=lambda _: None)
    )
    held: list[list[int]] = [[], [], []]
    sizes, last = [], list[int]()

    class Loaded(with_llama.Loaded):
        def __init__(self) -> None:
            self._size = 64

        def _context(self, sequences: int, each: int = 256) -> object:
            return None

        def _decode_batch(self, context: object, rows: Sequence[tuple[int, int, int, bool]]) -> None:
            sizes.append(len(rows))
            last.clear()
            for token, position, sequence, wanted in rows:
                assert position == len(held[sequence])
                held[sequence].append(token)
                if wanted:
                    last.append(100 * sequence + len(held[sequence]))  # names the row

        def _rows(self, context: object, count: int) -> np.ndarray:
            assert count == len(last)
            return np.eye(400)[last]

    prompts = [[1] * 3, [2] * 6, [3] * 2]
    times, tokens = Loaded().answer(prompts, 4)
    expected = [[100 * i + len(prompt) + step for step in range(4)] for i, prompt in enumerate(prompts)]
    assert tokens == expected and len(times) == 3 and min(times) > 0
    assert held == [prompt + answer[:3] for prompt, answer in zip(prompts, expected, strict=True)]
    assert max(sizes) <= batch


def test_the_contestants_are_those_of_the_peers_with_our_scheduler() -> None:
    found = {row.key: row for row in peers.contestants(quick=False)}
    assert {row.project for row in found.values()} == {row.project for row in ALL} - {"CTranslate2"}
    ours = [row for row in found.values() if row.project == "edgeformer"]
    assert [row.options["speculation"] for row in ours] == ["off", "off", "auto"]
    assert {row.options["loop"] for row in ours} == {"scheduler"}
    assert {row.name for row in peers.contestants(quick=True)} == set(peers.QUICK)


def test_no_two_requests_of_a_process_begin_alike(tmp_path: Path) -> None:
    ids = list(range(16384))
    for number in range(5):
        found = peers.tests(ids, number, setting.Options(tmp_path))
        prompts = [prompt for test in found for run in test["runs"] for prompt in run]
        assert len({prompt[0] for prompt in prompts}) == len(prompts) == 3 * (8 + 16)
        assert all(len(prompt) + test["new"] <= peers.CONTEXT for test in found for prompt in test["runs"][0])
