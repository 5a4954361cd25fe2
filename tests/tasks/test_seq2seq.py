"""Encoder-decoders: two graphs, caches of self- and cross-attention; greedy and beam search equal transformers."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as tf

import edgeformer
from edgeformer.bundle.bundle import Bundle
from edgeformer.cli.inspect import print_bundle
from edgeformer.cli.verify import _show
from edgeformer.errors import EngineUnavailable, ExportError, InputError, ParityError
from edgeformer.export.__main__ import _summary
from edgeformer.export.graphs import encoder_decoder
from edgeformer.export.options import ExportOptions
from edgeformer.export.pipeline import export
from edgeformer.export.sources.hub.encoder_decoder_source import Decoding, encoder_decoder_source
from edgeformer.export.sources.hub.hub import language_model
from edgeformer.tools.verify import verify

SIZES = {
    "vocab_size": 100,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": 64,
}


def t5(**more):
    sizes = {"vocab_size": 100, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    return tf.T5ForConditionalGeneration(tf.T5Config(**sizes, decoder_start_token_id=0, **more))


def marian():
    tokens = {"pad_token_id": 99, "decoder_start_token_id": 99, "eos_token_id": 0, "forced_eos_token_id": 0}
    model = tf.MarianMTModel(tf.MarianConfig(**SIZES | tokens))
    model.generation_config.bad_words_ids = [[99]]
    return model


# Random models have near ties, which the native engine's int8 cache could decide otherwise: compare with float32.
ENGINES = {"cpu": {"engine": "cpu"}, "native": {"engine": "native", "kv": "float32"}}
MODELS = {
    "T5": t5,
    "BART": lambda: tf.BartForConditionalGeneration(tf.BartConfig(**SIZES)),
    "Marian": marian,
    "M2M100": lambda: tf.M2M100ForConditionalGeneration(tf.M2M100Config(**SIZES)),
    "mBART": lambda: tf.MBartForConditionalGeneration(tf.MBartConfig(**SIZES)),
    "Pegasus": lambda: tf.PegasusForConditionalGeneration(tf.PegasusConfig(**SIZES)),
}
SEARCHES = (
    {},
    {"num_beams": 3},
    {"num_beams": 4, "length_penalty": 0.3},
    {"num_beams": 4, "length_penalty": 2.0, "early_stopping": True},
    {"num_beams": 2, "length_penalty": 1.5, "early_stopping": "never"},
)


def with_varied_answers(model):
    """The model with larger random weights, so that answers differ, and several end tokens, so that beams finish."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 1.5 * parameter.shape[1] ** -0.5, generator=generator)
    model.generation_config.eos_token_id = [2, 7, 8, 9, 10]
    return model.eval()


@pytest.mark.parametrize("name", MODELS)
def test_a_bundle_generates_what_transformers_does(name, tmp_path):
    torch.manual_seed(0)
    model = with_varied_answers(MODELS[name]())
    options = ExportOptions(source=name, output=tmp_path / "bundle", quantize="none")
    manifest = export(options, traced=encoder_decoder_source(model, name, "text2text-generation"))
    assert manifest["parity"]["float"]["worst"] < 1e-5
    engines = [edgeformer.load(tmp_path / "bundle", **options) for options in ENGINES.values()]
    answers = set()
    for seed in range(3):
        ids = np.random.default_rng(seed).integers(11, 99, 9)
        for search in SEARCHES:
            settings = {"max_new_tokens": 15, "no_repeat_ngram_size": 0, "do_sample": False} | search
            expected = model.generate(input_ids=torch.from_numpy(ids)[None], **settings)[0, 1:].tolist()
            for loaded in engines:
                found = loaded.generate(ids, max_new_tokens=15, **{"num_beams": 1} | search).ids
                assert found == expected[: len(found)], loaded
                assert set(expected[len(found) :]) <= {model.config.pad_token_id}
            answers.add(tuple(found))
    assert len(answers) > 4, "these weights always give the same answers"


