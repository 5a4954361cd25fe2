"""GGUF files through the whole export: the bundle's logits against the numpy reference, and its manifest."""

from __future__ import annotations

import json

import numpy as np
import pytest
from support import gguf_files

gguf = pytest.importorskip("gguf", reason="the toolchain needs gguf")
pytest.importorskip("torch", reason="the toolchain needs torch")
pytest.importorskip("transformers", reason="the toolchain needs transformers")
pytest.importorskip("onnxruntime", reason="the exporter's checks need onnxruntime")

from support.gguf_logits import difference
from support.gguf_reference import Reference

import edgeformer
from edgeformer.errors import ExportError
from edgeformer.export import ExportOptions, export
from edgeformer.export.sources.gguf.gguf_source import gguf_source

# The gate between PyTorch and the graph in float32; the reference is within 2e-5 of PyTorch (test_gguf_config.py).
TOLERANCE = 1e-4


def bundle_of(path, folder, **options):
    manifest = export(ExportOptions(str(path), folder, tokens=0, **options))
    return manifest, edgeformer.load(folder, engine="cpu")


@pytest.mark.parametrize("arch", ["llama", "gemma2"])
def test_a_float_bundle_has_the_logits_of_the_reference(arch, tmp_path):
    values, metadata = gguf_files.tensors(arch), gguf_files.keys(arch)
    if arch == "llama":
        values["rope_freqs.weight"] = np.linspace(1, 8, 4, dtype=np.float32)
        metadata |= {"llama.rope.scaling.attn_factor": 1.1, "general.license": "mit"}
    path = gguf_files.write(tmp_path / "m.gguf", metadata, values, arch, kind="BF16")
    manifest, model = bundle_of(path, tmp_path / "b", quantize="none")
    expected = Reference(path).logits(gguf_files.IDS)
    got = model.logits(gguf_files.IDS)
    assert np.abs(got - expected).max() < TOLERANCE * np.abs(expected).max()
    if arch == "llama":
        rope = json.loads((tmp_path / "b" / "config.json").read_text())["rope_parameters"]
        assert rope["short_factor"] == pytest.approx(np.linspace(1, 8, 4))
        assert rope["attention_factor"] == pytest.approx(1.1)
        assert manifest["provenance"]["license"] == "mit"


def test_shards_give_the_bundle_of_the_whole_file(tmp_path):
    """Equal blocks give equal bits."""
    values = gguf_files.tensors()
    whole = gguf_files.write(tmp_path / "whole.gguf", gguf_files.keys(), values, kind="Q8_0")
    parts = gguf_files.split(tmp_path, gguf_files.keys(), values, kind="Q8_0")
    expected, first = bundle_of(whole, tmp_path / "a")
    for part in parts:
        with pytest.raises(
            edgeformer.ExportError, match=r"one of 2 shards .* Name the whole in quotes: '.*-\*-of-00002"
        ):
            bundle_of(part, tmp_path / "b")
    manifest, second = bundle_of(parts[1].with_name(parts[1].name.replace("00002-of", "*-of")), tmp_path / "b")
    assert manifest["quantization"] == expected["quantization"]
    assert manifest["quantization"]["scheme"] == "keep" and "2 shards" in manifest["provenance"]["source"]
    assert np.array_equal(first.logits(gguf_files.IDS), second.logits(gguf_files.IDS))


def test_a_file_without_blocks_is_quantized_as_a_float_model_and_says_so(tmp_path):
    path = gguf_files.write(tmp_path / "m.gguf", gguf_files.keys(), gguf_files.tensors(), kind="F16")
    manifest, _ = bundle_of(path, tmp_path / "b", calibration="none")
    assert manifest["quantization"]["scheme"] == "q4a"
    assert any("16 F16" in note and "by default q4a" in note for note in manifest["notes"])
    with pytest.raises(ExportError, match="keep is for GGUF"):
        bundle_of(path, tmp_path / "c", quantize="keep")


def test_a_file_of_several_types_keeps_what_it_can_and_names_the_rest(tmp_path):
    values = gguf_files.tensors()
    kinds = {name: "Q8_0" for name, value in values.items() if value.ndim == 2} | {"blk.0.ffn_up.weight": "BF16"}
    path = gguf_files.write(tmp_path / "m.gguf", gguf_files.keys(), values, kind=kinds)
    manifest, model = bundle_of(path, tmp_path / "b")
    assert manifest["quantization"]["tensors"]["q8"] >= 15
    assert any("1 BF16 (blk.0.ffn_up.weight)" in note for note in manifest["notes"])
    # Engines round activations to int8, so the graph's weights are compared where nothing else is rounded.
    assert manifest["parity"]["dequantized"]["worst"] < TOLERANCE
    assert model.logits(gguf_files.IDS).shape == (len(gguf_files.IDS), len(gguf_files.TOKENS))
    assert difference(path) < 2e-5


def test_a_stack_of_experts_keeps_its_blocks(tmp_path):
    values = gguf_files.tensors("qwen3moe")
    rng = np.random.default_rng(2)
    for name in values:
        if "_exps" in name:
            values[name] = rng.standard_normal((4, 32, 32)).astype(np.float32) * 0.2
    metadata = gguf_files.keys("qwen3moe") | {"qwen3moe.expert_feed_forward_length": 32}
    path = gguf_files.write(tmp_path / "m.gguf", metadata, values, "qwen3moe", kind="Q8_0")
    source = gguf_source(path)
    experts = source.module.model.layers[1].mlp.experts
    for stack in (experts.gate_up_proj, experts.down_proj):  # gate and up are two tensors of the file
        for weight in stack.detach().numpy():
            kept = source.kept(weight)
            assert kept is not None and np.array_equal(kept.dequantize(), weight)
    assert difference(path) < 2e-5
