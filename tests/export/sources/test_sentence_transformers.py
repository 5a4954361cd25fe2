"""sentence-transformers folders give the library's vectors: modules, prompts, lengths and similarities."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from tokenizers import normalizers

import edgeformer
from edgeformer.errors import InputError
from edgeformer.export import ExportOptions, export

pytest.importorskip("sentence_transformers", reason="pip install '.[reference]'")

from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import modules as library

from bench.sources import _sentences as tiny

# Of vectors whose elements are of size 1: two float32 programs that sum in other orders; 20 roundings of 6e-8.
CLOSE = 2e-6 * 10
TEXTS = tiny.TEXTS
PROMPTS = {"query": "query : ", "passage": "passage : "}


def off(found, expected):
    """The largest difference; the shapes are the same."""
    assert found.shape == np.asarray(expected).shape
    return float(np.abs(found - np.asarray(expected)).max())


def exported(folder, **options):
    """The bundle of a folder, in float32."""
    export(ExportOptions(str(folder), folder.parent / "bundle", quantize="none", **options))
    return folder.parent / "bundle"


# --------------------------------------------------------------------------------------- pooling in the runtime


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """(the library's model, the bundle): pooling alone, with prompts, a similarity and a size."""
    place = tmp_path_factory.mktemp("plain")
    settings = {"prompts": PROMPTS, "default_prompt_name": "query", "similarity_fn_name": "dot", "truncate_dim": 24}
    reference = tiny.saved(place / "folder", tiny.base(place / "base"), **settings)
    return reference, exported(place / "folder")


def test_the_default_prompt_stands_before_each_text(plain):
    reference, bundle = plain
    model = edgeformer.load(bundle, engine="cpu")
    found = model.embed(TEXTS)
    assert off(found, reference.encode(TEXTS)) < CLOSE
    assert np.abs(found - reference.encode(TEXTS, prompt="")).max() > 1e-2, "the prompt changes nothing"


@pytest.mark.parametrize("given", [{"prompt_name": "passage"}, {"prompt": "blue : "}, {"prompt": ""}])
def test_prompts_are_chosen_by_name_or_given(given, plain):
    reference, bundle = plain
    model = edgeformer.load(bundle, engine="cpu")
    assert off(model.embed(TEXTS, **given), reference.encode(TEXTS, **given)) < CLOSE
    assert off(model.embed(TEXTS, batch_size=1, **given), reference.encode(TEXTS, **given)) < CLOSE


def test_an_unknown_prompt_name_is_refused_with_the_known_ones(plain):
    model = edgeformer.load(plain[1], engine="cpu")
    with pytest.raises(InputError, match=r"prompt_name is 'search'.*'query', 'document', 'passage'"):
        model.embed(TEXTS, prompt_name="search")
    with pytest.raises(InputError, match="both given"):
        model.embed(TEXTS, prompt_name="query", prompt="query : ")


MODES = {
    "mean": "mean",
    "cls": "cls",
    "max": "max",
    "last": "lasttoken",
    "mean_sqrt_len": "mean_sqrt_len_tokens",
    "weightedmean": "weightedmean",
}


@pytest.mark.parametrize("include_prompt", [True, False])
@pytest.mark.parametrize("modes", [*([mode] for mode in MODES), ["weightedmean", "cls"], list(MODES)])
def test_every_pooling_is_the_librarys(modes, include_prompt, plain, monkeypatch):
    reference, bundle = plain
    pooling = library.Pooling(32, [MODES[mode] for mode in modes], include_prompt)
    other = SentenceTransformer(modules=[reference[0], pooling], prompts=PROMPTS, device="cpu")
    model = edgeformer.load(bundle, engine="cpu")
    monkeypatch.setitem(model.bundle.manifest, "processing", {"max_length": 64, "prompts": PROMPTS, "normalize": False})
    model.bundle.manifest["processing"]["include_prompt"] = include_prompt
    for name in (None, "query"):
        expected = other.encode(TEXTS, prompt_name=name)
        assert off(model.embed(TEXTS, pooling=modes, prompt_name=name), expected) < CLOSE
    if not include_prompt and modes != ["last"]:  # the prompt comes first
        whole = SentenceTransformer(modules=[reference[0], library.Pooling(32, pooling.pooling_mode)], device="cpu")
        assert np.abs(expected - whole.encode(TEXTS, prompt="query : ")).max() > 1e-2, "nothing is left out"


@pytest.mark.parametrize("size", [1, 16, 24])
@pytest.mark.parametrize("normalize", [None, True])
def test_dimensions_are_cut_as_the_library_cuts_them(size, normalize, plain):
    reference, bundle = plain
    model = edgeformer.load(bundle, engine="cpu")
    expected = reference.encode(TEXTS, truncate_dim=size, normalize_embeddings=bool(normalize))
    assert off(model.embed(TEXTS, dimensions=size, normalize=normalize), expected) < CLOSE


def test_more_dimensions_than_there_are_are_refused(plain):
    model = edgeformer.load(plain[1], engine="cpu")
    assert model.embed(TEXTS).shape == (4, 24)  # the folder's own truncate_dim
    assert model.embed(TEXTS, dimensions=32).shape == (4, 32)
    with pytest.raises(InputError, match="dimensions is 33, the vectors have 32"):
        model.embed(TEXTS, dimensions=33)
    with pytest.raises(InputError, match="dimensions is 0"):
        model.embed(TEXTS, dimensions=0)


@pytest.mark.parametrize("function", [None, "cosine", "dot", "euclidean", "manhattan"])
def test_similarities_are_the_librarys(function, plain):
    reference, bundle = plain
    model = edgeformer.load(bundle, engine="cpu")
    vectors = model.embed(TEXTS)
    other = SentenceTransformer(modules=list(reference), similarity_fn_name=function or "dot", device="cpu")
    expected = other.similarity(vectors, vectors[:3]).numpy()
    scale = np.abs(expected).max()
    assert off(model.similarity(vectors, vectors[:3], function), expected) < CLOSE * scale
    assert model.similarity(vectors[0], vectors[1], function).shape == (1, 1)


def test_unknown_similarities_and_sizes_are_refused(plain):
    model = edgeformer.load(plain[1], engine="cpu")
    with pytest.raises(InputError, match="similarity is 'jaccard'"):
        model.similarity([[1.0]], [[1.0]], "jaccard")
    with pytest.raises(InputError, match="one size"):
        model.similarity([[1.0]], [[1.0, 2.0]])


def test_the_command_line_takes_prompts_and_shows_them(plain, edgeformer):
    reference, bundle = plain
    for option, given in (("--prompt-name", {"prompt_name": "passage"}), ("--prompt", {"prompt": "blue : "})):
        code, out, _ = edgeformer("embed", bundle, "red boats", option, next(iter(given.values())), "--engine", "cpu")
        assert code == 0
        found = np.array(json.loads(out)["vector"], np.float32)
        assert off(found, reference.encode(["red boats"], **given)[0]) < CLOSE
    code, out, _ = edgeformer("embed", bundle, "red boats", "--dimensions", "8", "--engine", "cpu")
    assert code == 0
    assert len(json.loads(out)["vector"]) == 8
    code, out, _ = edgeformer("inspect", bundle)
    assert code == 0
    assert all(text in out for text in ("processing", "passage : ", "default prompt name", "dot"))


# --------------------------------------------------------------------------------------------- modules in the graph


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(the library's model, the bundle): weights after the pooling, which excludes the prompt."""
    place = tmp_path_factory.mktemp("whole")
    after = [
        library.Pooling(32, ("mean", "lasttoken", "cls", "weightedmean"), include_prompt=False),
        library.Dense(128, 16, activation_function=torch.nn.GELU()),
        library.LayerNorm(16),
        library.Dense(16, 16, bias=False, use_residual=True),
        library.Dropout(0.5),
        library.Normalize(),
    ]
    reference = tiny.saved(place / "folder", tiny.base(place / "base"), after, prompts=PROMPTS)
    return reference, exported(place / "folder")


@pytest.mark.parametrize("engine", ["cpu", "native"])
def test_modules_with_weights_are_in_the_graph(engine, whole):
    reference, bundle = whole
    model = edgeformer.load(bundle, engine=engine, threads=1)
    assert list(model.bundle.manifest["graphs"]["model"]["outputs"]) == ["sentence_embedding"]
    for given in ({}, {"prompt_name": "passage"}, {"prompt": "blue : "}):
        assert off(model.embed(TEXTS, **given), reference.encode(TEXTS, **given)) < CLOSE
    plain = model.embed(TEXTS, normalize=False)
    assert not np.allclose(np.linalg.norm(plain, axis=1), 1)
    assert off(plain / np.linalg.norm(plain, axis=1, keepdims=True), model.embed(TEXTS)) < CLOSE
    with pytest.raises(InputError, match="nothing to pool"):
        model.embed(TEXTS, pooling="mean")


def test_the_graph_alone_gives_the_vectors_on_plain_onnxruntime(whole):
    import onnxruntime as ort

    reference, bundle = whole
    session = ort.InferenceSession(bundle / "model.onnx", providers=["CPUExecutionProvider"])
    batch = reference[0].preprocess(TEXTS)
    ids, mask = batch["input_ids"].numpy(), batch["attention_mask"].numpy()
    feeds = {"input_ids": ids, "attention_mask": mask, "token_type_ids": ids * 0, "pooling_mask": mask}
    vectors = session.run(None, feeds)[0]
    assert off(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), reference.encode(TEXTS)) < CLOSE


@pytest.mark.parametrize("engine", ["cpu", "native"])
def test_a_decoder_embeds_by_its_last_token_at_every_length(engine, decoders):
    reference, bundle = decoders
    model = edgeformer.load(bundle, engine=engine, threads=1)
    expected = np.stack([reference.encode(text) for text in TEXTS])  # one by one: nothing is padded
    assert off(model.embed(TEXTS), expected) < CLOSE
    assert off(model.embed(TEXTS), reference.encode(TEXTS)) < CLOSE


@pytest.fixture(scope="module")
def decoders(tmp_path_factory):
    place = tmp_path_factory.mktemp("decoder")
    after = [library.Pooling(32, "lasttoken"), library.Normalize()]
    made = tiny.base(place / "base", tiny.decoder, padding_side="left")
    reference = tiny.saved(place / "folder", made, after, prompts=PROMPTS, default_prompt_name="query")
    tiny.change(place / "folder", "config.json", architectures=["Qwen3ForCausalLM"])  # as published embedders say
    return reference, exported(place / "folder")


# ------------------------------------------------------------------------------------------------------- how it is read


def case(following=None, *, make=tiny.bert, before=None, after=None, more=None, **settings):
    """(model, modules after it, edits of the folder before and after the library loads it, tokenizer, settings)."""
    return make, following, before, after, more or {}, settings


def dense(*sizes, activation=None, **more):
    return lambda: library.Dense(*sizes, activation_function=activation or torch.nn.Tanh(), **more)


def pooled(*modes, **more):
    return lambda: library.Pooling(32, modes or "mean", **more)


def old_pooling(folder):
    """The flags that the library wrote before version 5.4."""
    flags = {"pooling_mode_max_tokens": True, "pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}
    tiny.change(folder, "1_Pooling/config.json", pooling_mode=None, word_embedding_dimension=32, **flags)


def no_pooling_mode(folder):
    """With all flags off the library computes the mean."""
    tiny.change(folder, "1_Pooling/config.json", pooling_mode=None, pooling_mode_max_tokens=False)


def old_names(folder):
    """Class names and places of version 2, the Transformer in a folder of its own."""
    listed = json.loads((folder / "modules.json").read_text())
    for module in listed:
        module["type"] = f"sentence_transformers.models.{module['type'].rpartition('.')[2]}"
    listed[0]["path"] = "0_Transformer"
    (folder / "modules.json").write_text(json.dumps(listed))
    (folder / "0_Transformer").mkdir()
    for file in folder.glob("*"):
        if file.is_file() and file.name not in ("modules.json", "config_sentence_transformers.json"):
            shutil.move(file, folder / "0_Transformer" / file.name)


def torch_weights(folder):
    """A Dense whose weights are tensors of torch.save."""
    from safetensors.torch import load_file

    for file in folder.glob("*_Dense/model.safetensors"):
        torch.save(load_file(file), file.with_name("pytorch_model.bin"))
        file.unlink()


def tokenizer_length(value):
    return lambda folder: tiny.change(folder, "tokenizer_config.json", model_max_length=value)


def to_roberta_names(folder):
    """The name under which version 1 wrote the settings of a RoBERTa."""
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 6}))
    (folder / "sentence_bert_config.json").rename(folder / "sentence_roberta_config.json")


