"""bench.decoding.sampling: every setting runs and has its line; shares are of the fastest step."""

from __future__ import annotations

import numpy as np

from bench.decoding import sampling


def test_every_setting_is_measured_and_has_a_line() -> None:
    logits = np.random.default_rng(0).standard_normal((2, 700)).astype(np.float32)
    wide = sampling.widened(logits, 3000)
    assert wide.shape == (2, 3000) and np.array_equal(wide[:, :700], logits) and wide[:, 700:].max() < logits.max() - 6
    saved = {
        "threads": [1, 2],
        "vocabularies": [700, 3000],
        "models": {"700": "a model", "3000": "another"},
        "choices": {str(rows.shape[1]): sampling.choices(rows, 1) for rows in (logits, wide)},
        "steps": {"700": {"1": {"min": 3000.0, "median": 9e9}, "2": {"min": 2000.0, "median": 9e9}}},
        "machine": {"cpu": "a cpu", "system": "a system", "versions": {}, "date": "2026-01-01"},
    }
    saved["choices"]["700"]["greedy"] = {"median": 60.0}
    lines = sampling.text(saved).splitlines()
    assert any(line.startswith("| greedy | 60 | 2.0% | 3.0% |") for line in lines)
    for name in [*sampling.SETTINGS, sampling.LOGPROBS]:
        assert sum(line.startswith(f"| {name} |") for line in lines) == 1
    assert "a model: 3.00 ms with 1 thread, 2.00 ms with 2 threads" in sampling.text(saved)
