"""The benchmark against the peers: what it rejects, what it reads, what it writes. No peer is installed here."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from bench import encoders
from bench.arm import __main__ as arm
from bench.peers import models, pages, random_models, rounds, sizes, studies
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


def test_a_disturbed_turn_is_taken_again_and_the_quiet_one_kept() -> None:
    results = iter([result(0.9, value=20.0), result(0.0, value=50.0)])
    waited = []
    turn = take_turn(lambda: next(results), "a", 2, ready=lambda: waited.append(1))
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

    def generate(self, prompts: list[list[int]], new: int) -> tuple[list[float], list[int]]:
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
    job = {"tests": [{"name": "decode", "kind": "decode", "prompts": [[1]], "new": 8}]}
    with pytest.raises(SystemExit, match="7 steps came back, 8"):
        measure.measure(Fake(np.zeros((1, 1))), job)


@pytest.mark.parametrize("study", studies.ALL.values(), ids=list(studies.ALL))
def test_no_two_prompts_of_a_process_begin_alike(study: studies.Study) -> None:
    """A prefix cache would make the second one free."""
    ids = list(range(16384))
    for number in range(5):
        tests = study.of_round(ids, number, quick=False)
        prompts = [prompt for test in tests for prompt in test["prompts"]]
        assert len({prompt[0] for prompt in prompts}) == len(prompts)
        assert all(len(prompt) + test["new"] <= study.context for test in tests for prompt in test["prompts"])


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

OURS, PEER, LOSSY = "edgeformer keep (the GGUF's blocks)", "llama.cpp Q8_0", "llama.cpp Q4_0"


def saved() -> dict:
    def numbers(speed: float) -> dict:
        return {
            "decode": {"median": speed, "values": [speed]},
            "first": {"median": 3 / speed, "values": [3 / speed]},
            "short_mib": {"median": 150.0, "values": [150.0]},
        }

    def quality(ratio: float) -> dict:
        return {"perplexity": 10 * ratio, "perplexity_float": 10.0, "mean_kl": ratio - 1}

    speeds = {OURS: (200.0, 100.0), PEER: (80.0, 50.0), LOSSY: (100.0, 60.0)}
    return {
        "machine": {"cpu": "A CPU", "system": "Linux", "date": "2026-01-01"},
        "threads": [1, 2],
        "rounds": {"taken": 6, "used": 5, "disturbed": [["x"], [], [], [], [], []]},
        "undisturbed": True,
        "limit_cores_of_others": LIMIT,
        "contestants": {
            key: {"project": key.split()[0], "settings": "s", "file_bytes": 1e8, "token_bytes": 1e8} for key in speeds
        },
        "absent": {"OpenVINO GenAI int8": "pip failed: no wheel"},
        "quality": {OURS: quality(1.002), PEER: quality(1.001), LOSSY: quality(1.3)},
        "memory": {"1": [{"gb_s": 12.0}], "2": [{"gb_s": 25.0}]},
        "measured": {
            key: {"2": numbers(two), "1": numbers(one), "versions": {"p": "1"}} for key, (two, one) in speeds.items()
        },
    }


def test_classes_follow_the_measured_loss() -> None:
    assert pages.classes(saved()) == {"no more than 1 % lost": [OURS, PEER], "more is lost": [LOSSY]}
    unmeasured = saved()
    del unmeasured["quality"][PEER]
    assert PEER in pages.classes(unmeasured)["more is lost"]


def test_the_table_shows_both_thread_counts_and_the_share_of_the_limit() -> None:
    row = next(line for line in pages.main_table(saved()).splitlines() if OURS in line)
    assert "200 (100)" in row and "x 1.002" in row
    assert "80%" in row  # 200 tokens/s of 25 GB/s : 0.1 GB


def test_a_share_above_the_memory_limit_stays_in_the_picture(monkeypatch, tmp_path) -> None:
    plots = pytest.importorskip("bench.peers.plots")
    numbers, drawn = saved(), []
    numbers["measured"][OURS]["2"]["decode"]["median"] = 350.0  # of 250 that memory gives
    monkeypatch.setattr(plots, "_save", lambda figure, path: drawn.append(figure))
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
    numbers = saved()
    before = copy.deepcopy(numbers)
    pages.write(numbers)
    assert numbers == before
    readme, text = (tmp_path / "README.md").read_text(), page.read_text()
    assert readme.startswith("above\n") and readme.endswith("below\n") and "old" not in readme
    assert "| **edgeformer keep (the GGUF's blocks)** | x 1.002 | 200 (100) |" in readme
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
    found = pages.collect(taken, [contestant], [2])[contestant.key]["2"]
    assert found["decode"] == {"median": 50.0, "values": [40.0, 90.0, 50.0]}
    assert found["short_mib"]["median"] == 100.0 and found["load_s"]["median"] == 0.5
    assert rounds.median([]) is None


def test_every_contestant_has_its_own_name_and_runner() -> None:
    everybody = (*ALL, *ALTERNATIVES)
    assert len({c.key for c in everybody}) == len(everybody)
    for contestant in everybody:
        assert (rounds.RUNNERS / f"{contestant.runner}.py").is_file()
        assert json.loads(json.dumps(contestant.options)) == contestant.options  # a job is JSON


# -- encoders


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
    assert "x 1.20 to x 1.30" in encoders.readme_line(encoded())


def test_it_is_said_where_cpu_is_the_faster_engine_of_the_two() -> None:
    numbers = encoded()
    assert encoders.auto_line(numbers) == "`cpu` is faster than `native` in: 1 x 16 with 2 threads (x 1.03)."
    numbers["measured"]["edgeformer q8, cpu"]["2"]["1 x 16"]["median"] = 300.0
    assert "`auto` is right" in encoders.auto_line(numbers)


def test_every_encoder_has_its_own_name_and_runner() -> None:
    assert len({c.key for c in encoders.ALL}) == len(encoders.ALL)
    assert all((rounds.RUNNERS / f"{c.runner}.py").is_file() for c in encoders.ALL)


# -- models of other sizes


def tiny(shape: str) -> dict:
    """The config of a shape, small enough for a test."""
    smaller = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = sizes.SIZES[shape].config
    return config | smaller | heads | ({"head_dim": 16} if "head_dim" in config else {})


@pytest.mark.parametrize("shape", list(sizes.SIZES))
def test_random_weights_are_a_whole_model(tmp_path: Path, shape: str) -> None:
    """transformers finds every tensor it looks for, and as many parameters as the full shape is said to have."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    config = tiny(shape)
    (tmp_path / "config.json").write_text(json.dumps(random_models.COMMON | config))
    random_models.write_safetensors(tmp_path / "model.safetensors", config)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, output_loading_info=True)
    model, info = loaded
    assert not any(info.values())
    assert model.lm_head.weight is model.model.embed_tokens.weight
    name = "model.layers.1.self_attn.k_proj.weight"
    assert (model.state_dict()[name].numpy() == random_models.drawn(name, (32, 64))).all()
    full = sum(int(np.prod(s)) for s in random_models.tensors(sizes.SIZES[shape].config).values())
    assert full / 1e9 == pytest.approx(sizes.SIZES[shape].parameters, abs=0.0006)


