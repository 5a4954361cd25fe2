"""sentence-transformers folders that are refused, each with the name of what is not supported."""

from __future__ import annotations

import json
import shutil

import pytest

pytest.importorskip("sentence_transformers", reason="pip install '.[reference]'")

from sentence_transformers.sentence_transformer import modules as library
from support.refusals import assert_refused

from bench.sources import _sentences as tiny


def listed(kind, path="1_Pooling"):
    def edit(folder):
        modules = json.loads((folder / "modules.json").read_text())[:1]
        modules.append({"idx": 1, "name": "1", "path": path, "type": kind})
        (folder / "modules.json").write_text(json.dumps(modules))

    return edit


def model_file(**values):
    return lambda folder: tiny.change(folder, "config_sentence_transformers.json", **values)


def only_first(kind):
    return lambda folder: (folder / "modules.json").write_text(
        json.dumps([{"idx": 0, "name": "0", "path": "", "type": f"sentence_transformers.models.{kind}"}])
    )


def dense_with(**values):
    return lambda folder: tiny.change(folder, "2_Dense/config.json", **values)


MESSAGE = {"message": {"method": "forward", "method_output_name": "last_hidden_state", "format": "flat"}}
REFUSED = {
    "code of the model": (listed("custom_st.Transformer"), r"custom_st\.Transformer, code of the model's author"),
    "an unknown module": (listed("sentence_transformers.models.CNN"), "lists CNN"),
    "a sparse module": (listed("sentence_transformers.sparse_encoder.models.SpladePooling"), "lists SpladePooling"),
    "a router": (only_first("Router"), "lists Router; expected one Transformer"),
    "a static embedding": (only_first("StaticEmbedding"), "lists StaticEmbedding"),
    "a sparse model": (model_file(model_type="SparseEncoder"), "model_type is SparseEncoder"),
    "no such prompt": (model_file(default_prompt_name="search"), "default_prompt_name is 'search'"),
    "no such similarity": (model_file(similarity_fn_name="maxsim"), "similarity_fn_name is 'maxsim'"),
    "a size of 0": (model_file(truncate_dim=0), "truncate_dim is 0"),
    "a newer package": (model_file(requirements={"transformers": ">=99"}), "requirements has transformers >=99"),
    "a task": (tiny.transformer(transformer_task="fill-mask"), "transformer_task is 'fill-mask'"),
    "chat messages": (tiny.transformer(modality_config=MESSAGE), "has 'message'"),
    "query expansion": (tiny.transformer(query_expansion={"length": 32}), "sets query_expansion"),
    "a query's length": (tiny.transformer(query_length=8), "sets query_length = 8"),
    "another configuration": (tiny.transformer(config_args={"hidden_act": "relu"}), r"config_kwargs\.hidden_act"),
    "special tokens": (
        tiny.transformer(processing_kwargs={"text": {"add_special_tokens": False}}),
        "add_special_tokens",
    ),
    "an unknown key": (tiny.transformer(pool_twice=True), "sets pool_twice = True"),
    "an unknown pooling": (
        lambda folder: tiny.change(folder, "1_Pooling/config.json", pooling_mode="median"),
        "pooling mode is median",
    ),
    "an unknown pooling's key": (
        lambda folder: tiny.change(folder, "1_Pooling/config.json", pooling_mode_median_tokens=True),
        "sets pooling_mode_median_tokens",
    ),
    "an unknown Dense's key": (dense_with(rank=4), "sets rank = 4"),
    "an activation of the model": (
        dense_with(activation_function="custom.Act"),
        "'custom.Act' is not a class of torch.nn",
    ),
    "a feature that nobody makes": (dense_with(module_input_name="all_layers"), "do not return a sentence_embedding"),
    "other sizes": (dense_with(out_features=9), "do not fit its config.json"),
    "no weights": (lambda folder: (folder / "2_Dense/model.safetensors").unlink(), "neither model.safetensors nor"),
    "no pooling": (lambda folder: (listed("sentence_transformers.models.Dropout", "3"))(folder), "do not return a"),
}


@pytest.fixture(scope="module")
def with_dense(tmp_path_factory):
    place = tmp_path_factory.mktemp("refused")
    tiny.saved(place / "folder", tiny.base(place / "base"), [library.Pooling(32), library.Dense(32, 8)])
    return place / "folder"


@pytest.mark.parametrize("name", REFUSED)
def test_unsupported_settings_are_refused_by_name(name, with_dense, tmp_path):
    assert_refused(tiny.read, with_dense, *REFUSED[name], tmp_path)


def test_the_transformer_alone_is_exported_when_its_class_is_named(with_dense):
    model = tiny.read(with_dense, architecture="BertModel")
    assert model.bundle.manifest["processing"] == {"max_length": 64, "pooling": "mean", "normalize": True}
    assert "modules.json, config_sentence_transformers.json is not in this bundle" in model.bundle.manifest["notes"][0]


def test_a_key_that_the_library_does_not_read_is_named_in_the_manifest(with_dense, tmp_path):
    folder = shutil.copytree(with_dense, tmp_path / "folder")
    tiny.change(folder, "config_sentence_transformers.json", colour="blue")
    assert any('{"colour": "blue"}' in note for note in tiny.read(folder).bundle.manifest["notes"])


def test_the_sweep_tries_every_setting_of_the_library():
    from bench.sources import sentence_transformers as sweep

    tried = {*sweep._trials(), *(name for name in sweep.settings() if name.startswith("similarity"))}
    assert set(sweep.settings()) <= tried
    assert len(sweep.settings()) > 70
