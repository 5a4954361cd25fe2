"""What lies in an adapter's folder beside its weights, and models that are no language models.

The reference is the model that was in memory when the adapter was saved: PEFT's own, neither merged nor reloaded.
"""

from __future__ import annotations

import json

import pytest
from support import tiny

torch = pytest.importorskip("torch", reason="the toolchain needs torch")
tf = pytest.importorskip("transformers", reason="the toolchain needs transformers")
peft = pytest.importorskip("peft", reason="PEFT is the reference")
pytest.importorskip("onnxruntime", reason="the exporter's checks need onnxruntime")

from support.adapted import BOUND, off, rewrite, source_of

from bench.sources import _adapters
from bench.sources._adapters import IDS, Try, base_folder, edit, load, logits, quiet, train
from edgeformer.errors import ExportError
from edgeformer.export import ExportOptions
from edgeformer.export.sources.adapters.adapter import with_adapter
from edgeformer.export.sources.adapters.adapter_folder import read_adapter
from edgeformer.export.sources.hub.hub import language_model
from edgeformer.export.sources.load import load_source


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """The folder of the base models, made once."""
    return tmp_path_factory.mktemp("adapters")


@pytest.fixture
def lora(tmp_path):
    """A trained LoRA of q and v, that a test may change."""
    return train(Try(), tmp_path, "adapter")


def resized(work, name, rows, save=True, **options):
    """An adapter trained with more token embeddings than its base has."""
    with quiet():
        base = load(base_folder("tied", work))
        base.resize_token_embeddings(rows)
        torch.manual_seed(0)
        config = peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", **options)
        model = peft.get_peft_model(base, config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.05)
            new = model(torch.tensor([[1, rows - 1, 9, rows - 2]])).logits[0].numpy()
        model.save_pretrained(work / name, save_embedding_layers=save)
    return _adapters.Trained(base_folder("tied", work), work / name, new)


@pytest.mark.parametrize(
    "options", [{}, {"modules_to_save": ["embed_tokens", "lm_head"]}, {"trainable_token_indices": [64, 65, 66]}]
)
def test_added_tokens_get_the_rows_that_were_trained(options, work):
    trained = resized(work, f"resized-{len(options)}-{next(iter(options), '')}", 67, **options)
    source = source_of(trained)
    with torch.no_grad():
        found = source.module(torch.tensor([[1, 66, 9, 65]])).logits[0].numpy()
    assert off(found, trained.logits) <= BOUND
    assert source.config["vocab_size"] == 67 and source.inputs[0].high == 67
    assert "67 rows as in the adapter" in source.notes[0]


def test_missing_embedding_rows_are_refused(work):
    trained = resized(work, "lost-rows", 67, save=False, trainable_token_indices=[64, 65, 66])
    with pytest.raises(ExportError):
        source_of(trained)


def test_a_tokenizer_with_more_tokens_than_rows_is_refused(lora):
    tiny.tokenizer(lora.folder)
    with pytest.raises(ExportError, match=r"with id 3\d\d, and the model has 64 embeddings.*save_embedding_layers"):
        source_of(lora)


def test_the_tokenizer_in_the_adapters_folder_replaces_the_bases(work):
    tiny.tokenizer(base_folder("tied", work))
    trained = resized(work, "texts", 330)
    tiny.tokenizer(trained.folder)
    settings = json.loads((trained.folder / "tokenizer_config.json").read_text()) | {"chat_template": "adapter"}
    (trained.folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (trained.folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 7}))
    source = source_of(trained)
    texts = source.files["tokenizer_config.json"] + source.files.get("chat_template.jinja", b"")
    assert b"adapter" in texts and source.generation_config["eos_token_id"] == 7
    assert source.adapter["texts"][-2:] == ["tokenizer.json", "tokenizer_config.json"]
    assert any("generation_config.json is the one in the adapter's folder" in note for note in source.notes)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (base_folder("tied", work) / name).unlink()


@pytest.mark.parametrize("name", ["modules.json", "preprocessor_config.json"])
def test_preprocessing_that_differs_from_the_bases_is_refused(name, lora):
    """For example a sentence-transformers folder with another pooling than the base's."""
    (lora.folder / name).write_text('{"a": 1}')
    with pytest.raises(ExportError, match=f"has a {name} that differs from the base's"):
        source_of(lora)
    if name != "modules.json":  # with it the base would be another model
        (lora.base / name).write_text('{ "a": 1 }')
        source_of(lora)


