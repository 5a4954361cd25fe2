"""generation_config.json: the same tokens as transformers' `generate`, greedy and with beams; overrides; errors."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace

import numpy as np
import pytest

import edgeformer
from bench.sources._generators import EOS, VOCABULARY, Generator, prompts
from edgeformer.errors import BundleError, EdgeformerWarning, ExportError, InputError
from edgeformer.export import ExportOptions, export
from edgeformer.export.sources.hub.hub import language_model


@pytest.fixture(scope="module")
def generators(tmp_path_factory):
    """`generators(kind)`: the same model in transformers and as a bundle, created once."""
    folder, cached = tmp_path_factory.mktemp("generators"), {}

    def of(kind):
        if kind not in cached:
            cached[kind] = Generator.of(kind, folder)
        return cached[kind]

    return of


@pytest.fixture
def llama(generators):
    return generators("llama")


def sources(kind):
    """A prompt of several tokens and one of a single token; for speech, two recordings' features."""
    if kind == "whisper":
        return [np.random.default_rng(seed).standard_normal((8, 40)).astype(np.float32) for seed in range(2)]
    return [*prompts(1, 7), *prompts(1, 1)]


def settings_for_its_tokens(generator, kind):
    """Settings about the tokens that this model generates without any setting."""
    ids = generator.found(sources(kind)[0], {})
    return [
        {"bad_words_ids": [ids[:2], [ids[3]], [EOS[0]]]},
        {"sequence_bias": [[ids[:2], -9.0], [[ids[0], 50], 9.0], [[60], 0.5]]},
        {"suppress_tokens": [ids[0], 40]},
        {"begin_suppress_tokens": [ids[0], 40]},
    ]


SETTINGS = [
    {},
    {"repetition_penalty": 1.7},
    {"encoder_repetition_penalty": 0.5},
    {"no_repeat_ngram_size": 1},
    {"no_repeat_ngram_size": 2},
    {"encoder_no_repeat_ngram_size": 1},
    {"min_length": 12},
    {"min_new_tokens": 9},
    {"forced_bos_token_id": 33, "begin_suppress_tokens": [33, 40]},
    {"forced_eos_token_id": 2},
    {"exponential_decay_length_penalty": [3, 1.3]},
    {"remove_invalid_values": True, "renormalize_logits": True, "repetition_penalty": 1.4},
    {"eos_token_id": list(range(2, 60, 3))},
    {"eos_token_id": None},
    {"max_length": 11, "max_new_tokens": None},
    {"max_length": 30, "max_new_tokens": 4},
    {"no_repeat_ngram_size": 2, "repetition_penalty": 1.2, "min_new_tokens": 5, "suppress_tokens": [50, 51, 52]},
]
SEARCHES = [
    {},
    {"num_beams": 4},
    {"num_beams": 4, "length_penalty": 0.0, "early_stopping": True},
    {"num_beams": 3, "length_penalty": 2.0, "early_stopping": "never"},
]


# All models are compared greedily and with one beam search; the other searches do not depend on the model.
@pytest.mark.parametrize(
    ("kind", "search"),
    [
        (kind, search)
        for kind in ("llama", "t5", "whisper")
        for search in (SEARCHES if kind == "llama" else SEARCHES[:2])
    ],
    ids=str,
)
def test_every_setting_gives_the_tokens_of_transformers(generators, kind, search):
    generator, changed = generators(kind), 0
    for setting in SETTINGS + settings_for_its_tokens(generator, kind):
        for source in sources(kind)[: 2 if kind == "llama" else 1]:
            found = generator.found(source, setting | search)
            assert found == generator.expected(source, setting | search), setting
            changed += found != generator.found(source, search)
    assert changed > len(SETTINGS) / 2, "the settings change nothing"


