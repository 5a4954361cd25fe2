"""Work-stealing ranges: neighbouring tasks for each thread, tasks of others afterwards, every task once."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

native = pytest.importorskip("edgeformer._native")
testing = native.testing
ROOT = Path(__file__).parents[2]
HEADER = ROOT / "csrc" / "platform" / "work_ranges.h"


@pytest.mark.parametrize("tasks", [0, 1, 2, 7, 30])
@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_threads_of_equal_speed_get_neighbouring_tasks_of_equal_ranges(threads: int, tasks: int) -> None:
    ranges = testing.WorkRanges(threads)
    expected = [list(range(tasks * t // threads, tasks * (t + 1) // threads)) for t in range(threads)]
    for _ in range(3):  # every phase divides anew
        assert ranges.divide(tasks) == min(tasks, threads)
        for i in range(max(map(len, expected))):
            for thread, part in enumerate(expected):
                if i < len(part):
                    assert ranges.take(thread) == part[i]
        assert [ranges.take(t) for t in range(threads)] == [-1] * threads


def test_a_thread_with_an_empty_range_takes_from_the_others() -> None:
    ranges = testing.WorkRanges(3)
    ranges.divide(9)
    assert ranges.take(1) == 3  # its only one: the others do the rest of its range
    assert [ranges.take(0) for _ in range(6)] == [0, 1, 2, 4, 5, 6]
    assert [ranges.take(2) for _ in range(3)] == [7, 8, -1]
    assert [ranges.take(t) for t in range(3)] == [-1] * 3


def stress(tmp_path: Path, header: str) -> str:
    """What ranges_stress.cpp prints, built with `header` as the text of work_ranges.h."""
    compiler = shutil.which("g++") or pytest.skip("needs g++")
    (tmp_path / "platform").mkdir()
    (tmp_path / "platform" / "work_ranges.h").write_text(header)
    source, out = ROOT / "tests" / "csrc" / "cross" / "ranges_stress.cpp", tmp_path / "stress"
    command = [compiler, "-std=c++17", "-O1", "-pthread", f"-I{tmp_path}", source, "-o", out]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return subprocess.run([out], capture_output=True, text=True, timeout=300).stdout


def test_every_task_of_random_ranges_runs_once(tmp_path: Path) -> None:
    assert stress(tmp_path, HEADER.read_text()) == "good\n"


@pytest.mark.parametrize(
    ("right", "wrong", "seen"),
    [
        ("tasks * (t + 1) / threads_", "tasks / threads_ * (t + 1)", "ran 0 times"),  # the remainder is lost
        ("tasks * (t + 1) / threads_", "std::min(tasks, tasks * (t + 1) / threads_ + 1)", "ran 2 times"),  # overlap
    ],
    ids=["lost", "doubled"],
)
def test_a_lost_or_doubled_task_is_seen(tmp_path: Path, right: str, wrong: str, seen: str) -> None:
    header = HEADER.read_text()
    assert header.count(right) == 1
    assert seen in stress(tmp_path, header.replace(right, wrong))
