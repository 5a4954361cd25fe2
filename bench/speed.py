"""`python -m bench.speed`: what `edgeformer bench` says of out/smollm2/keep, into README's speed table.

One engine alone on one machine; the comparison with other runtimes is `python -m bench.peers`.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

from bench.report import RESULTS, ROOT, footnote, put, save, table

RUNS = (("native", 1), ("native", 2), ("cpu", 2))


def measure() -> list[dict[str, Any]]:
    runs = []
    for engine, threads in RUNS:
        where = ["out/smollm2/keep", "-e", engine, "-t", str(threads), "-p", "512", "-n", "128", "--json"]
        command = [sys.executable, "-m", "edgeformer", "bench", *where]
        runs.append(json.loads(subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout))
    return runs


def main() -> None:
    save("speed", {"runs": measure()})
    saved = json.loads((RESULTS / "speed.json").read_text())
    rows = []
    for (engine, threads), run in zip(RUNS, saved["runs"], strict=True):
        rates = [f"{row['median']:.0f} ({row['low']:.0f} to {row['high']:.0f})" for row in run["rows"]]
        rows.append(
            [engine, str(threads), *rates, f"{run['load_seconds']:.2f} s", f"{run['peak_bytes'] / 2**20:.0f} MiB"]
        )
    header = ["engine", "threads", "prompt of 512, tokens/s", "generation, tokens/s", "load", "peak memory"]
    text = (
        "SmolLM2-135M as kept from its Q4_1 file, median of five rounds (lowest to highest), by `edgeformer bench`:\n\n"
        f"{table(header, rows)}\n\n{footnote(saved['machine'])} The comparison with other runtimes is "
        "`python -m bench.peers`; it has not been run on a quiet machine yet, so no number of theirs stands here."
    )
    put(ROOT / "README.md", "speed", text)


if __name__ == "__main__":
    main()