def test_a_random_tensor_is_its_name_and_shape() -> None:
    one, two = (random_models.drawn(name, (5000, 16)) for name in ("a.weight", "b.weight"))
    assert (one == random_models.drawn("a.weight", (5000, 16))).all() and (one != two).mean() > 0.9
    assert one[4096:].std() == pytest.approx(random_models.DEVIATION, rel=0.05)  # the second part is drawn too
    assert (random_models.drawn("model.norm.weight", (8,)) == 1).all()


def test_rows_for_llama_cpp_turn_as_neighbours_where_hugging_face_turns_halves() -> None:
    rng = np.random.default_rng(0)
    matrix, angles = rng.standard_normal((3 * 8, 5)), rng.standard_normal(4)
    rows = matrix.reshape(3, 2, 4, 5)
    low, high = rows[:, 0], rows[:, 1]
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
    halves = np.stack([low * cos - high * sin, high * cos + low * sin], 1).reshape(24, 5)
    pairs = random_models.adjacent_pairs(matrix, 3).reshape(3, 4, 2, 5)
    even, odd = pairs[:, :, 0], pairs[:, :, 1]
    neighbours = np.stack([even * cos - odd * sin, odd * cos + even * sin], 2).reshape(24, 5)
    assert np.allclose(neighbours, random_models.adjacent_pairs(halves, 3))
    assert not np.allclose(neighbours, halves)