def test_a_folder_becomes_two_graphs_and_the_encoder_computes_the_cross_attention_keys(tmp_path, capsys):
    torch.manual_seed(0)
    MODELS["BART"]().save_pretrained(tmp_path / "folder")
    export(ExportOptions(source=str(tmp_path / "folder"), output=tmp_path / "bundle", quantize="q8"))
    names = {path.name for path in (tmp_path / "bundle").iterdir()}
    assert {"encoder_model.onnx", "decoder_model.onnx", "config.json", "generation_config.json"} <= names
    loaded = edgeformer.load(tmp_path / "bundle", engine="cpu")
    graphs = loaded.bundle.manifest["graphs"]
    crossing = [f"{layer}.encoder.{part}" for layer in range(2) for part in ("key", "value")]
    assert {f"present.{name}" for name in crossing} < set(graphs["encoder"]["outputs"])
    assert {f"past_key_values.{name}" for name in crossing} < set(graphs["decoder"]["inputs"])
    assert "encoder_hidden_states" not in graphs["decoder"]["inputs"]
    weights = {i.name for i in loaded.bundle.read_graph("decoder").graph.initializer}
    moved = {i.name for i in loaded.bundle.read_graph("encoder").graph.initializer}
    assert any("encoder_attn.k_proj" in name for name in moved)
    assert not any("encoder_attn.k_proj" in name or "encoder_attn.v_proj" in name for name in weights)
    assert len(loaded.generate([5, 6, 7], max_new_tokens=4).ids) <= 4
    says_that_the_cost_of_an_int8_cache_was_not_measured(tmp_path / "bundle", capsys)


def says_that_the_cost_of_an_int8_cache_was_not_measured(path, capsys):
    """The report of the export, `inspect`, `verify` and `explain()`; none of them has a number."""
    words = "its cost was not measured: the export does not measure it for encoder-decoders"
    manifest = Bundle.open(path).manifest
    assert manifest["kv_cache"] == {"unmeasured": words.partition(": ")[2]}
    report = verify(path, "native", 1)
    assert report.passed
    capsys.readouterr()
    for show in (
        lambda: _summary(path, manifest),
        lambda: print_bundle(path, hashes=False, as_json=False),
        lambda: _show(report),
        lambda: print(edgeformer.load(path, "native", 1).explain()),
    ):
        show()
        said = "".join("".join(capsys.readouterr()).split())  # without the breaks of lines
        assert words.replace(" ", "") in said
        assert "natsofKL" not in said


def test_odd_sources_and_arguments_are_refused_or_understood(tmp_path):
    torch.manual_seed(0)
    pair = encoder_decoder_source(with_varied_answers(MODELS["BART"]()), "bart", "text2text-generation")
    export(ExportOptions(source="bart", output=tmp_path / "bundle", quantize="none"), traced=pair)
    model = edgeformer.load(tmp_path / "bundle", engine="native")
    arguments = {"max_new_tokens": 6, "num_beams": 1, "ignore_eos": True}
    source = [20, 31, 42, 53]
    with pytest.raises(InputError, match="the token id -1"):
        model.generate([20, -1], **arguments)
    with pytest.raises(InputError, match="also depends on its source"):
        model.generate(source, session=model.session(), **arguments)
    expected = model.generate(source, decoder_prompt=[2, 5], **arguments).ids
    assert model.generate(source, decoder_prompt=np.array([2, 5]), **arguments).ids == expected
    assert [one.ids for one in model.generate([tuple(source)] * 2, decoder_prompt=(2, 5), **arguments)] == [
        expected
    ] * 2


def test_positions_that_ignore_past_tokens_are_refused(tmp_path, monkeypatch):
    torch.manual_seed(0)
    pair = encoder_decoder_source(with_varied_answers(MODELS["BART"]()), "bart", "text2text-generation")
    monkeypatch.setattr(encoder_decoder, "count_past", lambda _: 0)
    with pytest.raises(ParityError, match="decoder in steps"):
        export(ExportOptions(source="bart", output=tmp_path / "bundle", quantize="none"), traced=pair)
    assert not (tmp_path / "bundle").exists()


def test_a_decoder_that_mixes_source_and_answer_outside_attention_is_refused(tmp_path):
    class Mixing(Decoding):
        def forward(self, input_ids, encoder_hidden_states, encoder_attention_mask=None):
            logits = super().forward(input_ids, encoder_hidden_states, encoder_attention_mask)
            return logits + input_ids[:, :1, None] * encoder_hidden_states[:, :1, :1]

    torch.manual_seed(0)
    pair = encoder_decoder_source(t5(), "t5", "text2text-generation")
    mixing = Mixing(pair.decoder.module.model)
    broken = replace(pair, decoder=replace(pair.decoder, module=mixing))
    with pytest.raises(ExportError):
        export(ExportOptions(source="t5", output=tmp_path / "bundle", quantize="none"), traced=broken)


