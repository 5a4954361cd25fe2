"""Processors that OpenAI's API and the former transformers define: frequency, presence, bias, forced tokens."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation import logits_process as hf

from edgeformer.decoding.generation_config import GenerationConfig
from edgeformer.decoding.logits_processors import logits_processors, next_token, process
from edgeformer.decoding.penalties import repetition_penalty
from edgeformer.errors import InputError

VOCABULARY = 40


def processed(settings, prompt, answer, scores):
    config = GenerationConfig.of(settings, None, VOCABULARY)
    before = scores.copy()
    found = process(logits_processors(config, len(prompt), 20, None), np.array(prompt + answer, np.int64), scores)
    np.testing.assert_array_equal(scores, before)
    return found


TOKENS = st.lists(st.integers(0, VOCABULARY - 1), max_size=60)


@given(st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=20), TOKENS, st.floats(-2, 2), st.floats(-2, 2))
@settings(max_examples=200, deadline=None)
def test_frequency_and_presence_count_the_tokens_of_the_answer(prompt, answer, frequency, presence):
    scores = np.linspace(-5, 5, VOCABULARY).astype(np.float32)
    found = processed({"frequency_penalty": frequency, "presence_penalty": presence}, prompt, answer, scores)
    counts = Counter(answer)
    expected = [
        float(scores[token]) - counts[token] * frequency - (counts[token] > 0) * presence for token in range(VOCABULARY)
    ]
    np.testing.assert_allclose(found, expected, rtol=0, atol=60 * 2 * 2**-22)  # three roundings of numbers below 128


def test_repetition_comes_before_frequency_as_in_llama_cpp_and_vllm():
    scores = np.full(VOCABULARY, 3.0, np.float32)
    found = processed(
        {"repetition_penalty": 1.5, "frequency_penalty": 0.5, "logit_bias": {7: 3.0}}, [1], [7, 7], scores
    )
    assert found[7] == (3 + 3) / 1.5 - 2 * 0.5 and found[1] == 3 / 1.5 and found[2] == 3


@pytest.mark.parametrize("penalty", [1.3, 0.5])
def test_repetition_penalty_equals_that_of_transformers(penalty):
    scores, ids = np.random.default_rng(0).standard_normal(997).astype(np.float32), [3, 3, 7, 500]
    theirs = hf.RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([ids]), torch.tensor(scores[None]))[0]
    np.testing.assert_allclose(repetition_penalty(penalty, np.array(ids), scores.copy()), theirs.numpy(), rtol=1e-6)


@pytest.mark.parametrize(
    "bias", [{5: 100, 7: -100.0, 0: 0.5}, {"5": 100, "7": -100.0, "0": 0.5}, [[5, 100], [7, -100.0], [0, 0.5]]], ids=str
)
def test_logit_bias_is_added(bias):
    scores = np.arange(VOCABULARY, dtype=np.float32)
    found = processed({"logit_bias": bias}, [1], [], scores)
    expected = scores.copy()
    expected[[5, 7, 0]] += [100, -100, 0.5]
    assert np.array_equal(found, expected)


def test_a_biased_token_that_a_constraint_forbids_stays_forbidden():
    scores = np.full(VOCABULARY, -np.inf, np.float32)
    scores[3] = 0
    found = processed({"logit_bias": {5: 100, 3: -100}}, [1], [], scores)
    assert np.isneginf(found[5]) and found[3] == -100


@pytest.mark.parametrize("forced", [{0: 9, 2: 4}, {"0": 9, "2": 4}, [[0, 9], [2, 4]]], ids=str)
def test_forced_tokens_stand_at_their_places_in_the_answer(forced):
    scores = np.random.default_rng(0).standard_normal(VOCABULARY).astype(np.float32)
    config = GenerationConfig.of({}, {"forced_tokens": forced}, VOCABULARY)
    processors, ids = logits_processors(config, 3, 20, None), [1, 1, 1]
    for _ in range(4):
        ids.append(next_token(processors, np.array(ids), scores, None))
    assert ids[3:] == [9, int(scores.argmax()), 4, int(scores.argmax())]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"logit_bias": {5: 101}}, "logit_bias is .* from -100 to 100"),
        ({"logit_bias": {40: 1}}, "logit_bias holds the token id 40"),
        ({"logit_bias": {-1: 1}}, "logit_bias is"),
        ({"logit_bias": {"x": 1}}, "logit_bias is"),
        ({"logit_bias": {5: float("nan")}}, "logit_bias is"),
        ({"logit_bias": [5]}, "logit_bias is"),
        ({"frequency_penalty": 2.1}, "frequency_penalty is 2.1"),
        ({"presence_penalty": float("nan")}, "presence_penalty is"),
        ({"forced_tokens": {0: 40}}, "forced_tokens holds the token id 40"),
        ({"forced_tokens": {0: -1}}, "forced_tokens is"),
        ({"forced_tokens": {0: 3}, "suppress_tokens": [3]}, "forced_tokens forces 3"),
        ({"dry_base": 0.9}, "dry_base is 0.9"),
        ({"dry_multiplier": -1}, "dry_multiplier is -1"),
        ({"dry_allowed_length": 0}, "dry_allowed_length is 0"),
        ({"dry_sequence_breakers": ["a", ""]}, "dry_sequence_breakers is"),
        ({"xtc_probability": 1.1}, "xtc_probability is 1.1"),
        ({"xtc_threshold": 0}, "xtc_threshold is 0"),
        ({"repeat_penalty": 1.1}, "no argument 'repeat_penalty'; 'repetition_penalty'"),
        ({"json_shema": {}}, "no argument 'json_shema'; 'json_schema'"),
        ({"top_logprobs": 5}, "no argument 'top_logprobs'; 'logprobs'"),
    ],
    ids=str,
)
def test_wrong_values_are_refused_by_name(arguments, message):
    with pytest.raises(InputError, match=message):
        GenerationConfig.of({}, arguments, VOCABULARY)