def test_a_length_penalty_of_zero_is_not_the_default(llama):
    """Every second token is an end token, so the length of the best beam depends on the penalty."""
    eos, found = {"eos_token_id": list(range(0, VOCABULARY, 2))}, {}
    for penalty in (0.0, 1.0, 3.0):
        settings = {"num_beams": 4, "length_penalty": penalty, **eos}
        found[penalty] = [llama.found(prompt, settings) for prompt in prompts(4, 6)]
        assert found[penalty] == [llama.expected(prompt, settings) for prompt in prompts(4, 6)]
    assert sum(map(len, found[0.0])) < sum(map(len, found[3.0])) and found[0.0] != found[1.0]


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_an_argument_overrides_the_file(generators, kind):
    generator, prompt = generators(kind), sources(kind)[0]
    settings = {"no_repeat_ngram_size": 2, "repetition_penalty": 1.7, "num_beams": 4, "max_new_tokens": 5}
    arguments = {"no_repeat_ngram_size": 0, "repetition_penalty": 1.0, "num_beams": 1, "max_new_tokens": 9}
    assert generator.found(prompt, settings, **arguments) == generator.found(prompt, {"max_new_tokens": 9})
    assert generator.found(prompt, {}, **settings) == generator.expected(prompt, settings)
    assert generator.found(prompt, settings, repetition_penalty=None) == generator.expected(prompt, settings)
    pieces = generator.with_settings(settings).stream(prompt)
    assert [piece.id for piece in pieces] == generator.expected(
        prompt, settings
    )  # a beam search streams all pieces at its end


def test_an_argument_overrides_do_sample_of_the_file(llama):
    prompt = sources("llama")[0]
    sampling = {"do_sample": True, "temperature": 1.5, "top_p": 0.9}
    greedy = llama.expected(prompt, {})
    assert llama.found(prompt, sampling, seed=1) == llama.found(prompt, sampling, seed=1)
    assert len({tuple(llama.found(prompt, sampling)) for _ in range(4)}) > 1, "without a seed it is random"
    for arguments in ({"temperature": 0}, {"do_sample": False}, {"temperature": 0.0, "seed": 3}, {"top_k": 1}):
        assert llama.found(prompt, sampling, **arguments) == greedy
    assert llama.found(prompt, {"temperature": 1.5, "top_p": 0.5}, seed=1) == greedy  # as transformers: no do_sample
    assert llama.found(prompt, {"temperature": 0.0}) == greedy
    drawn = {tuple(llama.found(prompt, {}, temperature=2.0, seed=seed)) for seed in range(4)}
    assert len(drawn) > 1, "an argument samples where the file does not"


def test_first_tokens_are_drawn_with_the_probabilities_of_transformers(llama):
    import torch

    settings = {"do_sample": True, "temperature": 0.8, "top_k": 6, "repetition_penalty": 1.3, "max_new_tokens": 1}
    prompt, draws = sources("llama")[0], 600
    with torch.no_grad():
        logits = llama.reference(torch.tensor([prompt])).logits[:, -1]
    config = llama.reference.generation_config.__class__(eos_token_id=EOS, **settings)
    config._eos_token_tensor = torch.tensor(EOS)
    chain = llama.reference._get_logits_processor(config, len(prompt), torch.tensor([prompt]))
    expected = chain(torch.tensor([prompt]), logits).softmax(-1)[0].numpy() * draws
    model = llama.with_settings(settings)
    found = np.bincount([model.generate(prompt, seed=seed).ids[0] for seed in range(draws)], minlength=VOCABULARY)
    assert not found[expected == 0].any()
    some = expected > 0
    chi_square = ((found - expected)[some] ** 2 / expected[some]).sum()
    assert chi_square < 20.5  # 5 degrees of freedom: a correct sampler exceeds this for one seed in a thousand
    uniform = draws / some.sum()
    assert ((found[some] - uniform) ** 2 / uniform).sum() > 40  # the bound rejects a uniform draw