def test_beam_search_of_a_language_model_equals_transformers(tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    model = with_varied_answers(tf.LlamaForCausalLM(tf.LlamaConfig(vocab_size=100, num_key_value_heads=2, **sizes)))
    export(ExportOptions(source="llama", output=tmp_path / "b", quantize="none"), traced=language_model(model, "llama"))
    ids = np.arange(20, 26)
    for options in ENGINES.values():
        loaded = edgeformer.load(tmp_path / "b", **options)
        for search in SEARCHES[1:]:
            expected = model.generate(torch.from_numpy(ids)[None], max_new_tokens=12, do_sample=False, **search)[0, 6:]
            found = loaded.generate(ids, max_new_tokens=12, **search).ids
            assert found == expected.tolist()[: len(found)], loaded
    drawn = [loaded.generate(ids, num_beams=2, temperature=1.0, seed=seed, max_new_tokens=8).ids for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    with pytest.raises(InputError, match="num_beams is -1"):
        loaded.generate(ids, num_beams=-1)


# ------------------------------------------------------------------------------------------------- a trained model

MONTHS = ["jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec"]
LETTERS = " .-0123456789abcdefghijklmnopqrstuvwxyz"


def dates(rng: random.Random, count: int) -> list[tuple[str, str]]:
    """[(a date as people write it, the same in ISO 8601)]."""
    made = []
    for _ in range(count):
        day, month, year = rng.randint(1, 28), rng.randint(1, 12), rng.randint(1970, 2039)
        name = MONTHS[month - 1]
        text = rng.choice([f"{day} {name} {year}", f"{name} {day} {year}", f"{day}.{month}.{year}"])
        made.append((text, f"{year}-{month:02d}-{day:02d}"))
    return made


def letters_tokenizer() -> tf.PreTrainedTokenizerFast:
    """A tokenizer with one token for each letter and `</s>` at the end."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors

    vocabulary = {token: index for index, token in enumerate(["<pad>", "</s>", *LETTERS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    backend.decoder = decoders.Fuse()
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return tf.PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="</s>")


@pytest.fixture(scope="module")
def translator(tmp_path_factory) -> tuple[Path, tf.T5ForConditionalGeneration]:
    """(folder, model) of a small T5 that rewrites dates, trained here in about 20 s on one core."""
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    sizes = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0}
    buckets = {"relative_attention_num_buckets": 16, "relative_attention_max_distance": 32}
    tokens = {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1}
    model = tf.T5ForConditionalGeneration(tf.T5Config(vocab_size=2 + len(LETTERS), **sizes, **buckets, **tokens))
    tokenizer, rng, steps, rate = letters_tokenizer(), random.Random(0), 350, 5e-3
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    for _ in range(steps):
        texts, answers = zip(*dates(rng, 64), strict=True)
        batch = tokenizer(list(texts), padding=True, return_tensors="pt")
        labels = tokenizer(list(answers), return_tensors="pt").input_ids
        loss = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    torch.set_num_threads(threads)
    folder = tmp_path_factory.mktemp("dates") / "folder"
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder, model


@pytest.fixture(scope="module")
def exported(translator, tmp_path_factory, exported_once):
    """`exported(scheme)`: the bundle of the translator, exported once. Do not change it."""
    return exported_once(translator[0], tmp_path_factory.mktemp("exported"))


@pytest.mark.parametrize("scheme", ["none", "q8", "q4a"])
def test_a_small_t5_learns_to_rewrite_dates_and_its_bundle_does_the_same(scheme, translator, exported):
    _, model = translator
    tokenizer, tests = letters_tokenizer(), dates(random.Random(99), 40)
    sources = [torch.tensor([tokenizer(text).input_ids]) for text, _ in tests]
    expected = [model.generate(input_ids=ids, max_new_tokens=16, do_sample=False)[0, 1:].tolist() for ids in sources]
    for engine in ("cpu", "native"):  # native uses an int8 cache if the weights are quantized
        loaded = edgeformer.load(exported(scheme), engine)
        found = [loaded.generate(text, max_new_tokens=16) for text, _ in tests]
        right = sum(result.text == answer for result, (_, answer) in zip(found, tests, strict=True))
        same = sum(result.ids == ids for result, ids in zip(found, expected, strict=True))
        assert right >= (36 if scheme == "q4a" else 39), f"{right} of 40 dates are right on {engine}"
        if scheme == "none":
            assert same == 40, f"{same} of 40 answers on {engine} are PyTorch's"
            assert {result.finish_reason for result in found} == {"eos"}
        text, answer = tests[0]
        assert "".join(piece.text for piece in loaded.stream(text)) == loaded.generate(text).text
        assert loaded.generate(text, num_beams=4).text == answer


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("scheme", ["none", "q8"])
def test_a_bundle_is_verified_without_torch_and_a_wrong_one_fails(scheme, engine, exported, copy_of, reseal):
    report = verify(exported(scheme), engine)
    assert report.passed
    runs = {"in one run", "step by step"}
    if (scheme, engine) == ("q8", "native"):
        runs |= {f"{run}, int8 cache" for run in runs}  # what the cache costs, without a tolerance
    assert {check.run for check in report.checks} == runs
    wrong = copy_of(exported(scheme))
    with np.load(wrong / "reference.npz") as file:
        arrays = dict(file)
    arrays["input.decoder_input_ids"] = np.roll(arrays["input.decoder_input_ids"], 1, axis=1)
    np.savez(wrong / "reference.npz", **arrays)
    reseal(wrong)
    assert not verify(wrong, engine).passed


def test_calls_that_the_task_does_not_support_are_refused(exported):
    model = edgeformer.load(exported("none"))
    with pytest.raises(InputError, match="has no logits"):
        model.logits([1, 2])
    with pytest.raises(InputError, match="it generates"):
        model.embed(["1.2.1990"])
    with pytest.raises(InputError, match="takes no sound"):
        model.transcribe(np.zeros(100, np.float32))
    with pytest.raises(InputError, match=r"(knows|expected) 0 to 40"):
        model.generate([1, 2, 99])
    with pytest.raises(InputError, match="expected a text or a list of token ids"):
        model.generate([])


def test_auto_takes_native_if_both_graphs_lower_and_names_one_that_does_not(exported, monkeypatch):
    from edgeformer.engines.native.program import lowering

    bundle = exported("none")
    model = edgeformer.load(bundle)
    assert model.engine.name == model.explain().engine == "native"
    need = model.memory(64)
    per_source = (
        2 * 2 * 4 * 16 * 4
    )  # bytes of cross-attention inputs per source token: layers, K and V, heads, head size, float32
    assert model.engine.memory(128).scratch - model.engine.memory(64).scratch >= 64 * per_source
    with pytest.raises(EngineUnavailable, match="its decoder graph: the model needs"):
        edgeformer.load(bundle, "native", context=64, memory_limit=need.total - 1)
    assert edgeformer.load(bundle, "native", context=64, memory_limit=need.total).memory() == need

    whole = lowering.lower_bundle

    def refuse(path):
        if path.name.startswith("decoder"):
            raise EngineUnavailable("1 node cannot be lowered: Frobnicate")
        return whole(path)

    monkeypatch.setattr(lowering, "lower_bundle", refuse)
    model = edgeformer.load(bundle)
    assert model.engine.name == model.explain().engine == "cpu"
    assert model.explain().reasons["native"] == "its decoder graph: 1 node cannot be lowered: Frobnicate"
    with pytest.raises(EngineUnavailable, match="its decoder graph: 1 node"):
        edgeformer.load(bundle, engine="native")


def test_states_of_several_sequences_are_reordered(exported):
    for options in ENGINES.values():
        model = edgeformer.load(exported("none"), **options)
        ids = np.array([model.tokenizer.encode("1 mar 2001")] * 3)
        static = model.pair.encode({"input_ids": ids, "attention_mask": np.ones_like(ids)})
        first, last = np.array([[0, 5], [0, 6], [0, 7]]), np.array([[9], [10], [11]])

        def after(rows, static=static, model=model, first=first, last=last):
            """The last logits, if sequence i continues from the first tokens of sequence rows[i]."""
            state = model.engine.new_state(static)
            model.engine.forward([({"input_ids": first[list(rows)]}, state)])
            return model.engine.forward([({"input_ids": last}, state)])[0]["logits"][:, -1]

        state = model.engine.new_state(static)
        model.engine.forward([({"input_ids": first}, state)])
        for wrong in ((), (0, 1, 3), (0, 1, -1)):
            with pytest.raises(InputError, match="select"):
                state.select(wrong)
        copy = state.fork()
        state.select([2, 0, 2])
        fewer, one = copy.fork(), copy.fork()
        fewer.select([1])
        one.select([1])
        one.select([0, 0, 0])  # static inputs too
        for moved, rows in ((state, (2, 0, 2)), (copy, (0, 1, 2)), (one, (1, 1, 1))):
            found = model.engine.forward([({"input_ids": last}, moved)])[0]["logits"][:, -1]
            assert np.abs(found - after(rows)).max() < 1e-5
        found = model.engine.forward([({"input_ids": last[1:2]}, fewer)])[0]["logits"][:, -1]
        assert np.abs(found - after((0, 1, 2))[1]).max() < 1e-5
        assert np.abs(after((2, 0, 2)) - after((0, 1, 2))).max() > 0.1, "the order of rows changes nothing"
        with pytest.raises(InputError, match="encoder_hidden"):
            model.engine.new_state({"encoder_hidden_states": ids})
