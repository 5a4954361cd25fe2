"""Metadata of GGUF files: each architecture and each key gives the numpy reference's results, or is refused."""

from __future__ import annotations

import numpy as np
import pytest
from support import gguf_files

torch = pytest.importorskip("torch", reason="the toolchain needs torch")
pytest.importorskip("gguf", reason="the toolchain needs gguf")
pytest.importorskip("transformers", reason="the toolchain needs transformers")

from support.gguf_logits import TOLERANCE, difference
from support.gguf_reference import Reference

from bench.sources import gguf as sweep
from bench.sources._gguf_trials import TEXTS
from edgeformer.errors import ExportError
from edgeformer.export.sources.gguf import keys
from edgeformer.export.sources.gguf.gguf_source import gguf_source

STRUCTURES = (
    "llama", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "qwen2moe", "qwen3moe", "stablelm", "starcoder2", "gpt2",
)  # fmt: skip


@pytest.mark.parametrize("arch", STRUCTURES)
def test_an_architecture_has_the_logits_of_the_reference(arch, tmp_path):
    path = gguf_files.write(tmp_path / "m.gguf", gguf_files.keys(arch), gguf_files.tensors(arch), arch)
    assert difference(path) < TOLERANCE


def test_the_reference_tells_a_wrong_key(tmp_path):
    """A model with another window, base or epsilon is far outside of the tolerance."""
    values = gguf_files.tensors("gemma2")
    path = gguf_files.write(tmp_path / "m.gguf", gguf_files.keys("gemma2"), values, "gemma2")
    expected = Reference(path).logits(gguf_files.IDS)
    for more in ({"ARCH__attention__sliding_window": 12}, {"ARCH__rope__freq_base": 9000.0}):
        other = gguf_files.write(tmp_path / "o.gguf", gguf_files.keys("gemma2", **more), values, "gemma2")
        moved = np.abs(Reference(other).logits(gguf_files.IDS) - expected).max() / np.abs(expected).max()
        assert moved > 10 * TOLERANCE


def test_every_key_of_the_gguf_package_has_a_rule():
    known = {*keys.REQUIRED, *keys.OPTIONAL, *keys.ONLY_NEUTRAL, *keys.SPECIAL, *keys.IGNORED_KEYS}
    tokenizer = {f"tokenizer.ggml.{name}" for name in {*keys.TOKENIZER_READ, *keys.IGNORED_TOKENIZER_KEYS}}
    tokenizer |= {keys.HUGGING_FACE, *keys.TEMPLATES, "tokenizer.chat_template.{name}"}
    unruled = [
        key
        for key in sweep.all_keys()
        if key.removeprefix("{arch}.") not in known
        and key not in tokenizer
        and not key.startswith(("general.", "split.", *keys.OTHER_KINDS))
    ]
    assert unruled == ["{arch}.{dense}_feat_in", "{arch}.{dense}_feat_out"]  # with free names: refused as unknown


def test_every_tokenizer_key_has_a_trial():
    texts = {key for key in sweep.all_keys() if key.startswith("tokenizer.")}
    ruled = {f"tokenizer.ggml.{name}" for name in keys.IGNORED_TOKENIZER_KEYS}
    assert texts - ruled - TEXTS.keys() == set()


HONOURED = (
    "attn_logit_softcapping", "final_logit_softcapping", "attention.scale", "attention.sliding_window",
    "attention.sliding_window_pattern", "expert_weights_norm", "rope.dimension_count", "rope.freq_base",
    "rope.freq_base_swa", "rope.scale_linear", "rope.scaling.type", "rope.scaling.factor", "rope.scaling.attn_factor",
    "rope.scaling.original_context_length", "rope.scaling.yarn_attn_factor", "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow",
)  # fmt: skip
REFUSED = (
    "attention.causal", "attention.clamp_kqv", "attention.max_alibi_bias", "attention.output_scale", "logit_scale",
    "embedding_scale", "residual_scale", "expert_weights_scale", "expert_gating_func", "router_logit_softcapping",
    "rope.scaling.alpha", "rope.dimension_sections", "use_parallel_residual", "nextn_predict_layers", "pooling_type",
)  # fmt: skip


