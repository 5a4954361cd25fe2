"""Numbers of a benchmark as they are saved, for the tests of its pages."""

from __future__ import annotations

from bench.peers.rounds import LIMIT

OURS, PEER, LOSSY = "edgeformer keep (the GGUF's blocks)", "llama.cpp Q8_0", "llama.cpp Q4_0"


def saved() -> dict:
    def numbers(speed: float) -> dict:
        return {
            "decode": {"median": speed},
            "first": {"median": 3 / speed},
            "short_mib": {"median": 150.0},
        }

    def quality(ratio: float) -> dict:
        return {"perplexity": 10 * ratio, "perplexity_float": 10.0, "mean_kl": ratio - 1}

    speeds = {OURS: (200.0, 100.0), PEER: (80.0, 50.0), LOSSY: (100.0, 60.0)}
    return {
        "machine": {"cpu": "A CPU", "system": "Linux", "date": "2026-01-01"},
        "threads": [1, 2],
        "rounds": {"taken": 6, "used": 5, "disturbed": 1},
        "undisturbed": True,
        "limit_cores_of_others": LIMIT,
        "contestants": {
            key: {"project": key.split()[0], "settings": "s", "file_bytes": 1e8, "token_bytes": 1e8} for key in speeds
        },
        "absent": {"OpenVINO GenAI int8": "pip failed: no wheel"},
        "quality": {OURS: quality(1.002), PEER: quality(1.001), LOSSY: quality(1.3)},
        "memory": {"1": {"max": 12.0}, "2": {"max": 25.0}},
        "kept_by_stream": {"2": {"median": 0.994}},
        "measured": {
            key: {"2": numbers(two), "1": numbers(one), "versions": {"p": "1"}} for key, (two, one) in speeds.items()
        },
    }
