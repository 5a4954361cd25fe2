"""The longest text of a model: counted from its tables of positions, not read from its config."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers as tf

import edgeformer
from edgeformer.errors import InputError
from edgeformer.export import ExportOptions, export
from edgeformer.export.sources.hub.heads import encoder_source
from edgeformer.export.sources.hub.hub import language_model

SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
WORDS = {"vocab_size": 100}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
ENCODERS = {
    "BERT": (lambda: tf.BertModel(tf.BertConfig(max_position_embeddings=40, **WORDS, **SIZES)), 40),
    # One row is the padding token's and one is never read: 40 rows hold 38 tokens.
    "RoBERTa": (
        lambda: tf.RobertaModel(tf.RobertaConfig(max_position_embeddings=40, type_vocab_size=1, **WORDS, **SIZES)),
        38,
    ),
    "RoBERTa, other padding": (
        lambda: tf.RobertaModel(tf.RobertaConfig(max_position_embeddings=40, pad_token_id=5, **WORDS, **SIZES)),
        34,
    ),
    "MPNet": (lambda: tf.MPNetModel(tf.MPNetConfig(max_position_embeddings=40, **WORDS, **SIZES)), 38),
    "ELECTRA": (lambda: tf.ElectraModel(tf.ElectraConfig(max_position_embeddings=40, **WORDS, **SIZES)), 40),
    "DeBERTa-v2, relative": (
        lambda: tf.DebertaV2Model(
            tf.DebertaV2Config(
                max_position_embeddings=40, relative_attention=True, position_biased_input=False, **WORDS, **SIZES
            )
        ),
        None,
    ),
    "T5, relative": (
        lambda: tf.T5EncoderModel(tf.T5Config(d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4, **WORDS)),
        None,
    ),
    "ModernBERT, rotary": (
        lambda: tf.ModernBertModel(
            tf.ModernBertConfig(
                pad_token_id=0, cls_token_id=1, sep_token_id=2, max_position_embeddings=40, **WORDS, **SIZES
            )
        ),
        None,
    ),
}
DECODERS = {
    "GPT-2": (lambda: tf.GPT2LMHeadModel(tf.GPT2Config(n_embd=32, n_layer=1, n_head=4, n_positions=40, **WORDS)), 40),
    "OPT": (  # two rows stand before the first position: 42 for 40 tokens
        lambda: tf.OPTForCausalLM(
            tf.OPTConfig(
                ffn_dim=64, word_embed_proj_dim=32, max_position_embeddings=40, pad_token_id=1, **WORDS,
                **{key: value for key, value in SIZES.items() if key != "intermediate_size"},
            )
        ),
        40,
    ),
    "Llama, rotary": (lambda: tf.LlamaForCausalLM(tf.LlamaConfig(max_position_embeddings=40, **WORDS, **SIZES)), None),
}  # fmt: skip


@pytest.mark.parametrize("name", ENCODERS)
def test_an_encoders_table_is_counted_behind_its_padding(name):
    make, expected = ENCODERS[name]
    model = make().eval()
    assert encoder_source(model, name).positions == expected
    if expected is not None:  # PyTorch agrees: one token more is an error
        token = torch.full((1, expected + 1), 90)
        with torch.no_grad():
            model(token[:, 1:])
            with pytest.raises((IndexError, RuntimeError)):
                model(token)


@pytest.mark.parametrize("name", DECODERS)
def test_a_decoders_table_is_counted_too(name):
    make, expected = DECODERS[name]
    source = language_model(make(), name)
    assert source.positions == expected
    assert source.context == 40


def test_a_longer_text_is_refused_with_the_numbers(tmp_path):
    torch.manual_seed(0)
    source = encoder_source(ENCODERS["RoBERTa"][0](), "roberta")
    manifest = export(ExportOptions("roberta", tmp_path / "bundle", quantize="none"), traced=source)
    assert manifest["graphs"]["model"]["positions"] == 38
    for engine in ("cpu", "native"):
        model = edgeformer.load(tmp_path / "bundle", engine=engine, threads=1)
        assert model.info["context"] == 38
        ids = np.full((1, 39), 90)
        assert model(input_ids=ids[:, :38], attention_mask=ids[:, :38] * 0 + 1)["last_hidden_state"].shape[1] == 38
        with pytest.raises(InputError, match="input_ids holds 39 tokens, the model has 38 positions"):
            model(input_ids=ids, attention_mask=ids * 0 + 1)


def test_long_texts_are_cut_to_what_the_table_holds(tmp_path):
    """The config and the library have 34, the rows of the table, which is too long: 32 tokens fit."""
    library = pytest.importorskip("sentence_transformers", reason="pip install '.[reference]'")
    from bench.sources import _sentences as tiny

    tiny.saved(tmp_path / "folder", tiny.base(tmp_path / "base", tiny.roberta, length=512))
    reference = library.SentenceTransformer(str(tmp_path / "folder"), device="cpu")
    texts = [*tiny.TEXTS, "blue boats float " * 20]
    with pytest.raises((IndexError, RuntimeError)):
        reference.encode(texts)
    reference.max_seq_length = 32
    model = tiny.read(tmp_path / "folder")
    assert model.bundle.manifest["processing"]["max_length"] == 32
    # Elements of size 1; two float32 programs that sum in other orders differ by about 20 roundings of 6e-8.
    assert np.abs(model.embed(texts) - reference.encode(texts)).max() < 2e-5
