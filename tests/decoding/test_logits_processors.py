"""Logits processors, compared with those that transformers builds from the same generation_config."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers as tf
from transformers.generation import logits_process as hf

from edgeformer.decoding import filters
from edgeformer.decoding.generation_config import GenerationConfig
from edgeformer.decoding.logits_processors import encoder_no_repeat_ngram, logits_processors, process
from edgeformer.decoding.sampling import Candidates
from edgeformer.errors import EdgeformerError

VOCABULARY, LONGEST = 60, 20
EOS = [2, 7]


@pytest.fixture(scope="module")
def reference():
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    return tf.LlamaForCausalLM(tf.LlamaConfig(vocab_size=VOCABULARY, **sizes))


def theirs(reference, settings, prompt, ids, scores):
    """`scores` after transformers' processors, built with the end tokens and the lengths that `generate` sets."""
    config = tf.GenerationConfig(**{"eos_token_id": EOS, **settings})
    config.update(**config._get_default_generation_params(), defaults_only=True)
    config.max_length = len(prompt) + LONGEST
    if config.min_new_tokens is not None:
        config.min_length = config.min_new_tokens + len(prompt)
    reference._prepare_special_tokens(config, device="cpu")
    chain = reference._get_logits_processor(
        config, input_ids_seq_length=len(prompt), encoder_input_ids=torch.tensor([prompt]), device="cpu"
    )
    return chain(torch.tensor([ids]), torch.tensor(scores[None]))[0].numpy()


def ours(settings, prompt, ids, scores):
    config = GenerationConfig.of({"eos_token_id": EOS, **settings}, None, VOCABULARY)
    before = scores.copy()
    found = process(logits_processors(config, len(prompt), LONGEST, prompt), np.array(ids), scores)
    np.testing.assert_array_equal(scores, before)  # processors change nothing in place
    return found


def same(reference, settings, prompt, ids, scores):
    found, expected = ours(settings, prompt, ids, scores), theirs(reference, settings, prompt, ids, scores)
    assert np.array_equal(np.isneginf(found), np.isneginf(expected)), settings
    # float32: a few roundings of the value, and exp and log differ in the last bits
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)
    return found


WORDS = [[5], [11, 12], [12, 11, 12], [2]]
SETTINGS = [
    {"sequence_bias": [[[5], 2.5], [[11, 12], -4.0], [[12], 1.0], [[3, 11, 12], 7.0], [[5], -1.0]]},
    {"encoder_repetition_penalty": 1.8},
    {"encoder_repetition_penalty": 0.5},
    {"repetition_penalty": 1.3},
    {"repetition_penalty": 0.6},
    {"no_repeat_ngram_size": 1},
    {"no_repeat_ngram_size": 2},
    {"no_repeat_ngram_size": 4},
    {"encoder_no_repeat_ngram_size": 1},
    {"encoder_no_repeat_ngram_size": 3},
    {"bad_words_ids": WORDS},
    {"min_length": 12},
    {"min_new_tokens": 4},
    {"forced_bos_token_id": 9},
    {"forced_eos_token_id": 7},
    {"forced_eos_token_id": [7, 9]},
    {"exponential_decay_length_penalty": [2, 1.05]},
    {"exponential_decay_length_penalty": [0, 0.7]},
    {"suppress_tokens": [0, 2, 59, 60, 1000, -1]},
    {"begin_suppress_tokens": [4, 5, 2, 90]},
    {"begin_suppress_tokens": [4, 5, 2], "forced_bos_token_id": 9},
    {"renormalize_logits": True},
    # Last, and not combined with filters: it gives tokens equal scores, and a filter's choice among them is arbitrary.
    {"remove_invalid_values": True},
]
FILTERS = [
    {"temperature": 0.7},
    {"temperature": 2.0},
    {"top_h": 0.4},
    {"top_h": 0.9},
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": 1000},
    {"top_p": 0.0},
    {"top_p": 0.5},
    {"top_p": 0.95},
    {"min_p": 0.05},
    {"min_p": 1.0},
    {"typical_p": 0.3},
    {"typical_p": 0.95},
    {"epsilon_cutoff": 0.01},
    {"epsilon_cutoff": 0.9},
    {"eta_cutoff": 0.02},
    {"eta_cutoff": 0.9},
]


