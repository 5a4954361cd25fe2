"""Tensors of GGUF files: each is used or refused by name, in every type that the gguf package reads, in all shards."""

from __future__ import annotations

import numpy as np
import pytest
from support import gguf_files

gguf = pytest.importorskip("gguf", reason="the toolchain needs gguf")
torch = pytest.importorskip("torch", reason="the toolchain needs torch")
pytest.importorskip("transformers", reason="the toolchain needs transformers")

from support.gguf_logits import TOLERANCE, difference

from bench.sources import gguf as sweep
from edgeformer.errors import ExportError
from edgeformer.export.sources.gguf.gguf_source import gguf_source

UNREADABLE = ("Q8_1", "Q8_K", "I8", "I16", "I32", "I64", "F64", "Q1_0")


@pytest.mark.parametrize("name", sweep.TENSORS)
def test_an_additional_tensor_is_used_or_refused(name, tmp_path):
    row = sweep._tensor(f"tensor {name}", tmp_path)
    assert row.outcome == ("honoured" if "rope" in name else "refused"), row.detail


@pytest.mark.parametrize("kind", gguf.GGMLQuantizationType, ids=lambda kind: kind.name)
def test_a_type_is_read_with_the_packages_values_or_refused_by_name(kind, tmp_path):
    row = sweep._type(f"type {kind.name}", tmp_path)
    assert row.outcome == ("refused" if kind.name in UNREADABLE else "honoured"), row.detail


@pytest.mark.parametrize("arch", ["llama", "qwen3moe"])
def test_every_shard_is_read_whichever_is_given(arch, tmp_path):
    paths = gguf_files.split(tmp_path, gguf_files.keys(arch), gguf_files.tensors(arch), arch, count=3)
    for path in paths:
        assert difference(path, *paths) < TOLERANCE


def test_factors_that_do_not_fit_the_rotated_width_are_refused(tmp_path):
    values = gguf_files.tensors() | {"rope_freqs.weight": np.ones(3, np.float32)}
    with pytest.raises(ExportError, match=r"rope_freqs\.weight has the shape \[3\]; expected 4"):
        gguf_source(gguf_files.write(tmp_path / "m.gguf", gguf_files.keys(), values))


def test_long_factors_limit_the_bundle_to_the_trained_length(tmp_path):
    values = gguf_files.tensors("phi3")
    values |= {f"rope_factors_{name}.weight": np.linspace(1, 3, 4, dtype=np.float32) for name in ("short", "long")}
    metadata = gguf_files.keys("phi3") | {"phi3.rope.scaling.original_context_length": 64}
    metadata |= {"phi3.rope.scaling.type": "longrope"}
    source = gguf_source(gguf_files.write(tmp_path / "m.gguf", metadata, values, "phi3"))
    assert source.context == 64
    assert any("rope_factors_long" in note and "not 256" in note for note in source.notes)


def test_an_untied_head_is_not_replaced_by_the_embedding(tmp_path):
    """An architecture without one refuses it; one with an optional head uses it."""
    for arch, values in (("gemma2", gguf_files.tensors("gemma2")), ("qwen2", gguf_files.tensors("qwen2"))):
        values["output.weight"] = values["token_embd.weight"][::-1].copy()
        path = gguf_files.write(tmp_path / "m.gguf", gguf_files.keys(arch), values, arch)
        if arch == "gemma2":
            with pytest.raises(ExportError, match=r"output\.weight"):
                gguf_source(path)
            continue
        assert difference(path) < TOLERANCE
        del values["output.weight"]
        assert difference(gguf_files.write(path, gguf_files.keys(arch), values, arch)) < TOLERANCE


def test_biases_that_a_flag_of_the_class_leaves_out_are_used(tmp_path):
    values, rng = gguf_files.tensors(), np.random.default_rng(1)
    for layer in range(2):
        for name, rows in (("q", 32), ("k", 16), ("v", 16), ("output", 32)):
            values[f"blk.{layer}.attn_{name}.bias"] = rng.standard_normal(rows).astype(np.float32)
    assert difference(gguf_files.write(tmp_path / "m.gguf", gguf_files.keys(), values)) < TOLERANCE
    del values["blk.1.attn_v.bias"]
    with pytest.raises(ExportError, match=r"no tensor for model\.layers\.1\.self_attn\.v_proj\.bias"):
        gguf_source(gguf_files.write(tmp_path / "m.gguf", gguf_files.keys(), values))


def test_sizes_are_checked_before_anything_is_allocated(tmp_path):
    """A width that would take 16 TiB: refused for what the file holds, at once."""
    metadata = gguf_files.keys() | {"llama.embedding_length": 1 << 20, "llama.feed_forward_length": 1 << 20}
    metadata |= {"llama.attention.key_length": 8, "llama.attention.value_length": 8}
    with pytest.raises(ExportError, match="does not fit"):
        gguf_source(gguf_files.write(tmp_path / "m.gguf", metadata, gguf_files.tensors()))


def test_a_block_with_minus_128_is_not_kept(tmp_path):
    """Kernels negate weights, and 128 does not fit in eight bits."""
    kind = gguf.GGMLQuantizationType.Q8_0
    values = gguf_files.tensors()
    raw = {name: kind for name, value in values.items() if value.ndim == 2}
    values |= {name: gguf.quantize(values[name], kind) for name in raw}
    name = "blk.0.ffn_up.weight"
    values[name][0, 2] = 128  # the first integer of the first block
    source = gguf_source(gguf_files.write(tmp_path / "m.gguf", gguf_files.keys(), values, raw=raw))
    weight = source.module.model.layers[0].mlp.up_proj.weight.detach().numpy()
    assert source.kept(weight) is None
    assert source.kept(weight[1:]) is None
    assert source.kept(source.module.model.layers[1].mlp.up_proj.weight.detach().numpy()) is not None
    assert any(f"1 Q8_0 ({name})" in note for note in source.notes)