def test_unusual_files_in_the_folder_are_noted(lora, work):
    train(Try(), work, "beside")
    edit(lora.folder, {"base_model_name_or_path": "someone/larger-model"})
    (work / "beside").rename(lora.folder / "second")
    (lora.folder / "config.json").write_text("{}")
    source = source_of(lora)
    assert any("trained on someone/larger-model; it was merged into folder base-llama" in n for n in source.notes)
    assert any("other adapters in second; they are not merged" in note for note in source.notes)
    assert any("config.json in the adapter's folder is not read" in note for note in source.notes)


def test_an_untrained_adapter_is_noted(lora):
    rewrite(lora.folder, lambda t: t.update({n: torch.zeros_like(v) for n, v in t.items() if "lora_B" in n}))
    assert any("changes no output" in note for note in source_of(lora).notes)


def test_blocks_of_a_gguf_file_are_not_kept(lora):
    with quiet():
        base = language_model(load(lora.base), "GGUF m.gguf", kept=lambda _: None)
        source = with_adapter(base, read_adapter(lora.folder), lora.base)
    assert source.kept is None and any("not kept" in note for note in source.notes)
    assert off(logits(source.module), lora.logits) <= BOUND


def test_ids_stay_below_what_the_head_scores(lora):
    """An embedding may have more rows than the head, with an adapter too."""
    with quiet():
        model = load(lora.base)
        rows, width = model.lm_head.weight.shape
        model.lm_head = torch.nn.Linear(width, rows - 4, bias=False)
        source = with_adapter(language_model(model, "base"), read_adapter(lora.folder), lora.base)
    assert source.inputs[0].high == rows - 4


def test_an_adapters_generation_config_is_read_like_the_bases(lora):
    """transformers reads no other file for an EOS token that generation_config.json does not have."""
    tf.GenerationConfig(do_sample=True, top_k=7).save_pretrained(lora.folder)
    given = source_of(lora).generation_config
    assert given["top_k"] == 7
    assert given["eos_token_id"] is None


def trained_head(kind, config, options, place, **feeds):
    """(base folder, adapter folder, outputs of PEFT's model) of a model that is not a language model."""
    torch.manual_seed(0)
    with quiet():
        base = kind(config).eval()
        base.save_pretrained(place / "base")
        model = peft.get_peft_model(base, peft.LoraConfig(r=4, **options)).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
            found = model(**feeds).logits.numpy()
        model.save_pretrained(place / "adapter")
    return found


BERT = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
    "max_position_embeddings": 32, "num_labels": 5,
}  # fmt: skip


def test_a_trained_classifier_head_is_exported(tmp_path):
    feeds = {"input_ids": torch.tensor([IDS]), "attention_mask": torch.ones(1, len(IDS), dtype=torch.int64)}
    options = {"target_modules": ["query"], "task_type": "SEQ_CLS"}
    config = tf.BertConfig(**BERT)
    expected = trained_head(tf.BertForSequenceClassification, config, options, tmp_path, **feeds)
    source = load_source(ExportOptions(str(tmp_path / "base"), tmp_path / "b", adapter=tmp_path / "adapter"))
    with torch.no_grad():
        assert off(source.module(**feeds).logits.numpy(), expected) <= BOUND
    with quiet():
        tf.BertForSequenceClassification(tf.BertConfig(**BERT | {"num_labels": 2})).save_pretrained(tmp_path / "two")
    with pytest.raises(ExportError, match=r"\[5, 32\].*\[2, 32\].*for SEQ_CLS.*--architecture.*as many labels"):
        load_source(ExportOptions(str(tmp_path / "two"), tmp_path / "b", adapter=tmp_path / "adapter"))


def test_an_encoder_decoder_has_the_adapter_in_both_graphs(tmp_path):
    sizes = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    config = tf.T5Config(**sizes, decoder_start_token_id=0)
    feeds = {"input_ids": torch.tensor([IDS]), "decoder_input_ids": torch.tensor([[0, 4, 9]])}
    options = {"target_modules": ["q", "wo"], "task_type": "SEQ_2_SEQ_LM"}
    expected = trained_head(tf.T5ForConditionalGeneration, config, options, tmp_path, **feeds)
    pair = load_source(ExportOptions(str(tmp_path / "base"), tmp_path / "b", adapter=tmp_path / "adapter"))
    with torch.no_grad():
        assert off(pair.encoder.module.model(**feeds).logits.numpy(), expected) <= BOUND
    assert pair.encoder.adapter == pair.decoder.adapter and pair.decoder.origin.endswith("(LoRA, 10 layers)")
