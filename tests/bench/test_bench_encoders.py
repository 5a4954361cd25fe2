"""The benchmark of encoders: what it times, compares and says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support.peer_results import saved

from bench import encoders
from bench.peers import rounds
from bench.peers.runners import measure


class Tower:
    """An encoder whose vectors are the `size` first unit vectors, turned by `noise`."""

    def __init__(self, noise: float) -> None:
        self.noise, self.calls = noise, 0

    def encode(self, feeds: dict[str, np.ndarray]) -> np.ndarray:
        self.calls += 1
        texts, tokens = feeds["input_ids"].shape
        assert feeds["attention_mask"].all() and feeds["token_type_ids"].shape == (texts, tokens)
        return np.repeat(3.0 * (np.eye(texts, 4) + self.noise * np.eye(texts, 4, 1))[:, None], tokens, 1)


@pytest.mark.parametrize(("noise", "cosine"), [(0.0, 1.0), (1.0, 0.5**0.5)])
def test_an_encoder_is_timed_after_its_first_call_and_compared(tmp_path: Path, noise: float, cosine: float) -> None:
    np.save(tmp_path / "vectors.npy", np.eye(3, 4))
    test = {"name": "3 x 2", "kind": "encode", "ids": [[1, 2]] * 3, "seconds": 0.0}
    tower = Tower(noise)
    found = measure.measure(tower, {"tests": [test | {"reference": str(tmp_path / "vectors.npy")}]})["3 x 2"]
    assert found["calls"] == 3 and tower.calls == 4 and found["value"] > 0
    assert found["cosine"] == pytest.approx(cosine) and found["least_cosine"] == pytest.approx(cosine)


def encoded() -> dict:
    def speeds(one: float, two: float, cosine: float) -> dict:
        return {**{t: {"1 x 16": {"median": v}} for t, v in (("1", one), ("2", two))}, "cosine": cosine}

    numbers = saved()
    numbers["tests"] = ["1 x 16"]
    numbers["measured"] = {
        "edgeformer q8, native": speeds(300.0, 390.0, 0.999),
        "edgeformer q8, cpu": speeds(200.0, 400.0, 0.999),
        "OpenVINO careless": speeds(250.0, 300.0, 0.9),
        "OpenVINO careful": speeds(100.0, 150.0, 0.995),
    }
    return numbers


def test_encoders_are_compared_with_the_fastest_and_with_the_fastest_faithful() -> None:
    ours = "edgeformer q8, native"
    assert encoders.ratios(encoded(), ours)["1 x 16"] == {1: 1.2, 2: 1.3}
    assert encoders.ratios(encoded(), ours, 0.99)["1 x 16"] == {1: 3.0, 2: 2.6}
    text = encoders.text(encoded())
    assert "| 1 x 16 tokens | x 1.30 | x 1.20 (less) | x 2.60 | x 3.00 |" in text
    assert "| **edgeformer q8, native** | 0.9990 | 390 (300) |" in text
    line = encoders.readme_line(encoded() | {"machine": {"cpu": "chip", "date": "today"}})
    assert "x 1.20 to x 1.30 as fast" in line and "x 2.60 to x 3.00 as fast" in line


def test_it_is_said_where_cpu_is_the_faster_engine_of_the_two() -> None:
    numbers = encoded()
    assert encoders.auto_line(numbers) == "`cpu` is faster than `native` in: 1 x 16 with 2 threads (x 1.03)."
    numbers["measured"]["edgeformer q8, cpu"]["2"]["1 x 16"]["median"] = 300.0
    assert "`auto` is right" in encoders.auto_line(numbers)


def test_every_encoder_has_its_own_name_and_runner() -> None:
    assert len({c.key for c in encoders.ALL}) == len(encoders.ALL)
    assert all((rounds.RUNNERS / f"{c.runner}.py").is_file() for c in encoders.ALL)
