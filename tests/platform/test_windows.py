"""The Windows wheel, installed into Windows' CPython under Wine: the same bits as here, the commands, the files."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("ziglang", reason="needs the extra `wheels`")
pytest.importorskip("edgeformer._native", reason="the native extension is not built")

from support.wheel_builds import TIMEOUT
from support.wine import Windows

from wheels.build import ROOT

pytestmark = [
    pytest.mark.skipif(platform.machine() != "x86_64", reason="Wine runs programs of this processor only"),
    pytest.mark.timeout(TIMEOUT),
]
TOKENS = "6"


@pytest.fixture(scope="module")
def windows() -> Windows:
    return Windows()


def lines(text: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in text.splitlines() if line.startswith("{")]


def test_windows_gives_the_same_bits(windows: Windows, bundles: Path) -> None:
    names = [bundles / "float", bundles / "q8"]
    command = [sys.executable, ROOT / "tests/support/portable.py", TOKENS, *names]
    here = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert here.returncode == 0, here.stderr
    there = lines(windows.run(windows.place / "portable.py", TOKENS, *names))
    assert there == lines(here.stdout)
    assert len(there) >= 2 * 3  # two bundles; the best table with 1 and 3 threads, the scalar one
    assert len({line["sha256"] for line in there}) == 2  # one hash a bundle, on every table


def test_the_commands_run_on_windows(windows: Windows, q8: Path, tmp_path: Path) -> None:
    odd = shutil.copytree(q8, tmp_path / "ünïcode → name with spaces")
    run = ["-m", "edgeformer", "run", odd, "abc", "-n", "4", "--temperature", "0", "-q", "--engine", "native"]
    assert windows.run(*run)
    assert windows.run(*run, PYTHONUTF8="0")  # a pipe with the system's code page
    assert "native" in windows.run("-m", "edgeformer", "verify", odd, "--engine", "native")
    assert windows.run("-m", "edgeformer", "chat", odd, "-n", "3", "--engine", "native", given="abc\r\n")
    missing = windows.run("-m", "edgeformer", "inspect", tmp_path / "missing", code=3)
    assert not missing
    told = windows.run("-m", "edgeformer", "doctor")
    assert "Windows" in told and "AppData" in told  # the folder of the cache
    facts = (
        "from edgeformer.machine import *; print(default_threads(), total_memory(), available_memory(), peak_memory())"
    )
    threads, total, available, peak = map(int, windows.run("-c", facts).split())
    assert 1 <= threads <= (os.cpu_count() or 1)
    assert 10 << 20 < peak < total
    assert available < total


WRITE = """
import os, sys, shutil
from pathlib import Path
from edgeformer.bundle.write import write_bundle
source, target, kill = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3] == "kill"
with write_bundle(target, overwrite=True) as folder:
    for file in source.iterdir():
        shutil.copy(file, folder)
    print(sorted(p.name for p in target.parent.iterdir()), flush=True)
    if kill:
        os._exit(9)
print(sorted(p.name for p in target.parent.iterdir()))
"""


def test_a_killed_write_is_cleared_away_by_the_next(windows: Windows, q8: Path, tmp_path: Path) -> None:
    windows.run("-c", WRITE, q8, tmp_path / "made", "kill", code=9)
    left = sorted(path.name for path in tmp_path.iterdir())
    assert len(left) == 2 and all(name.startswith(".made.partial-") for name in left)  # the folder, and its lock
    assert windows.run("-c", WRITE, q8, tmp_path / "made", "go on").splitlines()[-1] == "['made']"
    assert windows.run("-c", WRITE, q8, tmp_path / "made", "replace it").splitlines()[-1] == "['made']"


LOCK = """
import subprocess, sys
from pathlib import Path
from edgeformer.machine import lock_folder
folder = Path(sys.argv[1])
another = [sys.executable, "-c", "import sys; from pathlib import Path; from edgeformer.machine import lock_folder; "
           "print(lock_folder(Path(sys.argv[1])) is not None)", str(folder)]
lock = lock_folder(folder)
print(subprocess.run(another, capture_output=True, text=True).stdout.strip())
lock.close()
print(subprocess.run(another, capture_output=True, text=True).stdout.strip())
"""


def test_folder_locks_of_windows(windows: Windows, tmp_path: Path) -> None:
    assert windows.run("-c", LOCK, tmp_path).split() == ["False", "True"]


def test_packed_weights_are_kept_in_the_users_cache_folder(windows: Windows, q8: Path) -> None:
    load = "import edgeformer, sys; edgeformer.load(sys.argv[1], 'native', 1); from edgeformer import disk_cache; "
    load += "disk_cache.finish(); print(disk_cache.folder(), disk_cache.size()[0])"
    folder, _, count = windows.run("-c", load, q8).strip().rpartition(" ")
    assert folder.endswith(r"AppData\Local\edgeformer\Cache")
    assert int(count) > 0
