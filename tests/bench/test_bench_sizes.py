"""The benchmark over models of other sizes: the random models, who is compared with whom, what is shown."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from support.peer_results import saved

from bench.peers import models, random_models, results, sizes, sizes_page
from bench.peers.contestants import ALL
from bench.peers.environments import SetupFailed


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
    text = sizes_page.text(grown(), tmp_path)
    assert "| edgeformer q (0.5B) | x 1.50 (x 1.50) |" in text  # 60 : 40, not 60 : 15
    assert "| edgeformer q (1B) | x 3.00 (x 3.00) |" in text
    assert "edgeformer q (1B) 90%." in text and "(0.5B) 120%" not in text  # the limit is asked for from 1B on
    assert "| **edgeformer q** | 500 | 45 (22) | 90% (94%) |" in text
    assert (tmp_path / "peers-sizes.png").stat().st_size > 1000


def test_a_first_token_is_faster_when_it_takes_less() -> None:
    peers = sizes_page.peers_of(grown(), "1B")
    assert results.best_peer(grown(), peers, 2, "first") == ("llama.cpp q (1B)", pytest.approx(1 / 15))
    assert "x 3.00 (x 3.00) |" in sizes_page.ratio_table(grown(), ["1B"]).splitlines()[-1][-20:]


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
    monkeypatch.setattr(random_models, "float_folder", lambda _: tmp_path)
    monkeypatch.setattr(
        sizes, "run", lambda command, _log, _variables, what: began.append(what) or Path(command[5]).mkdir()
    )
    monkeypatch.setattr(sizes, "available_gib", lambda: 12.0)
    with pytest.raises(SetupFailed, match="the export of 3B takes about 16 GiB of memory, 12 are free"):
        sizes.bundle(sizes.SIZES["3B"], "q4a")
    assert sizes.bundle(sizes.SIZES["1B"], "q4a").is_dir() and began == ["export q4a of 1B"]


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="needs /proc")
def test_free_memory_is_read() -> None:
    assert 0.05 < sizes.available_gib() < 1e5
