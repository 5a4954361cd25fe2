"""A real model end to end: SmolLM2-135M-Instruct from its GGUF file, against transformers and the file itself."""

from __future__ import annotations

import json

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import edgeformer

pytestmark = pytest.mark.slow

PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):",
    "Once upon a time, in a small village by the sea,",
    "Water boils at",
    [{"role": "user", "content": "Name three things that float on water."}],
)


def test_the_float_bundle_gives_the_tokens_of_transformers(smollm2, smollm2_traced):
    import torch

    model = edgeformer.load(smollm2("none"), engine="cpu")
    reference = smollm2_traced.source.module
    for prompt in PROMPTS:
        ids = torch.tensor([model.encode_prompt(prompt)])
        out = reference.generate(ids, max_new_tokens=64, do_sample=False, attention_mask=torch.ones_like(ids))
        expected = out[0, ids.shape[1] :].tolist()
        ended_by_eos = expected[-1:] == [reference.generation_config.eos_token_id]
        result = model.generate(prompt, max_new_tokens=64)
        assert list(result.ids) == expected
        assert result.finish_reason == ("eos" if ended_by_eos else "length")


def test_a_bundle_of_scheme_keep_has_the_gguf_files_own_weights(smollm2, smollm2_gguf):
    """Dequantized from model.onnx with numpy, and from the GGUF file with the gguf package: equal bits."""
    import gguf

    folder = smollm2("keep")
    model = onnx.load(folder / "model.onnx")
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    rows = {}
    for tensor in gguf.GGUFReader(smollm2_gguf).tensors:
        if len(tensor.shape) == 2:
            for row in np.asarray(gguf.dequantize(tensor.data, tensor.tensor_type), np.float32):
                rows[row.tobytes()] = tensor.name
    checked = 0
    for name, q in arrays.items():
        if not name.endswith(".q"):
            continue
        scale = arrays[name.removesuffix("q") + "scale"].repeat(32, axis=1)
        minimum = arrays.get(name.removesuffix("q") + "minimum")
        if minimum is None:
            values = scale * q.astype(np.float32)
        else:  # INT4 is signed: q - 8 and minimum + 8 scale are stored, both invertible without rounding
            m = (
                (minimum - np.float32(8) * arrays[name.removesuffix("q") + "scale"])
                .astype(np.float16)
                .astype(np.float32)
            )
            values = scale * (q.astype(np.float32) + np.float32(8)) + m.repeat(32, axis=1)
        assert all(row.tobytes() in rows for row in values), f"{name} has a row that is not in the file"
        checked += 1
    assert checked == 211


def test_scheme_keep_loses_no_accuracy_and_quantizing_again_to_q4_does(smollm2):
    accuracy = {
        scheme: json.loads((smollm2(scheme) / "edgeformer.json").read_text())["accuracy"]
        for scheme in ("keep", "q8", "q4")
    }
    kept = accuracy["keep"]
    assert kept["perplexity"] / kept["perplexity_float"] < 1.005
    assert kept["mean_kl"] < accuracy["q4"]["mean_kl"] / 5, "q4 loses more than keep, and the report shows it"
    q8 = accuracy["q8"]
    assert q8["mean_kl"] < 0.01
    # The log-likelihood of a token changes by about sqrt(2 KL), so the mean over n tokens by sqrt(2 KL / n).
    noise = 3 * np.sqrt(2 * q8["mean_kl"] / q8["tokens"])
    assert abs(np.log(q8["perplexity"] / q8["perplexity_float"])) < q8["mean_kl"] + noise


@pytest.mark.parametrize("scheme", ["keep", "q8", "q4"])
def test_every_engine_is_bounded_by_what_rounding_does_to_most_rows(smollm2, scheme):
    """The worst value alone would allow up to the whole range: it is that of one unstable row."""
    engines = json.loads((smollm2(scheme) / "edgeformer.json").read_text())["parity"]["engines"]
    for name in ("native", "cpu"):
        assert engines[name]["passed"] is True, engines[name].get("problem")
        assert [one["quantile"] for one in engines[name]["rows"]] == [0.5, 0.9, 0.98]
        for one in engines[name]["rows"]:
            assert one["worst"] <= one["tolerance"] < 0.08


def test_a_chat_answer_has_text_and_no_template_tokens(smollm2):
    model = edgeformer.load(smollm2("keep"), engine="cpu")
    result = model.generate([{"role": "user", "content": "What is the capital of France?"}], max_new_tokens=32)
    assert result.text.strip() and "<|im" not in result.text