def test_lengths_time_and_stop_strings_end_a_generation(lm):
    model = edgeformer.load(lm, "cpu", threads=1)
    assert len(model.generate([5], ignore_eos=True).ids) == 128
    assert model.generate([5], max_time=0.0, ignore_eos=True).finish_reason == "time"
    assert model.generate([5], max_time=0.0, num_beams=2, ignore_eos=True).finish_reason == "time"
    free = model.generate("hello", max_new_tokens=20, num_beams=3, ignore_eos=True)
    stop = free.text[4:6]
    for arguments in ({"stop": stop}, {"stop_strings": [stop, "§§"]}):
        for beams in (1, 3):
            found = model.generate("hello", max_new_tokens=20, num_beams=beams, ignore_eos=True, **arguments)
            assert stop not in found.text
            assert (found.finish_reason == "stop") == (stop in model.tokenizer.decode(found.ids))
    with pytest.raises(InputError, match="prompt has 3 tokens and max_length is 3"):
        model.generate([5, 6, 7], max_length=3)


def test_beam_search_without_a_cache_gives_the_same_ids(bundles, tmp_path):
    from support import tiny

    def drop_cache(proto):
        for node in proto.graph.node:
            if node.op_type == "Attention":
                del node.input[4:], node.output[1:]
        for ports in (proto.graph.input, proto.graph.output):
            kept = [value for value in ports if not value.name.startswith(("past", "present"))]
            del ports[:]
            ports.extend(kept)

    tiny.write_lm(tmp_path / "uncached", with_reference=False, change=drop_cache)
    prompt, settings = [5, 17, 90, 200], {"max_new_tokens": 8, "num_beams": 3, "ignore_eos": True}
    expected = edgeformer.load(bundles / "float", "cpu", threads=1).generate(prompt, **settings).ids
    assert edgeformer.load(tmp_path / "uncached", "cpu", threads=1).generate(prompt, **settings).ids == expected


# ------------------------------------------------------------------------------------------- warnings and errors


def _with(bundle, reseal, settings):
    (bundle / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 2]} | settings))
    reseal(bundle)
    return bundle


UNSUPPORTED_VALUES = {
    "guidance_scale": 1.5,
    "penalty_alpha": 0.6,
    "dola_layers": "low",
    "num_beam_groups": 2,
    "diversity_penalty": 0.5,
    "force_words_ids": [[5]],
    "token_healing": True,
    "num_return_sequences": 3,
    "is_assistant": True,
    "watermarking_config": {"bias": 2.5},
}


@pytest.mark.parametrize("name", UNSUPPORTED_VALUES)
def test_an_unsupported_setting_warns_once_at_load_and_is_refused_as_an_argument(lm, copy_of, reseal, name):
    value = UNSUPPORTED_VALUES[name]
    bundle = _with(copy_of(lm), reseal, {name: value, "pad_token_id": 0, "use_cache": False})
    with pytest.warns(EdgeformerWarning, match=f"{name}=") as warned:
        model = edgeformer.load(bundle, "cpu", threads=1)
    assert len(warned) == 1
    assert f"{name}=" in str(model.explain())
    with pytest.raises(InputError, match=f"{name}="):
        edgeformer.load(lm, "cpu", threads=1).generate([5], **{name: value})
    if name == "watermarking_config":
        with pytest.raises(InputError, match="watermarking_config"):
            model.generate([5])
        assert model.generate([5], max_new_tokens=3, watermarking_config={}).ids
    else:
        assert model.generate([5], max_new_tokens=3).ids


def test_unknown_names_and_invalid_end_tokens_are_named(lm, copy_of, reseal):
    bundle = _with(copy_of(lm), reseal, {"from_the_future": 3, "eos_token_id": [2, 5000]})
    with pytest.warns(EdgeformerWarning, match="from_the_future=3 is unknown|eos_token_id=5000 is no token") as warned:
        edgeformer.load(bundle, "cpu", threads=1)
    assert len(warned) == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = edgeformer.load(lm, "cpu", threads=1)
    with pytest.raises(InputError, match="no argument 'no_repeat_ngram'; 'no_repeat_ngram_size'"):
        model.generate([5], no_repeat_ngram=2)
    with pytest.raises(InputError, match="no argument 'decoder_start_token_id'"):
        model.generate([5], decoder_start_token_id=2)