@pytest.mark.parametrize(("shape", "permuted"), [("0.5B", False), ("1B", True)])
def test_the_gguf_has_the_folders_numbers(tmp_path: Path, shape: str, permuted: bool) -> None:
    gguf, config = pytest.importorskip("gguf"), tiny(shape)
    random_models.write_gguf(tmp_path / "model.gguf", config)
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    found = {t.name: np.array(t.data) for t in reader.tensors}
    assert len(found) == len(random_models.tensors(config))
    down = random_models.drawn("model.layers.1.mlp.down_proj.weight", (64, 96))
    assert (found["blk.1.ffn_down.weight"] == down).all()
    k = random_models.drawn("model.layers.0.self_attn.k_proj.weight", (32, 64))
    assert (found["blk.0.attn_k.weight"] == (random_models.adjacent_pairs(k, 2) if permuted else k)).all()
    assert found["output_norm.weight"].dtype == np.float32
    assert ("blk.0.attn_q.bias" in found) is not permuted  # Qwen2 has biases, Llama has none
    assert reader.get_field(f"{config['model_type']}.vocab_size").contents() == 96


def test_sizes_are_chosen_by_name() -> None:
    keys = [c.key for c in sizes.chosen("1B")]
    assert len(set(keys)) == len(keys) and all(key.endswith("(1B)") for key in keys)
    assert not set(keys) & {c.key for c in ALL}
    with pytest.raises(SystemExit, match=r"no size 7B; there are 0\.5B, 1B, 3B"):
        sizes.chosen("1B,7B")


def grown() -> dict:
    """Two sizes; ours reaches 90 % of the memory limit at 1B with 2 threads."""

    def tests(speed: float, first: float) -> dict:
        return {"decode": {"median": speed}, "prefill512": {"median": 10 * speed}, "first": {"median": first}}

    numbers = saved()
    rows = {
        ("edgeformer", "0.5B"): 60.0,
        ("edgeformer", "1B"): 45.0,
        ("llama.cpp", "0.5B"): 40.0,
        ("llama.cpp", "1B"): 15.0,
    }
    numbers["contestants"] = {
        f"{project} q ({size})": {"project": project, "name": "q", "size": size, "token_bytes": 5e8, "file_bytes": 5e8}
        for project, size in rows
    }
    numbers["measured"] = {
        f"{project} q ({size})": {"2": tests(speed, 1 / speed), "1": tests(speed / 2, 2 / speed), "versions": {}}
        for (project, size), speed in rows.items()
    }
    return numbers