CAPITALS = [text.replace("red", "Red").title() for text in TEXTS]
TWICE = normalizers.Sequence([normalizers.NFC(), normalizers.Strip()])
READ = {
    "mean": case([pooled()]),
    "old flags": case([pooled()], before=old_pooling),
    "no flag": case([pooled()], before=no_pooling_mode),
    "several modes": case([pooled("max", "mean"), library.Normalize]),
    "Dense": case([pooled(), dense(32, 8), library.Normalize]),
    "Dense, residual": case([pooled(), dense(32, 8, use_residual=True, bias=False)]),
    "Dense, Identity": case([pooled(), dense(32, 8, activation=torch.nn.Identity())]),
    "two Dense": case([pooled("mean"), dense(32, 64, activation=torch.nn.ReLU()), dense(64, 4)]),
    "Dense on tokens": case([dense(32, 8, module_input_name="token_embeddings"), lambda: library.Pooling(8)]),
    "Normalize on tokens": case([lambda: library.Normalize("token_embeddings"), pooled("max")]),
    "Normalize, then Dense": case([pooled(), library.Normalize, dense(32, 8)]),
    "LayerNorm": case([pooled(), lambda: library.LayerNorm(32)]),
    "Dropout": case([pooled(), lambda: library.Dropout(0.9)]),
    "weights of torch.save": case([pooled(), dense(32, 8)], before=torch_weights),
    "old names": case([pooled(), dense(32, 8)], before=old_names),
    "prompt left out": case([pooled("mean", include_prompt=False)], prompts=PROMPTS, default_prompt_name="query"),
    "prompt left out, Dense": case(
        [pooled("cls", include_prompt=False), dense(32, 8)], prompts=PROMPTS, default_prompt_name="query"
    ),
    "an empty default": case([pooled()], prompts={"query": "query : ", "document": ""}, default_prompt_name="document"),
    "lower case": case([pooled()], before=tiny.transformer(do_lower_case=True)),
    "lower case, other steps": case(
        [pooled()], before=tiny.transformer(do_lower_case=True), more={"normalizer": TWICE}
    ),
    "no lower case": case([pooled()]),
    "short": case([pooled()], before=tiny.transformer(max_seq_length=5)),
    "short, left": case([pooled()], before=tiny.transformer(max_seq_length=5), more={"truncation_side": "left"}),
    "short tokenizer": case([pooled()], before=tokenizer_length(7)),
    "no limit": case([pooled()], before=tokenizer_length(int(1e30))),
    "short call": case([pooled()], before=tiny.transformer(processing_kwargs={"text": {"max_length": 4}})),
    "short processor": case([pooled()], before=tiny.transformer(tokenizer_args={"model_max_length": 6})),
    "version 1": case([pooled()], before=to_roberta_names),
    "pooler": case(
        [library.Normalize],
        before=tiny.transformer(
            modality_config={"text": {"method": "forward", "method_output_name": "pooler_output"}},
            module_output_name="sentence_embedding",
        ),
    ),
    "T5": case([pooled(), dense(32, 8, bias=False, activation=torch.nn.Identity())], make=tiny.t5),
    "RoBERTa": case([pooled("cls")], make=tiny.roberta, before=tokenizer_length(32)),
    "decoder": case([pooled("lasttoken"), library.Normalize], make=tiny.decoder),
    "decoder, weighted": case([pooled("weightedmean")], make=tiny.decoder),
}