WRONG = {
    "top_p": 2,
    "temperature": 0.0,
    "top_k": -1,
    "do_sample": "yes",
    "eos_token_id": "</s>",
    "bad_words_ids": [5],
    "sequence_bias": {"(1, 2)": 3.0},
    "forced_bos_token_id": 5000,
    "repetition_penalty": 0,
    "no_repeat_ngram_size": 1.5,
    "exponential_decay_length_penalty": 1.2,
    "num_beams": 0,
    "early_stopping": "sometimes",
    "max_new_tokens": 0,
    "stop_strings": [3],
    "suppress_tokens": "all",
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_value_is_refused_by_name(lm, copy_of, reseal, name):
    settings = {"do_sample": True, name: WRONG[name]}
    with pytest.raises(BundleError, match=f"generation_config.json: .*{name}"):
        edgeformer.load(_with(copy_of(lm), reseal, settings), "cpu", threads=1)
    with pytest.raises(InputError, match=name):
        edgeformer.load(lm, "cpu", threads=1).generate([5], **settings)


def test_a_forced_token_that_is_also_forbidden_is_refused(lm):
    with pytest.raises(InputError, match=r"forced_eos_token_id forces \[5\]"):
        edgeformer.load(lm, "cpu", threads=1).generate([5], forced_eos_token_id=5, suppress_tokens=[5, 6])


def test_an_export_notes_unsupported_settings_and_refuses_wrong_values(llama, tmp_path):
    model = llama.reference
    model.generation_config = model.generation_config.__class__(eos_token_id=None, guidance_scale=2.0)
    options = ExportOptions(source="llama", output=tmp_path / "b", quantize="none", tokens=0)
    manifest = export(options, traced=language_model(model, "llama"))
    assert any("guidance_scale=2.0" in note for note in manifest["notes"])
    model.config.eos_token_id = 5  # transformers' generate does not read it
    assert json.loads((tmp_path / "b" / "generation_config.json").read_text())["eos_token_id"] is None
    model.generation_config = model.generation_config.__class__(do_sample=True, top_p=3.0)
    options = replace(options, output=tmp_path / "c")
    with pytest.raises(ExportError, match=r"top_p is 3\.0"):
        export(options, traced=language_model(model, "llama"))


def test_every_field_of_transformers_is_supported_named_or_irrelevant():
    import transformers as tf

    from bench.sources import generation
    from edgeformer.decoding.generation_fields import CHECKS, IRRELEVANT, STARTS, UNSUPPORTED

    known = CHECKS.keys() | IRRELEVANT | STARTS | UNSUPPORTED.keys()
    assert set(tf.GenerationConfig().to_dict()) <= known
    tried = (generation.VALUES, generation.SAMPLING, generation.NAMED, generation.WHY, generation.TIMED)
    token_settings = {"bad_words_ids", "sequence_bias", "suppress_tokens", "begin_suppress_tokens"}
    assert set(generation.settings()) <= token_settings.union(*tried), "a field that the sweep does not try"


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"language": "<|de|>"}, [3, 21, 31]),
        ({"language": "de", "task": "translate"}, [3, 21, 32]),
        ({"forced_decoder_ids": [[1, 20], [2, 32]]}, [3, 20, 32]),
        ({"forced_decoder_ids": [[1, 20], [2, 32]], "language": "de"}, [3, 21, 31]),
    ],
    ids=str,
)
def test_the_file_sets_the_language_and_the_task(generators, settings, expected):
    from edgeformer.tasks.speech_prompt import speech_prompt

    tokens = {"lang_to_id": {"<|en|>": 20, "<|de|>": 21}, "task_to_id": {"transcribe": 31, "translate": 32}}
    pair = generators("whisper").with_settings(tokens | settings).pair
    assert speech_prompt(pair, {}, None, None)[0] == expected
    assert speech_prompt(pair, {}, "en", "transcribe")[0] == [3, 20, 31]