def test_sizes_are_compared_with_the_fastest_peer_of_their_own_size(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    text = sizes.text(grown(), tmp_path)
    assert "| edgeformer q (0.5B) | x 1.50 (x 1.50) |" in text  # 60 : 40, not 60 : 15
    assert "| edgeformer q (1B) | x 3.00 (x 3.00) |" in text
    assert "edgeformer q (1B) 90%." in text and "(0.5B) 120%" not in text  # the limit is asked for from 1B on
    assert "| **edgeformer q** | 500 | 45 (22) | 90% (94%) |" in text
    assert (tmp_path / "peers-sizes.png").stat().st_size > 1000


def test_a_first_token_is_faster_when_it_takes_less() -> None:
    assert sizes.best_peer(grown(), "1B", 2, "first") == ("llama.cpp q (1B)", pytest.approx(1 / 15))
    assert "x 3.00 (x 3.00) |" in sizes.ratio_table(grown(), ["1B"]).splitlines()[-1][-20:]


# -- instructions on ARM

LISTING = """
linear:     file format elf64-littleaarch64

0000000000400580 <main>:
  400580:\tsdot\tv20.4s, v1.16b, v2.4b[0]
  400584:\tldr\tq3, [x1, #16]
  400588:\tstr\tq3, [sp, #32]
  40058c:\tand\tv1.16b, v2.16b, v3.16b
  400590:\tand\tx1, x2, #0xf
  400594:\tadd\tv1.4s, v1.4s, v2.4s
  400598:\tb.lt\t400580 <main>
  40059c:\tmov\tv1.16b, v2.16b
  4005a0:\tret
"""


def test_an_instruction_is_sorted_by_what_it_is_for() -> None:
    kinds = [arm.kind(*found) for found in arm.parse_disassembly(LISTING).values()]
    rest = "addresses, loops"
    scaled = "to float, scales"
    assert kinds == ["dots", "loads, stores", "spills", "unpacking", rest, scaled, rest, "moves", rest]
    assert set(kinds) <= set(arm.ORDER)


def test_only_what_the_second_call_ran_is_counted() -> None:
    assert arm.one_call({4: 10, 8: 7}, {4: 16, 8: 7, 12: 2}) == {4: 6, 12: 2}


def test_the_floor_is_the_number_of_dot_products() -> None:
    assert arm.floor("neon_dotprod", 16, 32, 1) == 32
    assert arm.floor("neon_dotprod", 17, 33, 1) == 128  # a panel and a block begun are done whole
    assert arm.floor("neon_i8mm", 16, 32, 64) == 64 * 16
    assert arm.floor("neon_i8mm", 16, 32, 3) == 32 + 32  # two rows by SMMLA, the third by SDOT


def test_the_plugin_counts_every_instruction(tmp_path: Path) -> None:
    missing = [tool for tool in arm.TOOLS if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"needs {', '.join(missing)}")
    source, program = tmp_path / "loop.cpp", tmp_path / "loop"
    source.write_text(
        "#include <cstdlib>\n"
        "int main(int, char** v) {\n"
        '  for (int i = std::atoi(v[1]); i; i--) asm volatile("sdot v0.4s, v1.16b, v2.16b" ::: "v0");\n'
        "}\n"
    )
    flags = ["-O1", "-static", "-no-pie", "-march=armv8.2-a+dotprod"]
    subprocess.run([arm.COMPILER, *flags, str(source), "-o", str(program)], check=True)
    listing, plugin = arm.disassemble(program), arm.build_plugin(tmp_path)
    counts = arm.run(program, plugin, ["12345"])
    assert sum(count for address, count in counts.items() if listing[address][0] == "sdot") == 12345
    more = arm.one_call(counts, arm.run(program, plugin, ["12346"]))
    assert sum(count for address, count in more.items() if listing[address][0] == "sdot") == 1


def test_the_instructions_are_shown_for_each_of_the_floor() -> None:
    kernel = {"isa": "neon_dotprod", "scheme": "q4", "rows": 64, "floor": 100}
    numbers = saved() | {
        "compiler": "g++ 1",
        "kernels": [kernel | {"kinds": {"dots": 100, "spills": 45}}, kernel | {"kinds": {"dots": 100, "moves": 60}}],
        "tokens": [{"model": "m", "isa": "neon_dotprod", "rows": 1, "floor": 8e6, "instructions": 10e6}],
    }
    numbers["machine"]["versions"] = {}
    text = arm.text(numbers)
    assert "| neon_dotprod | q4 | 64 | **1.45** | 1.00 | 0.00 | 0.00 | 0.00 | 0.45 |" in text
    assert "1 of 2 cases are within 1.5" in text
    assert "| m | decoding | neon_dotprod | 10.0 M | 8.0 M | x 1.25 |" in text


def test_bytes_of_a_bundle_are_what_the_engine_packs(bundles) -> None:
    """8.5 bits a weight in q8, for whole panels of 16 rows, blocks of 32 columns; the file has float32 scales, so 9."""
    onnx, path = pytest.importorskip("onnx"), bundles / "q8"
    graph = onnx.load(str(path / "model.onnx"), load_external_data=False).graph
    turned = {node.input[0] for node in graph.node if node.op_type == "Transpose"}
    weights = [w.dims for w in graph.initializer if w.name in turned and w.data_type == onnx.TensorProto.INT8]
    packed = sum(-(-n // 16) * 16 * -(-k // 32) * 32 * 17 // 16 for n, k in weights)
    assert len(weights) > 4 and models.bytes_a_token(path) == packed


def test_an_export_that_does_not_fit_into_memory_is_not_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    began: list[str] = []
    monkeypatch.setattr(models, "OUT", tmp_path)
    monkeypatch.setattr(models, "ROOT", tmp_path)
    monkeypatch.setattr(random_models, "float_folder", lambda shape: tmp_path)
    monkeypatch.setattr(
        sizes, "run", lambda command, log, variables, what: began.append(what) or Path(command[5]).mkdir()
    )
    monkeypatch.setattr(sizes, "available_gib", lambda: 12.0)
    with pytest.raises(SetupFailed, match="the export of 3B takes about 16 GiB of memory, 12 are free"):
        sizes.bundle(sizes.SIZES["3B"], "q4a")
    assert sizes.bundle(sizes.SIZES["1B"], "q4a").is_dir() and began == ["export q4a of 1B"]


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="needs /proc")
def test_free_memory_is_read() -> None:
    assert 0.05 < sizes.available_gib() < 1e5