@pytest.mark.parametrize("key", HONOURED)
def test_a_key_that_transformers_ignores_changes_the_logits_as_in_the_reference(key, tmp_path):
    row = sweep._key(key, "{arch}." + key, tmp_path)
    assert row.outcome == "honoured", row.detail


@pytest.mark.parametrize("key", REFUSED)
def test_an_unsupported_key_is_refused_with_its_value(key, tmp_path):
    row = sweep._key(key, "{arch}." + key, tmp_path)
    assert row.outcome == "refused", row.detail


@pytest.mark.parametrize("key", ["context_length", "embedding_length", "block_count", "attention.head_count"])
def test_a_missing_size_has_no_default(key, tmp_path):
    metadata = gguf_files.keys() | {f"llama.{key}": None}
    path = gguf_files.write(tmp_path / "m.gguf", metadata, gguf_files.tensors())
    with pytest.raises(ExportError, match=rf"has no llama\.{key}.*have no default"):
        gguf_source(path)


def test_without_a_number_of_kv_heads_every_head_has_its_own(tmp_path):
    """Without that key transformers' reader keeps the rows of queries and keys in llama.cpp's order."""
    values = gguf_files.tensors("gemma2") | gguf_files.tensors()
    values = {name: value for name, value in values.items() if "post_" not in name}
    rng = np.random.default_rng(3)
    for name in values:
        if name.endswith(("attn_k.weight", "attn_v.weight")):
            values[name] = rng.standard_normal((32, 32)).astype(np.float32)
    metadata = gguf_files.keys() | {"llama.attention.head_count_kv": None}
    assert difference(gguf_files.write(tmp_path / "m.gguf", metadata, values)) < TOLERANCE


def test_a_value_per_layer_is_read_if_all_are_equal(tmp_path):
    metadata = gguf_files.keys() | {"llama.attention.head_count_kv": [2, 2], "llama.feed_forward_length": [64, 64]}
    assert difference(gguf_files.write(tmp_path / "m.gguf", metadata, gguf_files.tensors())) < TOLERANCE
    metadata["llama.feed_forward_length"] = [64, 32]
    with pytest.raises(ExportError, match="the same for all layers"):
        gguf_source(gguf_files.write(tmp_path / "m.gguf", metadata, gguf_files.tensors()))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("llama.embedding_length", "32"),
        ("llama.block_count", 0),
        ("llama.rope.freq_base", float("nan")),
        ("llama.attention.layer_norm_rms_epsilon", float("inf")),
        ("llama.attention.head_count", 5),
    ],
)
def test_an_invalid_size_or_number_is_refused(key, value, tmp_path):
    path = gguf_files.write(tmp_path / "m.gguf", gguf_files.keys() | {key: value}, gguf_files.tensors())
    with pytest.raises(ExportError, match=key.replace(".", r"\.")):
        gguf_source(path)


def test_a_scale_that_only_the_config_class_has_is_refused(tmp_path):
    metadata = gguf_files.keys("gemma2") | {"gemma2.attention.scale": None}
    path = gguf_files.write(tmp_path / "m.gguf", metadata, gguf_files.tensors("gemma2"), "gemma2")
    with pytest.raises(ExportError, match=r"has no gemma2\.attention\.scale"):
        gguf_source(path)


@pytest.mark.parametrize("key", ["attention.sliding_window", "attn_logit_softcapping", "final_logit_softcapping"])
def test_a_missing_window_or_cap_does_not_get_another_models_default(key, tmp_path):
    metadata = gguf_files.keys("gemma2") | {f"gemma2.{key}": None}
    path = gguf_files.write(tmp_path / "m.gguf", metadata, gguf_files.tensors("gemma2"), "gemma2")
    with pytest.raises(ExportError, match=rf"has no gemma2\.{key}"):
        gguf_source(path)


def test_a_cap_of_zero_is_no_cap(tmp_path):
    metadata = gguf_files.keys("gemma2") | {"gemma2.attn_logit_softcapping": 0.0, "gemma2.final_logit_softcapping": 0.0}
    assert (
        difference(gguf_files.write(tmp_path / "m.gguf", metadata, gguf_files.tensors("gemma2"), "gemma2")) < TOLERANCE
    )
