"""LoRA adapters: the bundle's logits are those of base and adapter together, as PEFT computes them unmerged."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the toolchain needs torch")
transformers = pytest.importorskip("transformers", reason="the toolchain needs transformers")
peft = pytest.importorskip("peft", reason="PEFT is the reference")
pytest.importorskip("onnxruntime", reason="the exporter's checks need onnxruntime")

from support import architectures

import edgeformer
from edgeformer.errors import ExportError
from edgeformer.export import ExportOptions, export
from edgeformer.export.sources.load import load_source

PROMPT = [1, 17, 33, 90, 5]
CASES = {
    "plain": ("qwen3", {"target_modules": ["q_proj", "v_proj", "down_proj"]}),
    "rank-stabilized, patterns": (
        "qwen3",
        {
            "target_modules": "all-linear", "use_rslora": True, "rank_pattern": {"q_proj": 2},
            "alpha_pattern": {"layers.1.self_attn.q_proj": 3},
        },
    ),
    "[in, out] layers": ("gpt2", {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}),
    "embedding": ("qwen3", {"target_modules": ["embed_tokens", "o_proj"]}),
    "dora": ("qwen3", {"target_modules": ["q_proj", "up_proj"], "use_dora": True}),
    "whole parameters, biases": (
        "opt", {"target_modules": ["q_proj"], "bias": "lora_only", "modules_to_save": ["final_layer_norm"]},
    ),
    "a head that was tied": ("gemma2", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "an embedding that the head shares": ("gemma2", {"target_modules": ["embed_tokens"]}),
    "both ends of it": ("gemma2", {"target_modules": ["embed_tokens", "lm_head"], "ensure_weight_tying": True}),
    "tokens of it": ("gemma2", {"target_modules": ["q_proj"], "trainable_token_indices": [17, 33]}),
}  # fmt: skip


def adapted(name, options, base, place):
    """A base folder at `base`, an adapter with random weights at `place`; returns PEFT's own logits."""
    model = architectures.make(name)
    model.save_pretrained(base)
    torch.manual_seed(1)
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, **options)).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * (0.5 if "lora_" in key else 0.2))
        logits = model(torch.tensor([PROMPT])).logits[0].numpy()
    model.save_pretrained(place)
    return logits


@pytest.mark.parametrize("case", CASES)
def test_merged_logits_are_those_of_peft(case, tmp_path):
    name, options = CASES[case]
    expected = adapted(name, options, tmp_path / "base", tmp_path / "adapter")
    plain = architectures.make(name)(torch.tensor([PROMPT])).logits[0].detach().numpy()
    span = expected.max() - expected.min()
    assert np.abs(plain - expected).max() > 1e-2 * span, "the adapter must change something"
    source = load_source(ExportOptions(str(tmp_path / "base"), tmp_path / "b", adapter=tmp_path / "adapter"))
    with torch.no_grad():
        found = source.module(torch.tensor([PROMPT])).logits[0].numpy()
    assert np.abs(found - expected).max() <= 1e-5 * span


def test_the_bundle_has_the_adapter_in_it(tmp_path):
    expected = adapted("qwen3", CASES["plain"][1], tmp_path / "base", tmp_path / "adapter")
    options = ExportOptions(
        str(tmp_path / "base"), tmp_path / "b", adapter=tmp_path / "adapter", quantize="none", tokens=0
    )
    manifest = export(options)
    assert manifest["provenance"]["source"].endswith("+ adapter adapter (LoRA, 6 layers)")
    found = edgeformer.load(tmp_path / "b", engine="cpu").logits(PROMPT)
    assert np.abs(found - expected).max() <= 1e-4 * (expected.max() - expected.min())


def test_an_adapter_of_another_model_is_refused(tmp_path):
    adapted("gpt2", CASES["[in, out] layers"][1], tmp_path / "other", tmp_path / "adapter")
    architectures.make("qwen3").save_pretrained(tmp_path / "base")
    with pytest.raises(ExportError, match=r"does not fit Qwen3ForCausalLM: Target modules .*trained on another"):
        export(ExportOptions(str(tmp_path / "base"), tmp_path / "b", adapter=tmp_path / "adapter"))
    assert not (tmp_path / "b").exists()


def test_one_of_another_size_is_refused_with_both_shapes(tmp_path):
    adapted("qwen3", CASES["plain"][1], tmp_path / "base", tmp_path / "adapter")
    config = architectures.CONFIGS["qwen3"] | {"hidden_size": 32}
    transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**config)).save_pretrained(tmp_path / "small")
    with pytest.raises(ExportError, match=r"size mismatch.*\[4, 64\].*\[4, 32\].*It was trained on another"):
        export(ExportOptions(str(tmp_path / "small"), tmp_path / "b", adapter=tmp_path / "adapter"))
