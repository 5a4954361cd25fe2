"""What is measured: each study is a list of tests, with a results file and a block in the page. README shows `main`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

Test = dict[str, Any]
Prompt = Callable[[int], list[int]]


@dataclass(frozen=True)
class Study:
    """Tests that share a process."""

    name: str
    tests: Callable[[Prompt, bool], list[Test]]  # (gives a new prompt of a length, whether it should be quick)
    context: int  # tokens that caches must hold, the longest test rounded up
    busy: int = 0  # processes that only burn time beside the measured one
    axis: str = ""  # what the number in a test's name counts, if the study is a curve
    title: str = ""

    @property
    def file(self) -> str:
        """Name of the results file and of the page's block."""
        return "peers" if self.name == "main" else f"peers-{self.name}"

    def of_round(self, ids: list[int], number: int, quick: bool) -> list[Test]:
        """The tests of round `number`. Prompts are pieces of one text; no two of a process begin alike."""
        places = _places(len(ids) - self.context, number)

        def prompt(length: int) -> list[int]:
            place = next(places)
            return ids[place : place + length]

        return self.tests(prompt, quick)


def _places(end: int, number: int) -> Iterator[int]:
    """Distinct start positions: steps of a number coprime to `end`."""
    step = next(step for step in range(577, 2 * end + 577) if _common(step, end) == 1)
    for i in range(end):
        yield (number * 37 + i * step) % end


def _common(a: int, b: int) -> int:
    while b:
        a, b = b, a % b
    return a


RUNS = 5  # at most: a test stops when it has taken long enough (measure.py)


def _test(name: str, kind: str, prompts: list[list[list[int]]], new: int) -> Test:
    """A test whose runs have these prompts, each with `new` tokens after it."""
    return {"name": name, "kind": kind, "runs": prompts, "new": new}


def _prompts(prompt: Prompt, length: int, runs: int = 1, count: int = 1) -> list[list[list[int]]]:
    """[runs, count] prompts of `length` tokens."""
    return [[prompt(length) for _ in range(count)] for _ in range(runs)]


def _main(prompt: Prompt, quick: bool) -> list[Test]:
    new, runs = (32, 1) if quick else (128, RUNS)
    return [
        _test("first", "first", _prompts(prompt, 32), 4),
        _test("decode", "decode", _prompts(prompt, 32, runs), new),
        _test("prefill512", "prefill", _prompts(prompt, 512, runs), 1),
        _test("decode@1024", "decode", _prompts(prompt, 1024, runs), new // 2),
        _test("batch8", "decode", _prompts(prompt, 32, runs, count=8), new // 2),
    ]


def _depth(prompt: Prompt, quick: bool) -> list[Test]:
    depths = (128, 1024) if quick else (128, 512, 1024, 2048, 4096, 7936)
    runs = 1 if quick else RUNS
    return [_test(f"depth {depth}", "decode", _prompts(prompt, depth, runs), 48) for depth in depths]


def _states(prompt: Prompt, quick: bool) -> list[Test]:
    counts = (1, 4) if quick else (1, 2, 4, 8, 16)
    runs = 1 if quick else RUNS
    return [_test(f"states {count}", "decode", _prompts(prompt, 32, runs, count), 64) for count in counts]


def _busy(prompt: Prompt, quick: bool) -> list[Test]:
    return [_test("decode", "decode", _prompts(prompt, 32, 1 if quick else RUNS), 32 if quick else 64)]


def _sizes(prompt: Prompt, quick: bool) -> list[Test]:
    new, runs = (12, 1) if quick else (48, RUNS)
    return [
        _test("first", "first", _prompts(prompt, 32), 4),
        _test("decode", "decode", _prompts(prompt, 32, runs), new),
        _test("prefill128", "prefill", _prompts(prompt, 128, runs), 1),
        _test("prefill512", "prefill", _prompts(prompt, 512, runs), 1),
    ]


MAIN = Study("main", _main, 1152)
DEPTH = Study("depth", _depth, 8064, axis="tokens in the cache", title="Decoding at depth")
STATES = Study("states", _states, 128, axis="sequences decoded together", title="Decoding several sequences")
BUSY = Study("busy", _busy, 128, busy=1, title="Decoding beside one busy process")
SIZES = Study("sizes", _sizes, 640, title="Cost against model size")  # of other models: sizes.py
ALL = {study.name: study for study in (MAIN, DEPTH, STATES, BUSY, SIZES)}
