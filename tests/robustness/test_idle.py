"""A process with a loaded model that has nothing to do uses no CPU: no thread spins or polls.

EDGEFORMER_IDLE_SECONDS=60 measures a whole minute (docs/boards.md); by default it is two seconds.
"""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

SECONDS = float(os.environ.get("EDGEFORMER_IDLE_SECONDS", "2"))
# A thread that looks for work every 10 ms takes at least 100 times 5 us of a second: 0.5 ms. The millisecond is for
# what the interpreter does before and after its sleep.
LIMIT = 0.001 + 0.0002 * SECONDS

CODE = """
    import sys, time
    import edgeformer
    model = edgeformer.load(sys.argv[1], sys.argv[2], 2)
    with model.scheduler(max_sequences=2) as scheduler:
        model.generate("abc", max_new_tokens=4)
        time.sleep(0.2)  # the end of the spinning of the last call
        before = time.process_time()
        time.sleep(float(sys.argv[3]))
        print(time.process_time() - before)
"""


@pytest.mark.parametrize("engine", ["native", "cpu"])
def test_an_idle_process_uses_no_cpu(q8: Path, engine: str) -> None:
    command = [sys.executable, "-c", textwrap.dedent(CODE), str(q8), engine, str(SECONDS)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS + 120)
    assert done.returncode == 0, done.stderr
    used = float(done.stdout)
    print(f"{engine}: {used * 1e3:.2f} ms of CPU time in {SECONDS:g} s")
    assert used < LIMIT
