"""The benchmark of the decoding core: what its studies count, and what they write from stored numbers."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from support.peer_results import LOSSY, OURS, PEER
from support.peer_results import saved as peer_results

from bench.decoding import constraints, gap, peers, prefix, setting, tasks, throughput
from bench.decoding.__main__ import STUDIES
from bench.decoding.setting import LIMIT, Prompts, mixed_lengths, percentile, undisturbed

MACHINE = {"cpu": "A CPU", "system": "Linux", "versions": {"numpy": "2"}, "date": "2026-01-01"}


def one(value: float) -> dict[str, float]:
    return {"median": value, "min": value, "max": value, "n": 5}


def study(**numbers: object) -> dict:
    return {"machine": MACHINE, "threads": [1, 2], "rounds": 5, "others": 0.0, **numbers}


# -- what is counted


@pytest.mark.parametrize("count", [1, 2, 8, 64])
def test_every_number_of_requests_has_the_same_mixture_of_lengths(count: int) -> None:
    lengths = mixed_lengths(count)
    assert lengths == mixed_lengths(count) and len(lengths) == count
    assert min(lengths) >= 16 and max(lengths) <= 512
    assert np.exp(np.mean(np.log(lengths))) == pytest.approx((16 * 512) ** 0.5, rel=0.02)  # the middle of the scale
    assert count < 8 or lengths != sorted(lengths)


def test_no_two_prompts_begin_alike() -> None:
    texts = Prompts(list(range(40_000)))
    found = [ids for _ in range(12) for ids in texts.mixed(64)]
    assert len({ids[0] for ids in found}) == len(found)
    with pytest.raises(ValueError, match="the text has 10 tokens"):
        Prompts(list(range(10))).take(11)


@pytest.mark.parametrize("count", [1, 2, 9, 10, 11, 100])
@pytest.mark.parametrize("share", [0.5, 0.9, 0.99])
def test_a_percentile_is_the_nearest_rank(count: int, share: float) -> None:
    values = np.random.default_rng(count).random(count)
    assert percentile(values.tolist(), share) == np.percentile(values, 100 * share, method="inverted_cdf")


def quiet_after(monkeypatch: pytest.MonkeyPatch, cores: list[float]) -> None:
    left = iter(cores)
    monkeypatch.setattr(setting, "Others", lambda: SimpleNamespace(cores=lambda: next(left)))


def test_a_disturbed_measurement_is_taken_again_and_the_quietest_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    quiet_after(monkeypatch, [0.9, 0.0, 0.0])
    calls: Iterator[int] = iter(range(9))
    assert undisturbed(lambda: next(calls)) == (1, 0.0)
    quiet_after(monkeypatch, [0.9, 0.4, 0.6])
    calls = iter(range(9))
    assert undisturbed(lambda: next(calls)) == (1, 0.4)
    assert next(calls) == 3


def test_gaps_are_between_steps_and_those_beside_the_prompt_count() -> None:
    steady = [0.0, 0.1, 0.2, 0.3, 0.4, 0.75, 0.85, 1.5]  # the prompt runs from 0.35 to 0.8
    drafted = [time + late for time in steady for late in (0.0, 1e-4, 2e-4)]  # three tokens of each step
    expected = {"median_before": 0.1, "longest_before": 0.1, "median": 0.1, "longest": 0.35, "ratio": 3.5}
    for times in (steady, drafted):
        found = gap.gaps([times, [0.05, 0.15, 0.25]], 0.35, 0.8)
        assert found == pytest.approx(expected, rel=1e-2)
    with pytest.raises(ValueError, match="0 while it ran"):
        gap.gaps([[0.0, 0.1, 0.2]], 0.35, 0.8)


def test_a_timeline_holds_the_longest_gap_of_each_step() -> None:
    found = gap.timeline([[0.0, 1.0, 1.1, 1.4], [0.0, 1.0, 1.1]], asked=1.0, answered=1.4)
    assert [(round(at, 2), round(ms)) for at, ms in found] == [(0.0, 1000), (0.1, 100), (0.4, 300)]


class Streams:
    """A model whose scheduler gives each answer a token a tick, and waits `pause` ticks when the long prompt comes."""

    def __init__(self) -> None:
        self.added: list[int] = []

    def scheduler(self, max_sequences: int) -> Streams:
        assert max_sequences == gap.SEQUENCES + 1
        return self

    def __enter__(self) -> Streams:
        return self

    def __exit__(self, *_: object) -> None: ...

    async def stream(self, ids: list[int], **arguments: object) -> object:  # type: ignore[misc]
        self.added.append(len(ids))
        for _ in range(arguments["max_new_tokens"]):  # type: ignore[call-overload]
            await asyncio.sleep(0.001)
            yield None


def test_the_long_prompt_comes_when_all_others_decode() -> None:
    model = Streams()
    arrivals, asked, first = asyncio.run(gap.play(model, Prompts(list(range(9000))), 2048, 5, "off"))
    assert model.added == [64] * 7 + [2048]
    assert len(arrivals) == 7 and all(sum(time <= asked for time in times) >= 4 for times in arrivals)
    assert asked < first < max(times[-1] for times in arrivals)


def test_a_wave_counts_all_new_tokens_and_waits_from_the_first_call() -> None:
    timings = SimpleNamespace(queue_seconds=1.0, first_token_seconds=0.5, new_tokens=64)
    answer = SimpleNamespace(result=lambda: SimpleNamespace(timings=timings))

    class Scheduler:
        def __enter__(self) -> Scheduler:
            return self

        def __exit__(self, *_: object) -> None: ...

        def add(self, ids: list[int], **_: object) -> object:
            return answer

    model = SimpleNamespace(scheduler=lambda max_sequences: Scheduler())
    found = throughput.wave(model, [[1]] * 3, "off")
    assert found["first"] == found["first_p90"] == 1.5 and found["rate"] > 0
    timings.new_tokens = 63
    with pytest.raises(RuntimeError, match="another number of tokens"):
        throughput.wave(model, [[1]] * 3, "off")


def test_masks_are_timed_only_inside_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    from edgeformer.decoding.constraints.grammar import GrammarConstraint

    clock = iter([0.0, 1.0, 10.0, 12.0, 20.0, 21.0, 30.0, 35.0])
    monkeypatch.setattr(constraints.time, "perf_counter", lambda: next(clock))
    calls: list[object] = []

    def apply(self: object, scores: object) -> object:
        calls.append(scores)
        return "masked"

    def allows(self: object, tokens: list[int]) -> list[bool]:
        calls.append(tokens)
        return [token != 3 for token in tokens]

    monkeypatch.setattr(GrammarConstraint, "apply", apply)
    monkeypatch.setattr(GrammarConstraint, "allows", allows)
    monkeypatch.setattr(GrammarConstraint, "accept", lambda self, token: calls.append(token))
    constraint = object.__new__(GrammarConstraint)
    with constraints.timed() as seconds:
        assert constraint.allows([3]) == [False]  # the likeliest may not follow, so its mask counts too
        assert constraint.apply("scores") == "masked"  # type: ignore[arg-type,comparison-overlap]
        constraint.accept(7)
        constraint.accept(8)
    assert seconds == [4.0, 5.0] and calls == [[3], "scores", 7, 8]
    assert GrammarConstraint.apply is apply and GrammarConstraint.allows is allows


def test_a_beginning_that_was_not_cached_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    numbers = {"first": 0.4, "second": 0.02, "first_cached": 0.0, "second_cached": 1024.0, "others": 0.0}
    other = numbers | {"first": 0.05, "first_cached": 1024.0}
    monkeypatch.setattr(prefix, "process", lambda options, folder, threads, number: (numbers, other)[number])
    options = setting.Options(tmp_path)
    found = prefix.pair(options, 1)
    assert found["same_share"] == pytest.approx(0.05) and found["other_share"] == pytest.approx(0.125)
    other["first_cached"] = 896.0
    with pytest.raises(RuntimeError, match=r"896\.0"):
        prefix.pair(options, 1)


# -- what is written


def throughputs() -> dict:
    def numbers(rate: float) -> dict:
        return {"rate": one(rate), "first": one(100 / rate), "first_p90": one(200 / rate)}

    def ways(rate: float) -> dict:
        return {
            "off": {"1": numbers(rate), "8": numbers(4 * rate)},
            "auto": {"1": numbers(2 * rate), "8": numbers(rate)},
        }

    return study(counts=[1, 8], new=64, measured={"1": ways(100.0), "2": ways(200.0)})


def gaps_measured() -> dict:
    names = ("median_before", "longest_before", "median", "longest", "ratio", "first", "first_alone")

    def numbers(*values: float) -> dict:
        return {name: one(value) for name, value in zip(names, values, strict=True)}

    measured = {
        "2": {"off": numbers(0.005, 0.006, 0.01, 0.014, 2.8, 1.5, 0.9)},
        "1": {"off": numbers(0.008, 0.01, 0.02, 0.04, 5.0, 2.5, 1.8)},
    }
    lines = {"2 off": [[-0.01, 5.0], [0.01, 14.0], [0.02, 10.0]], "1 off": [[-0.01, 8.0], [0.04, 40.0]]}
    return study(long=2048, measured=measured, timelines=lines)


def masks() -> dict:
    def numbers(share: float) -> dict:
        found = {"tokens": 90.0, "mask": 60e-6, "mask_p99": 2e-4, "step": 3e-3, "share": share, "times": 1.021}
        return {name: one(value) for name, value in found.items()}

    return study(measured={"1": {"regex": numbers(0.02)}, "2": {"regex": numbers(0.031)}})


def beginnings() -> dict:
    found = {"first": 0.4, "same": 0.02, "other": 0.1, "same_share": 0.05, "other_share": 0.25}
    return study(shared=1024, own=24, measured={str(n): {k: one(v) for k, v in found.items()} for n in (1, 2)})


def drafts() -> dict:
    def numbers(times: float) -> dict:
        return {
            "times": times,
            "lowest": times - 0.1,
            "accepted": 0.5,
            "plain tokens/s": 300.0,
            "tokens/s": 300 * times,
        }

    return study(measured={t: {"code edit": numbers(2.4), "story": numbers(0.99), "JSON": numbers(1.9)} for t in "12"})


def many_requests() -> dict:
    numbers = peer_results()
    numbers["counts"] = [8, 16]
    for key, by in numbers["measured"].items():
        for threads in ("1", "2"):
            speed = by[threads]["decode"]["median"]
            by[threads] = {"8 requests": one(4 * speed), "16 requests": one((7 if key == OURS else 4) * speed)}
            by[threads] |= {f"{n} requests, first": one(n / speed) for n in (8, 16)}
    return numbers


CASES = {
    "throughput": (throughputs, ["| 8 | 800 (400) | 200 (100) | 0.125 (0.250) | 0.250 (0.500) |", "x 4.0 with 2 thr"]),
    "gap": (
        gaps_measured,
        [
            "| 2 threads, no drafts | 5.0 | 6.0 | 10.0 | 14.0 | x 2.80, reached | 1.50 | 0.90 |",
            "| 1 thread, no drafts | 8.0 | 10.0 | 20.0 | 40.0 | x 5.00, missed | 2.50 | 1.80 |",
        ],
    ),
    "constraints": (
        masks,
        [
            "| regex, 1 thread | 90 | 60 | 200 | 3.00 | 2.0%, reached | x 1.021 |",
            "| regex, 2 threads | 90 | 60 | 200 | 3.00 | 3.1%, missed |",
        ],
    ),
    "prefix": (beginnings, ["| 2 threads | 400 | 20.0 | 5.0%, reached | 100.0 | 25.0%, missed |"]),
    "speculation": (
        drafts,
        [
            "| code edit, 2 threads | 300 | 720 | x 2.40, reached (2.0) | x 2.30 | 50% |",
            "x 0.99, reached (0.98)",
            "x 1.90, missed (2.0)",
        ],
    ),
    "peers": (
        many_requests,
        [
            f"| **{OURS}** | 800 (400) | 1,400 (700) | 0.04 (0.08) | 0.08 (0.16) |",
            f"| {OURS} | 8 | **x 2.50** (800 : 320, {PEER}) | **x 2.00** (less) (400 : 200, {PEER}) |",
            f"| {OURS} | 16 | **x 4.38** (1,400 : 320, {PEER}) |",
            LOSSY,
            "OpenVINO GenAI int8: absent. pip failed",
        ],
    ),
}


@pytest.mark.parametrize("name", STUDIES.studies)
def test_a_study_is_a_table_and_a_plot(name: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    made, lines = CASES[name]
    text = STUDIES.studies[name].text(made(), tmp_path)
    for line in lines:
        assert line in text, text
    assert "2026-01-01" in text and "isturbed: " not in text
    shown = [line.rsplit("/", 1)[1].rstrip(")") for line in text.splitlines() if line.startswith("![")]
    assert all((tmp_path / image).stat().st_size > 1000 for image in shown)
    assert {path.name for path in tmp_path.iterdir()} == {*shown}


@pytest.mark.parametrize("name", [name for name in STUDIES.studies if name != "peers"])
def test_a_disturbed_study_says_so(name: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    text = STUDIES.studies[name].text(CASES[name][0]() | {"others": LIMIT + 0.7}, tmp_path)
    assert "**Disturbed: other processes used up to 0.75 cores.**" in text


def test_a_study_is_written_between_its_marks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "performance.md"
    page.write_text("above\n<!-- decoding-prefix:begin -->\nstale\n<!-- decoding-prefix:end -->\nbelow\n")
    monkeypatch.setattr("bench.studies.runs", lambda name: [beginnings()] if name == "decoding-prefix" else [])
    for name in STUDIES.studies:
        dataclasses.replace(STUDIES, page=page, images=tmp_path).write(name)
    text = page.read_text()
    assert text.startswith("above\n") and text.endswith("below\n") and "stale" not in text and "25.0%, missed" in text


@pytest.mark.parametrize("name", [name for name, study in STUDIES.studies.items() if study.brief is not None])
def test_a_page_has_the_bars_on_other_machines(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    made, _ = CASES[name]
    other = made()
    other["machine"] = other["machine"] | {"cpu": "an older CPU", "date": "2025-12-31"}
    page = tmp_path / "performance.md"
    page.write_text(f"<!-- decoding-{name}:begin -->\n<!-- decoding-{name}:end -->\n")
    monkeypatch.setattr("bench.studies.runs", lambda _: [made(), other])
    dataclasses.replace(STUDIES, page=page, images=tmp_path).write(name)
    first, second = page.read_text().split("#### On another machine: an older CPU")
    assert "2026-01-01" in first and "2025-12-31" not in first and "2025-12-31" in second
    rows = [line for line in second.splitlines() if line.startswith("| ") and "x " in line]
    assert rows and all(row in first for row in rows) and "![" not in second


def test_bars_are_those_of_the_page() -> None:
    assert (gap.TARGET, constraints.TARGET, prefix.SAME, prefix.OTHER) == (3.0, 0.03, 0.10, 0.20)
    assert (tasks.WIN, tasks.LOSS, peers.TARGET) == (2.0, 0.98, 2.5)
