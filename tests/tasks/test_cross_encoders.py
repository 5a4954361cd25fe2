"""Cross-encoders score and rank pairs of texts as sentence-transformers' CrossEncoder does."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import transformers as tf

import edgeformer
from edgeformer.errors import InputError
from edgeformer.export import ExportOptions, export

pytest.importorskip("sentence_transformers", reason="pip install '.[reference]'")

from sentence_transformers import CrossEncoder
from sentence_transformers.cross_encoder import modules as library
from sentence_transformers.sentence_transformer.modules import Pooling
from support.refusals import assert_refused

from bench.sources import _sentences as tiny

CLOSE = 2e-6 * 10  # see test_sentence_transformers.py
PAIRS = tiny.PAIRS
PROMPTS = {"search": "query : ", "blue": "blue : "}


def scorer(labels=1, **changes):
    config = tf.BertConfig(vocab_size=tiny.VOCABULARY, max_position_embeddings=64, num_labels=labels, **tiny.SIZES)
    return tf.BertForSequenceClassification(config)


def saved(place, *, labels=1, activation=None, **settings):
    """(the sentence-transformers model, the folder it was saved to)."""
    base = tiny.base(place / "base", lambda: scorer(labels))
    model = CrossEncoder(str(base), activation_fn=activation, device="cpu", **settings)
    model.save_pretrained(str(place / "folder"), create_model_card=False)
    return model, place / "folder"


def error(found, expected):
    """The largest absolute difference."""
    assert found.shape == np.asarray(expected).shape
    return float(np.abs(found - np.asarray(expected)).max())


@pytest.fixture(scope="module")
def ranker(tmp_path_factory):
    """(the sentence-transformers model, the bundle): one label, no activation, a default prompt, at most 12 tokens."""
    place = tmp_path_factory.mktemp("ranker")
    identity = torch.nn.Identity()
    settings = {"prompts": PROMPTS, "default_prompt_name": "search", "max_length": 12}
    reference, folder = saved(place, activation=identity, **settings)
    export(ExportOptions(str(folder), place / "bundle", quantize="none"))
    return reference, place / "bundle"


@pytest.mark.parametrize("engine", ["cpu", "native"])
def test_scores_equal_those_of_sentence_transformers(engine, ranker):
    reference, bundle = ranker
    model = edgeformer.load(bundle, engine=engine, threads=1)
    long = [("red boats float on water and ships sink", "in the deep sea the blue water and red ships sink in the sea")]
    for pairs in (PAIRS, long, [list(pair) for pair in PAIRS]):
        assert error(model.score(pairs), reference.predict(pairs)) < CLOSE
    for given in ({"prompt_name": "blue"}, {"prompt": ""}):
        assert error(model.score(PAIRS, **given), reference.predict(PAIRS, **given)) < CLOSE
    assert np.abs(model.score(PAIRS, prompt="") - model.score(PAIRS)).max() > 1e-2, "the prompt changes nothing"


def test_labels_use_the_activation_of_the_model(ranker):
    reference, bundle = ranker
    model = edgeformer.load(bundle, engine="cpu")
    assert model.bundle.task == "text-classification"
    found = np.array([labels[0].score for labels in model.classify(PAIRS)])
    assert error(found, reference.predict(PAIRS)) < CLOSE
    sigmoid = reference.predict(PAIRS, activation_fn=torch.nn.Sigmoid())
    assert error(model.score(PAIRS, activation="sigmoid"), sigmoid) < CLOSE
    assert np.abs(found - sigmoid).max() > 0.1


def test_documents_are_ranked_as_by_sentence_transformers(ranker):
    reference, bundle = ranker
    model = edgeformer.load(bundle, engine="cpu")
    documents = ["float on water", "red", "blue blue blue", "ships sink in the deep sea"]
    expected = reference.rank("red boats", documents)
    found = model.rank("red boats", documents)
    assert [one.index for one in found] == [one["corpus_id"] for one in expected]
    assert error(np.array([one.score for one in found]), [one["score"] for one in expected]) < CLOSE
    assert model.rank("red boats", documents, top_k=2) == found[:2]


def test_wrong_arguments_are_refused(ranker):
    model = edgeformer.load(ranker[1], engine="cpu")
    with pytest.raises(InputError, match="activation is 'softmax'"):
        model.score(PAIRS, activation="softmax")
    with pytest.raises(InputError, match="prompt_name is 'red'"):
        model.score(PAIRS, prompt_name="red")
    with pytest.raises(InputError, match="expected a str, or a pair"):
        model.score([("one", "two", "three")])


ACTIVATIONS = [
    torch.nn.Identity(),
    torch.nn.Sigmoid(),
    torch.nn.Tanh(),
    torch.nn.ReLU(),
    torch.nn.Softplus(),
    torch.nn.LogSigmoid(),
    None,
]


@pytest.mark.parametrize("labels", [1, 3])
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda one: type(one).__name__)
def test_every_activation_equals_that_of_sentence_transformers(activation, labels, tmp_path):
    reference, folder = saved(tmp_path, labels=labels, activation=activation)
    model = tiny.read(folder)
    expected = reference.predict(PAIRS)
    assert error(model.score(PAIRS), expected) < CLOSE
    best = [max(label.score for label in labels) for labels in model.classify(PAIRS)]
    assert error(np.array(best), expected if labels == 1 else expected.max(1)) < CLOSE
    if labels > 1:
        with pytest.raises(InputError, match="gives 3 labels a pair"):
            model.rank("red", ["blue"])


OLD = {
    "version 2": {"sbert_ce_default_activation_function": "torch.nn.modules.linear.Identity"},
    "version 4": {"sentence_transformers": {"activation_fn": "torch.nn.modules.linear.Identity", "version": "4.0.1"}},
    "transformers": {},
}


@pytest.mark.parametrize("version", OLD)
def test_folders_of_older_versions_keep_their_activation(version, tmp_path):
    folder = tiny.base(tmp_path / "folder", scorer)
    tiny.change(folder, "config.json", **OLD[version])
    model = tiny.read(folder)
    assert ("activation" in model.bundle.manifest["processing"]) == bool(OLD[version])
    assert error(model.score(PAIRS), CrossEncoder(str(folder), device="cpu").predict(PAIRS)) < CLOSE


@pytest.mark.parametrize("types", [True, False])
def test_token_types_follow_the_inputs_of_the_tokenizer(types, tmp_path):
    """Without token types in `model_input_names` all types are 0, even if the post-processor gives others."""
    folder = tiny.base(tmp_path / "folder", scorer)
    names = ["input_ids", *(["token_type_ids"] if types else []), "attention_mask"]
    tiny.change(folder, "tokenizer_config.json", model_input_names=names)
    reference = CrossEncoder(str(folder), device="cpu")
    assert ("token_type_ids" in reference.tokenizer([PAIRS[0]])) == types
    model = tiny.read(folder)
    assert error(model.score(PAIRS), reference.predict(PAIRS)) < CLOSE
    other = model.tokenizer
    other.gives_types = not types
    assert np.abs(model.score(PAIRS) - reference.predict(PAIRS)).max() > 1e-2, "the types change nothing"


def test_a_scorer_of_several_modules_is_one_graph(tmp_path):
    """An encoder, a pooling and a Dense that computes the score."""
    base = tiny.base(tmp_path / "base")
    modules = [
        library.Transformer(str(base)),
        Pooling(32, "cls"),
        library.Dense(32, 1, activation_function=torch.nn.Identity(), module_output_name="scores"),
    ]
    reference = CrossEncoder(modules=modules, device="cpu")
    reference.save_pretrained(str(tmp_path / "folder"), create_model_card=False)
    model = tiny.read(tmp_path / "folder")
    assert model.bundle.task == "text-classification"
    assert error(model.score(PAIRS), reference.predict(PAIRS)) < CLOSE


def logit_score(folder):
    modules = json.loads((folder / "modules.json").read_text())
    kind = "sentence_transformers.cross_encoder.modules.logit_score.LogitScore"
    modules.append({"idx": 1, "name": "1", "path": "1_LogitScore", "type": kind})
    (folder / "modules.json").write_text(json.dumps(modules))


REFUSED = {
    "a language model's score": (logit_score, "lists LogitScore"),
    "a language model": (
        lambda folder: tiny.change(folder, "sentence_bert_config.json", transformer_task="text-generation"),
        "transformer_task is 'text-generation'",
    ),
    "code of the model": (
        lambda folder: tiny.change(folder, "config_sentence_transformers.json", activation_fn="mine.Act"),
        "'mine.Act' is not a class of torch.nn",
    ),
    "another activation": (
        lambda folder: tiny.change(
            folder, "config_sentence_transformers.json", activation_fn="torch.nn.modules.activation.Hardtanh"
        ),
        "Hardtanh' is unsupported",
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("refused"))[1]


@pytest.mark.parametrize("name", REFUSED)
def test_unsupported_settings_are_refused_by_name(name, folder, tmp_path):
    assert_refused(tiny.read, folder, *REFUSED[name], tmp_path)