def texts(count=8):
    """(prompt, prompt and new ids, scores [vocabulary]). Few different tokens, so that n-grams repeat."""
    rng = np.random.default_rng(5)
    for number in range(count):
        prompt = rng.integers(11, 13, 1 if number % 4 == 0 else 9).tolist()
        new = [0, 0, 1, 3, 6, LONGEST - 1, 5, 2][number % 8]
        yield prompt, prompt + rng.integers(11, 13, new).tolist(), (rng.standard_normal(VOCABULARY) * 3).astype("f4")


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_each_processor_equals_that_of_transformers(reference, setting):
    changed = 0
    for prompt, ids, scores in texts():
        changed += not np.array_equal(same(reference, setting, prompt, ids, scores), scores)
    finite = setting == {"remove_invalid_values": True}  # changes nothing here; see the test with NaN below
    assert bool(changed) != finite


@pytest.mark.parametrize("beams", [1, 4])
@pytest.mark.parametrize("setting", FILTERS, ids=str)
def test_each_sampling_filter_equals_that_of_transformers(reference, setting, beams):
    changed = 0
    for prompt, ids, scores in texts():
        settings = {"top_k": 0, **setting, "do_sample": True, "num_beams": beams}
        changed += not np.array_equal(same(reference, settings, prompt, ids, scores), scores)
    assert bool(changed) != (setting in ({"top_k": 1000},))


@pytest.mark.parametrize("seed", range(40))
def test_combinations_run_in_the_order_of_transformers(reference, seed):
    rng = np.random.default_rng(seed)
    settings = {"do_sample": bool(seed % 2), "num_beams": int(rng.integers(1, 4))}
    for table, count in ((SETTINGS[: -1 if seed % 2 else None], 4), (FILTERS, 3 * (seed % 2))):
        for place in rng.choice(len(table), count, replace=False):
            settings |= table[place]
    for prompt, ids, scores in texts():
        same(reference, settings, prompt, ids, scores)


def test_a_wrong_order_gives_other_scores(reference):
    settings = {"do_sample": True, "temperature": 3.0, "top_k": 0, "min_p": 0.2}
    prompt, ids, scores = next(iter(texts()))
    late = Candidates(scores).at(filters.min_p(scores, 0.2)).spread(VOCABULARY) / 3.0
    assert not np.array_equal(np.isneginf(late), np.isneginf(theirs(reference, settings, prompt, ids, scores)))


def test_remove_invalid_values_replaces_nan_and_infinity(reference):
    prompt, ids, scores = next(iter(texts()))
    scores[[3, 4, 5]] = np.nan, np.inf, -np.inf
    settings = {"remove_invalid_values": True, "sequence_bias": [[[8], 1.0]]}
    found = same(reference, settings, prompt, ids, scores)
    assert found[3] == 0 and np.isfinite(found).all()


def test_no_settings_give_no_processors():
    assert logits_processors(GenerationConfig(), 5, 10, [1, 2]) == ()
    assert logits_processors(GenerationConfig.of({"min_length": 3, "eos_token_id": 2}), 5, 10, None) == ()


def test_encoder_processors_need_a_source_of_tokens():
    config = GenerationConfig(encoder_repetition_penalty=2.0, encoder_no_repeat_ngram_size=2)
    assert logits_processors(config, 1, 10, None) == () and len(logits_processors(config, 1, 10, [4])) == 2


def test_forbidding_every_token_raises():
    config = GenerationConfig.of({"suppress_tokens": [0, 1, 2], "do_sample": True})
    with pytest.raises(EdgeformerError, match="forbid every token"):
        process(logits_processors(config, 1, 5, None), np.array([1]), np.zeros(3, np.float32))


@pytest.mark.parametrize("size", range(1, 6))
def test_encoder_n_grams_equal_those_of_transformers(size):
    rng = np.random.default_rng(size)
    for length in range(1, 12):
        ids, source = rng.integers(0, 3, length), rng.integers(0, 3, 10)
        scores = np.zeros(4, np.float32)
        expected = hf.EncoderNoRepeatNGramLogitsProcessor(size, torch.tensor(source[None]))(
            torch.tensor(ids[None]), torch.tensor(scores[None])
        )
        assert np.array_equal(encoder_no_repeat_ngram(source, size, ids, scores), expected[0].numpy())