@pytest.mark.parametrize("name", READ)
def test_a_folder_is_read_as_the_library_reads_it(name, tmp_path):
    make, following, before, after, more, settings = READ[name]
    made = tiny.base(tmp_path / "base", make, **more)
    folder = tmp_path / "folder"
    tiny.saved(folder, made, [one() for one in following or []], **settings)
    for edit in (before, after):
        if edit is not None:
            edit(folder)
    reference = SentenceTransformer(str(folder), device="cpu")
    model = tiny.read(folder)
    for texts in (TEXTS, CAPITALS):
        expected = reference.encode(texts)
        assert off(model.embed(texts), expected) < CLOSE * max(1, np.abs(expected).max())


def test_the_comparison_detects_a_missing_setting(tmp_path):
    """Two of the cases above without their setting: the comparison fails."""
    for name, file, values in (
        ("low", "sentence_bert_config.json", {"do_lower_case": True}),
        ("short", "sentence_bert_config.json", {"max_seq_length": 5}),
    ):
        folder = tmp_path / name
        tiny.saved(folder, tiny.base(tmp_path / f"{name} base"), [library.Pooling(32)])
        without = tiny.read(folder).embed(CAPITALS)
        tiny.change(folder, file, **values)
        assert off(tiny.read(folder).embed(CAPITALS), without) > 1e-2
