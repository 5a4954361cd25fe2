"""`edgeformer inspect`: what it shows of a bundle."""

from __future__ import annotations

import json


def test_inspect_shows_what_the_bundle_holds(edgeformer, q8):
    code, out, _ = edgeformer("inspect", q8, "--hashes")
    assert code == 0
    for part in (
        "text-generation",
        "past_key_values.{0...1}.key",
        "float32[batch, 2, past_sequence, 8]",
        "q8",
        "model.onnx.data",
        "all hashes match",
        "MIT",
    ):
        assert part in out
    code, out, _ = edgeformer("inspect", q8, "--json")
    assert json.loads(out) == json.loads((q8 / "edgeformer.json").read_text())


def test_inspect_shows_the_reports(edgeformer, lm, copy_of, edit_manifest):
    bundle = copy_of(lm)

    def report(manifest):
        manifest["accuracy"] = {"perplexity": 12.61, "mean_kl": 0.003}
        manifest["parity"] = {
            "float": {"worst": 3.6e-6, "tolerance": 1e-4, "where": "logits[0, 1]"},
            "dequantized": None,
            "engines": {
                "native": {
                    "passed": True,
                    "worst": 0.072,
                    "tolerance": 1.33,
                    "rows": [{"quantile": 0.98, "worst": 0.034, "tolerance": 0.059}],
                },
                "cpu": {"passed": True, "worst": 2e-6, "tolerance": 1e-4},
            },
        }

    edit_manifest(bundle, report)
    out = " ".join(edgeformer("inspect", bundle)[1].split())
    assert "98% of rows within 0.034, allowed 0.059; worst 0.072 of the range, allowed 1.3" in out
    assert "worst 2e-06 of the range, allowed 0.0001" in out
    assert "12.61" in out
    assert "worst 3.6e-06 of the range, allowed 0.0001, logits[0, 1]" in out
