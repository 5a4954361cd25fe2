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
        ends = expected[-1:] == [reference.generation_config.eos_token_id]
        result = model.generate(prompt, max_new_tokens=64)
        assert list(result.ids) == expected
        assert result.finish_reason == ("eos" if ends else "length")


def test_the_kept_bundle_holds_the_weights_of_the_file(smollm2, smollm2_gguf):
    """Read back from model.onnx with numpy alone, and from the GGUF with its own package."""
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
        else:  # stored centred: q - 8 and m + 8 s; an engine gets both back exactly
            m = (
                (minimum - np.float32(8) * arrays[name.removesuffix("q") + "scale"])
                .astype(np.float16)
                .astype(np.float32)
            )
            values = scale * (q.astype(np.float32) + np.float32(8)) + m.repeat(32, axis=1)
        assert all(row.tobytes() in rows for row in values), f"{name} has a row that the file has not"
        checked += 1
    assert checked == 211


def test_keeping_costs_no_perplexity_and_four_bits_again_do(smollm2):
    accuracy = {
        scheme: json.loads((smollm2(scheme) / "edgeformer.json").read_text())["accuracy"]
        for scheme in ("keep", "q8", "q4")
    }
    kept = accuracy["keep"]
    assert kept["perplexity"] / kept["perplexity_float"] < 1.005
    assert kept["mean_kl"] < accuracy["q4"]["mean_kl"] / 5, "the report can tell a costly quantization from a free one"
    q8 = accuracy["q8"]
    assert q8["mean_kl"] < 0.01
    # A token's log-likelihood moves by sqrt(2 KL) or so; over n tokens the mean of that is smaller by sqrt(n).
    noise = 3 * np.sqrt(2 * q8["mean_kl"] / q8["tokens"])
    assert abs(np.log(q8["perplexity"] / q8["perplexity_float"])) < q8["mean_kl"] + noise


def test_chat_answers_in_the_template(smollm2):
    model = edgeformer.load(smollm2("keep"), engine="cpu")
    result = model.generate([{"role": "user", "content": "What is the capital of France?"}], max_new_tokens=32)
    assert result.text.strip() and "<|im" not in result.text
