"""A sample of the sweep over transformers' architectures, and that the sweep itself refuses what is wrong."""

from __future__ import annotations

import re

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the workshop half needs torch")
transformers = pytest.importorskip("transformers", reason="the workshop half needs transformers")
pytest.importorskip("onnxruntime", reason="the exporter's checks need onnxruntime")

import architectures  # noqa: E402

import edgeformer  # noqa: E402
from bench import coverage  # noqa: E402
from edgeformer.export import ExportOptions, export, language_model  # noqa: E402

# Attention by hand with a bias by distance; experts; sinks beside a sliding window; positions that start at two.
SAMPLE = ("bloom", "mixtral", "gpt_oss", "xlm-roberta")


@pytest.mark.parametrize("name", SAMPLE)
def test_a_sample_of_the_sweep_works(name):
    row = coverage.examine(name)
    assert row["status"] == "works", row.get("cause") or row["engines"]
    assert row["layers"] == 2, "a KV cache for each layer"


def test_recurrent_models_are_refused_by_name_of_the_cause():
    row = coverage.examine("lfm2_moe")
    assert row["status"] == "no"
    assert "recurrent or convolution state" in row["cause"]


def test_the_sweep_refuses_wrong_logits_and_wrong_tokens():
    class Loaded:
        def __init__(self, shift, ids):
            self.shift, self.ids = shift, ids

        def logits(self, prompt):
            return reference + self.shift

        def generate(self, prompt, **options):
            return self

    reference = np.linspace(0, 1, 12, dtype=np.float32).reshape(2, 6)
    prompts, tokens = len(coverage.PROMPTS), [1, 2, 3]

    def told(loaded):
        return coverage._compare(np, loaded, [reference] * prompts, [tokens] * prompts, 1e-4, True)

    assert told(Loaded(0.0, tokens)) == "ok"
    assert "logits off by 1.0e-03" in told(Loaded(1e-3, tokens))
    assert told(Loaded(0.0, [1, 2, 4])) == "tokens [1, 2, 4] instead of [1, 2, 3]"


def test_the_page_names_every_model_and_its_cause():
    rows = {
        "one": {"status": "works", "class": "One", "layers": 2, "engines": dict.fromkeys(("cpu f32", "cpu q4"), "ok")},
        "two": {"status": "no", "stage": "export", "cause": "ExportError: Two keeps a recurrent or convolution state"},
    }
    rows["one"]["engines"] |= {"native f32": "ok", "native q4": "no: TopK. Run this bundle with cpu"}
    rows["two"]["engines"] = {}
    text = coverage.page(rows)
    assert "**1 of 2 work on `cpu`, 0 of them on `native` too.**" in text
    assert "| one | One | yes | no | TopK |" in text
    assert "| two |  | no | no | keeps a recurrent or convolution state (state-space, linear attention)" in text


def test_the_parts_of_a_composite_config_are_shrunk_too():
    model = coverage.tiny("fuyu")  # 9 billion parameters by default, in a part whose class only says "any config"
    assert sum(p.numel() for p in model.parameters()) < 1e6
    assert model(torch.tensor([[3, 5]])).logits.shape == (1, 2, 120)


@pytest.mark.parametrize(
    ("stage", "cause", "told"),
    [
        ("export", "ExportError: X keeps a recurrent or convolution state", "keeps a recurrent or convolution state"),
        ("export", "ExportError: X does not run with a plain key-value cache: IndexError", "more than keys and values"),
        ("build", "ImportError: TimmWrapperModel requires the timm library", "needs the package timm"),
        ("build", "ValueError: unknown", "not examined: .*(ValueError: unknown)"),
        ("export", "ValueError: unknown", "^ValueError: unknown$"),
    ],
)
def test_causes_are_told_in_plain_words(stage, cause, told):
    assert re.search(told, coverage.why({"stage": stage, "cause": cause, "engines": {}}))


ROPE = {
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    "llama3": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "longrope": {
        "rope_type": "longrope", "factor": 4.0, "short_factor": [1.0] * 8, "long_factor": [2.0 + i for i in range(8)],
        "original_max_position_embeddings": 32,
    },
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
}  # fmt: skip


@pytest.mark.parametrize("kind", ROPE)
def test_scaled_rotary_embeddings_hold_up_to_the_models_length(kind, tmp_path):
    torch.manual_seed(0)
    rope = ROPE[kind] | {"rope_theta": 1e4}
    config = transformers.LlamaConfig(**architectures._COMMON, rope_parameters=rope)
    module = transformers.LlamaForCausalLM._from_config(config, attn_implementation="eager").eval()
    options = ExportOptions(kind, tmp_path / "b", quantize="none", tokens=0)
    manifest = export(options, traced=language_model(module, kind))
    assert any("frozen" in note for note in manifest.get("notes", ())) == (kind == "dynamic")
    model = edgeformer.load(tmp_path / "b", engine="cpu")
    for length in (20, 60, 128):  # before, behind and far behind the length that the scaling starts from
        ids = [(7 * i) % 119 + 1 for i in range(length)]
        with torch.no_grad():
            expected = module(torch.tensor([ids]), use_cache=False).logits[0].numpy()
        assert np.abs(model.logits(ids) - expected).max() <= 1e-4 * np.ptp(expected)
