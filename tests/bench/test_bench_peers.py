"""The benchmark against the peers: what it rejects, what it reads, what it writes. No peer is installed here."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support.peer_results import LOSSY, OURS, PEER, saved

from bench import report
from bench.peers import field, models, pages, results, rounds, studies
from bench.peers.contestants import ALL, ALTERNATIVES
from bench.peers.environments import Environment, SetupFailed
from bench.peers.rounds import LIMIT, Round, Turn, TurnFailed, parse, quiet, take_turn
from bench.peers.runners import measure


def result(others: float, in_test: float | None = 0.0, value: float = 50.0) -> dict:
    test = {"value": value, "seconds": 2.0, "others": in_test, "tokens": [1], "rss_mib": 100.0}
    return {"others": others, "tests": {"decode": test}, "versions": {}, "load_s": 0.5, "peak_mib": 150.0}


# -- what is thrown away


def test_a_quiet_turn_counts_and_a_disturbed_one_does_not() -> None:
    assert not Turn("a", 2, result(LIMIT / 2)).disturbed
    assert Turn("a", 2, result(LIMIT * 1.5)).disturbed


def test_a_burst_in_one_test_is_seen_although_the_whole_process_was_quiet() -> None:
    assert Turn("a", 2, result(LIMIT / 2, in_test=0.8)).disturbed


def test_a_test_too_short_to_count_ticks_does_not_disturb() -> None:
    assert not Turn("a", 2, result(0.0, in_test=None)).disturbed


def test_one_disturbed_turn_rejects_its_round() -> None:
    good = Round([Turn("a", 2, result(0.0)), Turn("b", 2, result(0.0))])
    bad = Round([Turn("a", 2, result(0.0)), Turn("b", 2, result(0.9))])
    assert quiet([good, bad, good]) == [good, good]
    assert bad.disturbed == ["b, 2 threads: others used 0.90 cores"]


def test_everybody_has_one_turn_a_round_and_no_place_of_his_own() -> None:
    orders = [field.shuffled(list(ALL), number) for number in range(5)]
    assert all(sorted(c.key for c in order) == sorted(c.key for c in ALL) for order in orders)
    assert len({order[0].key for order in orders}) > 2 and len({order[-1].key for order in orders}) > 2
    assert orders == [field.shuffled(list(ALL), number) for number in range(5)]


def test_a_disturbed_turn_is_taken_again_and_the_quiet_one_kept() -> None:
    turns = iter([result(0.9, value=20.0), result(0.0, value=50.0)])
    waited = []
    turn = take_turn(lambda: next(turns), "a", 2, ready=lambda: waited.append(1))
    assert len(waited) == 2 and not turn.disturbed and turn.result["tests"]["decode"]["value"] == 50.0


def test_a_turn_that_stays_disturbed_is_handed_on_as_disturbed() -> None:
    calls = []
    turn = take_turn(lambda: calls.append(1) or result(0.9 - len(calls) / 10), "a", 2, tries=3)
    assert turn.disturbed and len(calls) == 3 and turn.others == pytest.approx(0.6)


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="needs /proc")
def test_another_busy_process_is_measured() -> None:
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        others = measure.Others()
        subprocess.run([sys.executable, "-c", "import time; time.sleep(1.0)"], check=True)
        assert others.cores() > LIMIT
        assert not rounds.settle(0.0)
    finally:
        busy.kill()
        busy.wait()


def test_busy_ticks_leave_idle_and_waiting_out() -> None:
    #                              user nice system idle iowait irq softirq steal guest
    assert measure.busy_ticks("cpu  10   20   30     4000 500    1   2       3     0\ncpu0 9 9 9 9") == 66


# -- what is read


def test_the_workers_line_is_read() -> None:
    assert parse('{"others": 0.0}\n', "noise", 0) == {"others": 0.0}


@pytest.mark.parametrize(
    ("stdout", "code", "says"),
    [
        ("", 1, "exit code 1"),
        ('{"others": 0.0}', -11, "exit code -11"),
        ("loading\n{}", 0, "2 lines"),
        ("not json", 0, "no JSON"),
        ("[1]", 0, "a list"),
    ],
)
def test_a_worker_that_failed_is_refused(stdout: str, code: int, says: str) -> None:
    with pytest.raises(TurnFailed, match=says):
        parse(stdout, "why it failed", code)


def test_rates_come_from_the_times_of_the_steps() -> None:
    times = [10.5, 11.0, 11.5]
    assert measure.rate("first", 10.0, times, [[1] * 32]) == 0.5
    assert measure.rate("prefill", 10.0, times, [[1] * 32]) == 64.0
    assert measure.rate("decode", 10.0, times, [[1]] * 8) == 16.0
    with pytest.raises(SystemExit, match="no kind"):
        measure.rate("speed", 10.0, times, [[1]])


class Fake:
    """A model that is right about everything, or loses `noise`."""

    def __init__(self, logits: np.ndarray, noise: float = 0.0) -> None:
        self.table, self.noise = logits, noise

    def logits(self, ids: list[int]) -> np.ndarray:
        return self.table[ids] + self.noise * np.sin(np.arange(self.table.shape[1]))

    def generate(self, _prompts: list[list[int]], new: int) -> tuple[list[float], list[int]]:
        return [measure.time.perf_counter() for _ in range(new - 1)], [0]


def scored(tmp_path: Path, noise: float) -> dict:
    generator = np.random.default_rng(0)
    table = generator.standard_normal((50, 50)).astype(np.float32)
    ids = generator.integers(0, 50, 64).tolist()
    rows = np.concatenate([table[ids[s + 7 : s + 15]] for s in range(0, 64, 16)])
    exact = rows - np.log(np.exp(rows).sum(-1, keepdims=True))
    np.save(tmp_path / "reference.npy", exact)
    job = {"reference": str(tmp_path / "reference.npy"), "ids": ids, "window": 16}
    return measure.quality(Fake(table, noise), job)


def test_the_float_model_loses_nothing_and_a_noisy_one_does(tmp_path: Path) -> None:
    exact, noisy = scored(tmp_path, 0.0), scored(tmp_path, 0.5)
    assert exact["tokens"] == 32 and exact["top1_agreement"] == 1.0
    assert exact["perplexity"] == pytest.approx(exact["perplexity_float"], rel=1e-6)
    assert abs(exact["mean_kl"]) < 1e-6
    assert noisy["mean_kl"] > 0.01 and noisy["top1_agreement"] < 1.0


def test_a_generation_that_stopped_early_is_refused() -> None:
    job = {"tests": [{"name": "decode", "kind": "decode", "runs": [[[1]]], "new": 8}]}
    with pytest.raises(SystemExit, match="7 steps came back, 8"):
        measure.measure(Fake(np.zeros((1, 1))), job)


class Timed:
    """A model whose runs decode at the rates given, each of them in `seconds` of a clock of its own."""

    def __init__(self, rates: list[float], seconds: float) -> None:
        self.rates, self.seconds, self.now, self.prompts = iter(rates), seconds, 0.0, []

    def perf_counter(self) -> float:
        return self.now

    def generate(self, prompts: list[list[int]], new: int) -> tuple[list[float], list[int]]:
        self.prompts.append(prompts[0][0])
        step, began = 1 / next(self.rates), self.now
        self.now += self.seconds
        return [began + step * i for i in range(new)], prompts[0]


@pytest.mark.parametrize(
    ("seconds", "value", "runs"),
    [(0.1, 50.0, [90.0, 20.0, 50.0, 60.0, 30.0]), (0.6, 50.0, [90.0, 20.0, 50.0]), (2.0, 90.0, [90.0])],
)
def test_runs_repeat_until_they_took_long_enough_and_the_median_counts(
    monkeypatch: pytest.MonkeyPatch, seconds: float, value: float, runs: list[float]
) -> None:
    model = Timed([90.0, 20.0, 50.0, 60.0, 30.0], seconds)
    monkeypatch.setattr(measure.time, "perf_counter", model.perf_counter)
    job = {"tests": [{"name": "decode", "kind": "decode", "runs": [[[i]] for i in range(5)], "new": 8}]}
    found = measure.measure(model, job)["decode"]
    assert found["value"] == pytest.approx(value) and found["runs"] == pytest.approx(runs)
    assert model.prompts == list(range(len(runs))) and found["tokens"] == [0]


@pytest.mark.parametrize("study", studies.ALL.values(), ids=list(studies.ALL))
def test_no_two_prompts_of_a_process_begin_alike(study: studies.Study) -> None:
    """A prefix cache would make the second one free."""
    ids = list(range(16384))
    for number in range(5):
        tests = study.of_round(ids, number, quick=False)
        prompts = [(prompt, test["new"]) for test in tests for run in test["runs"] for prompt in run]
        assert len({prompt[0] for prompt, _ in prompts}) == len(prompts)
        assert all(len(prompt) + new <= study.context for prompt, new in prompts)


def test_an_environment_that_pip_cannot_make_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.peers.environments.ROOT", tmp_path)
    monkeypatch.setattr("bench.peers.environments.NICE", ())  # beside other tests it would wait for minutes
    broken = Environment("broken", ("edgeformer-no-such-package",), ("--no-index",))
    with pytest.raises(SetupFailed, match="edgeformer-no-such-package"):
        broken.make(tmp_path / "log")
    assert not (broken.folder / ".peer").exists()


def test_gguf_bytes_count_a_tied_table_once_and_an_untied_one_not(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")

    def written(untied: bool) -> Path:
        path = tmp_path / f"{untied}.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_tensor("token_embd.weight", np.zeros((10, 32), np.float32))
        writer.add_tensor("blk.0.attn_q.weight", np.zeros((32, 32), np.float32))
        if untied:
            writer.add_tensor("output.weight", np.zeros((10, 32), np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    assert models.bytes_a_token(written(False)) == models.bytes_a_token(written(True)) == 4 * (32 * 32 + 10 * 32)


# -- what is written


def test_classes_follow_the_measured_loss() -> None:
    assert results.classes(saved()) == {"no more than 1 % lost": [OURS, PEER], "more is lost": [LOSSY]}
    unmeasured = saved()
    del unmeasured["quality"][PEER]
    assert PEER in results.classes(unmeasured)["more is lost"]


def test_the_table_shows_both_thread_counts_and_the_share_of_the_limit() -> None:
    row = next(line for line in pages.main_table(saved()).splitlines() if OURS in line)
    assert "200 (100)" in row and "x 1.002" in row
    assert "80%" in row  # 200 tokens/s of 25 GB/s : 0.1 GB


def test_a_share_above_the_memory_limit_stays_in_the_picture(monkeypatch, tmp_path) -> None:
    plots = pytest.importorskip("bench.peers.plots")
    numbers, drawn = saved(), []
    numbers["measured"][OURS]["2"]["decode"]["median"] = 350.0  # of 250 that memory gives
    monkeypatch.setattr(plots, "_save", lambda figure, _: drawn.append(figure))
    plots._share(numbers, tmp_path / "x.png", "")
    (pane,) = drawn[0].axes
    shares = [point[1] for dots in pane.collections for point in dots.get_offsets()]
    assert len(shares) == 3 and max(shares) == pytest.approx(1.4)
    assert pane.get_ylim()[1] > max(shares)
    assert pane.get_xlim()[1] > 0.3


def test_ratios_compare_with_the_best_of_the_class() -> None:
    rows = [line for line in pages.ratio_table(saved()).splitlines() if OURS in line]
    assert "**x 2.50** (200 : 80, llama.cpp Q8_0)" in rows[0]  # Q4_0 is faster, and no match: it loses 30 %
    first = next(line for line in rows if "first token" in line)
    assert "**x 2.50** (0.015 : 0.037" in first  # less is better, above 1 is still ours


def test_a_file_that_loses_more_is_compared_with_everybody() -> None:
    lossy = saved()
    lossy["quality"][OURS]["perplexity"] = 14.0
    rows = [line for line in pages.ratio_table(lossy).splitlines() if OURS in line]
    assert "(200 : 100, llama.cpp Q4_0)" in rows[0]


def test_it_is_said_where_ours_loses_more_than_the_best_of_its_class() -> None:
    worse, better = saved(), saved()
    better["quality"][OURS]["mean_kl"] = 0.0
    assert "1 of the 1 peers" in pages.loss_line(worse) and f"{PEER} with 0.0010" in pages.loss_line(worse)
    assert pages.loss_line(better) == ""


def test_it_is_said_who_used_more_threads_than_it_was_given() -> None:
    numbers = saved()
    assert pages.greedy_line(numbers) == ""
    numbers["measured"][PEER]["1"]["cores"] = {"median": 1.9}
    assert f"{PEER} used 1.90 cores with 1 thread." in pages.greedy_line(numbers)


def test_disturbed_numbers_are_marked_and_absent_peers_named() -> None:
    quiet_one, disturbed = saved(), saved()
    disturbed["undisturbed"] = False
    assert "Disturbed" not in pages.conditions(quiet_one)
    assert pages.conditions(disturbed).startswith("**Disturbed: other work ran on the machine in 1 of 6 rounds")
    assert "pip failed: no wheel" in pages.settings(quiet_one)


def test_pages_are_written_between_their_marks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "README.md").write_text("above\n<!-- speed:begin -->\nold\n<!-- speed:end -->\nbelow\n")
    page = tmp_path / "performance.md"
    page.write_text("above\n<!-- peers:begin -->\n<!-- peers:end -->\nbelow\n")
    monkeypatch.setattr(pages, "ROOT", tmp_path)
    monkeypatch.setattr(pages, "PAGE", page)
    monkeypatch.setattr(pages, "IMAGES", tmp_path / "images")
    other = saved() | {"machine": {"cpu": "Another CPU", "system": "Linux", "date": "2025-01-01"}, "threads": [2]}
    numbers = saved()
    monkeypatch.setattr(pages, "runs", lambda _: [numbers, other])
    before = copy.deepcopy(numbers)
    pages.write(numbers)
    assert numbers == before
    readme, text = (tmp_path / "README.md").read_text(), page.read_text()
    assert readme.startswith("above\n") and readme.endswith("below\n") and "old" not in readme
    assert "| **edgeformer keep (the GGUF's blocks)** | x 1.002 | 200 (100) |" in readme
    assert "| edgeformer keep (the GGUF's blocks); A CPU, 2026-01-01 | x 2.50 (2.00) |" in text
    assert "| edgeformer keep (the GGUF's blocks); Another CPU, 2025-01-01 | x 2.50 |" in text
    assert "### On another machine: Another CPU" in text
    assert "x 1.300" in text and text.endswith("below\n")
    for line in (*readme.splitlines(), *text.splitlines()):
        if line.startswith("!["):
            assert (tmp_path / "images" / line.rsplit("/", 1)[1].rstrip(")")).stat().st_size > 1000


def test_a_study_is_a_table_and_a_curve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(pages, "IMAGES", tmp_path)
    numbers = saved()
    for found in numbers["measured"].values():
        for threads in ("1", "2"):
            base = found[threads]["decode"]["median"]
            found[threads] = {f"depth {d}": {"median": base - d / 100} for d in (128, 1024)}
            found[threads]["load_s"] = {"median": 1.0}
    text = pages.curve(numbers, studies.DEPTH)
    assert f"| {PEER} | 79 (49) | 70 (40) |" in text and "load_s" not in text
    assert (tmp_path / "peers-depth.png").stat().st_size > 1000


def test_the_busy_process_of_a_study_is_no_disturbance_and_another_one_is() -> None:
    assert not Turn("a", 2, result(0.9, in_test=1.0), busy=1).disturbed
    assert Turn("a", 2, result(0.9, in_test=1.4), busy=1).disturbed


def test_medians_are_over_the_rounds_used() -> None:
    contestant = next(c for c in ALL if c.project == "llama.cpp")
    taken = [Round([Turn(contestant.key, 2, result(0.0, value=v))]) for v in (40.0, 90.0, 50.0)]
    found = results.collect(taken, [contestant], [2])[contestant.key]["2"]
    assert found["decode"] == {"median": 50.0, "min": 40.0, "max": 90.0, "n": 3}
    assert found["short_mib"]["median"] == 100.0 and found["load_s"]["median"] == 0.5


def test_every_contestant_has_its_own_name_and_runner() -> None:
    everybody = (*ALL, *ALTERNATIVES)
    assert len({c.key for c in everybody}) == len(everybody)
    for contestant in everybody:
        assert (rounds.RUNNERS / f"{contestant.runner}.py").is_file()
        assert json.loads(json.dumps(contestant.options)) == contestant.options  # a job is JSON


# -- results of several machines


def test_what_another_machine_measured_is_kept_beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    for cpu, number in (("Chip (R) A", 1), ("Chip (R) A", 2), ("Chip B, 2 cores", 3)):
        monkeypatch.setattr(report, "machine", lambda cpu=cpu: {"cpu": cpu})
        report.save("peers", {"number": number})
    assert [run["number"] for run in report.runs("peers")] == [3, 2], "the last of each machine, the newest first"
    assert report.runs("encoders") == []


def test_only_the_machine_measured_last_keeps_what_its_plot_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    for cpu in ("A", "B"):
        monkeypatch.setattr(report, "machine", lambda cpu=cpu: {"cpu": cpu})
        report.save("gap", {"measured": cpu, "timelines": [1.0]}, plotted=("timelines",))
    newest, other = report.runs("gap")
    assert newest["timelines"] == [1.0] and other == {"machine": {"cpu": "A"}, "measured": "A"}


def test_a_summary_holds_no_rounds_and_json_holds_a_summary_a_line() -> None:
    found = {"decode": report.summary([90.949579, 80.0, 100.0])}
    assert found == {"decode": {"median": 90.94958, "min": 80.0, "max": 100.0, "n": 3}}
    text = report.compact([{"measured": {str(i): found for i in range(3)}, "empty": {}}])
    assert json.loads(text) == [{"measured": {str(i): found for i in range(3)}, "empty": {}}]
    assert sum("median" in line for line in text.splitlines()) == 3
    with pytest.raises(ValueError, match="no numbers"):
        report.summary([])


def test_what_the_public_loop_keeps_is_compared_round_by_round() -> None:
    keys = [f"{results.OURS} {name}" for name in (results.STREAM, results.ENGINE)]
    pairs = ((90.0, 100.0), (45.0, 50.0), (60.0, 80.0))
    taken = [Round([Turn(k, 2, result(0.0, value=v)) for k, v in zip(keys, pair, strict=True)]) for pair in pairs]
    assert results.kept_by_stream(taken, [1, 2]) == {"2": {"median": 0.9, "min": 0.75, "max": 0.9, "n": 3}}
    assert {*keys} <= {c.key for c in ALL}
    assert "keeps 99.4% with 2 threads of" in pages.stream_line(saved())
