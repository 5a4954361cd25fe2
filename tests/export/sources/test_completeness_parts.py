"""Weights that a checkpoint may lack: unread ones, and those that an adapter has."""

from __future__ import annotations

import json

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the toolchain needs torch")
tf = pytest.importorskip("transformers", reason="the toolchain needs transformers")
peft = pytest.importorskip("peft", reason="adapters are compared with PEFT")

from safetensors.torch import load_file, save_file

from edgeformer.errors import ExportError
from edgeformer.export import ExportOptions
from edgeformer.export.source import pytorch_outputs
from edgeformer.export.sources.load import load_source

SIZES = {
    "vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64,
    "max_position_embeddings": 32,
}  # fmt: skip
MODULES = [
    {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
    {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
]


def without(folder, prefix):
    """Removes the tensors with these name prefixes from the checkpoint in `folder`."""
    path = folder / "model.safetensors"
    state = {name: value for name, value in load_file(path).items() if not name.startswith(prefix)}
    save_file(state, path, metadata={"format": "pt"})


@pytest.fixture
def embedder(tmp_path):
    folder = tmp_path / "st"
    tf.BertModel(tf.BertConfig(**SIZES)).save_pretrained(folder)
    (folder / "modules.json").write_text(json.dumps(MODULES))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling/config.json").write_text(
        json.dumps({"word_embedding_dimension": 32, "pooling_mode_mean_tokens": True})
    )
    return folder


def test_an_embedder_without_the_pooler_that_nothing_reads_loads(embedder, tmp_path):
    without(embedder, "pooler.")
    source = load_source(ExportOptions(str(embedder), tmp_path / "b"))
    assert source.completeness["unread"] == ["pooler.dense.bias", "pooler.dense.weight"]
    assert source.completeness["missing"] == []


def test_an_embedder_without_a_layer_is_refused(embedder, tmp_path):
    without(embedder, "encoder.layer.0.output.")
    with pytest.raises(ExportError, match=r"encoder\.layer\.0\.output"):
        load_source(ExportOptions(str(embedder), tmp_path / "b"))


def test_a_head_may_come_from_the_adapter(tmp_path):
    torch.manual_seed(0)
    config = tf.BertConfig(**SIZES, num_labels=3, architectures=["BertForSequenceClassification"])
    tf.BertForSequenceClassification(config).save_pretrained(tmp_path / "base")
    model = tf.BertForSequenceClassification.from_pretrained(tmp_path / "base")
    lora = peft.LoraConfig(r=2, target_modules=["query"], modules_to_save=["classifier"], task_type="SEQ_CLS")
    trained = peft.get_peft_model(model, lora).eval()
    with torch.no_grad():
        for name, value in trained.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                value.add_(torch.randn_like(value) * 0.1)
    trained.save_pretrained(tmp_path / "adapter")
    without(tmp_path / "base", "classifier.")
    options = ExportOptions(str(tmp_path / "base"), tmp_path / "b", adapter=tmp_path / "adapter")
    source = load_source(options)
    assert source.completeness["from_adapter"] == ["classifier.bias", "classifier.weight"]
    feeds = {value.name: value.sample({"batch": 2, "sequence": 7}, i) for i, value in enumerate(source.inputs)}
    with torch.no_grad():
        expected = trained(**feeds).logits.numpy()
    found = pytorch_outputs(source, feeds)["logits"]
    np.testing.assert_allclose(found, expected, atol=1e-5)  # merged and unmerged sums
    with pytest.raises(ExportError, match="classifier"):
        load_source(ExportOptions(str(tmp_path / "base"), tmp_path / "b"))
