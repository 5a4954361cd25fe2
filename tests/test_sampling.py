"""Sampling: transformers' own logits processors are the witness."""

from __future__ import annotations

import numpy as np
import pytest

from edgeformer import sampling
from edgeformer.errors import EdgeformerError, InputError
from edgeformer.sampling import SamplingOptions, sample

RNG = np.random.default_rng


def _logits(seed, size=997):
    return (RNG(seed).standard_normal(size) * 3).astype(np.float32)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    ("ours", "name", "argument"),
    [
        (lambda s, a: sampling.top_k(s, a), "TopKLogitsWarper", 1),
        (lambda s, a: sampling.top_k(s, a), "TopKLogitsWarper", 40),
        (lambda s, a: sampling.top_p(s, a), "TopPLogitsWarper", 0.9),
        (lambda s, a: sampling.top_p(s, a), "TopPLogitsWarper", 0.2),
        (lambda s, a: sampling.top_p(s, a), "TopPLogitsWarper", 1e-6),
        (lambda s, a: sampling.min_p(s, a), "MinPLogitsWarper", 0.05),
        (lambda s, a: sampling.min_p(s, a), "MinPLogitsWarper", 1.0),
        (lambda s, a: sampling.penalize(s, [3, 3, 7, 500], a), "RepetitionPenaltyLogitsProcessor", 1.3),
        (lambda s, a: sampling.penalize(s, [3, 3, 7, 500], a), "RepetitionPenaltyLogitsProcessor", 0.5),
    ],
)
def test_each_step_is_that_of_transformers(seed, ours, name, argument):
    torch = pytest.importorskip("torch")
    processors = pytest.importorskip("transformers.generation.logits_process")
    scores = _logits(seed)
    theirs = getattr(processors, name)(argument)(torch.tensor([[3, 3, 7, 500]]), torch.tensor(scores[None]))
    np.testing.assert_allclose(ours(scores, argument), theirs[0].numpy(), rtol=1e-6)


def test_the_whole_chain_is_that_of_transformers_in_its_order():
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    process = pytest.importorskip("transformers.generation.logits_process")
    config = transformers.GenerationConfig(
        do_sample=True, temperature=0.7, top_k=50, top_p=0.8, min_p=0.02, repetition_penalty=1.2
    )
    settings = transformers.LlamaConfig(
        vocab_size=997, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    model = transformers.LlamaForCausalLM(settings)
    chain = model._get_logits_processor(config, input_ids_seq_length=3)
    assert isinstance(chain, process.LogitsProcessorList)
    for seed in range(5):
        scores, seen = _logits(seed), [1, 5, 9]
        theirs = chain(torch.tensor([seen]), torch.tensor(scores[None]))[0].numpy()
        ours = sampling.penalize(scores, seen, 1.2) / np.float32(0.7)
        ours = sampling.min_p(sampling.top_p(sampling.top_k(ours, 50), 0.8), 0.02)
        assert np.array_equal(ours > -np.inf, theirs > -np.inf)
        np.testing.assert_allclose(ours, theirs, rtol=1e-5)


def test_tokens_are_drawn_with_their_probabilities():
    scores = np.log(np.array([0.5, 0.25, 0.125, 0.125], np.float32))
    options, rng, draws = SamplingOptions(temperature=1.0), RNG(0), 20_000
    counts = np.bincount([sample(scores, [], options, rng) for _ in range(draws)], minlength=4)
    expected = np.array([0.5, 0.25, 0.125, 0.125]) * draws
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    assert chi_square < 16.3  # 3 degrees of freedom: a right sampler is above this once in a thousand seeds
    assert float(((counts[::-1] - expected) ** 2 / expected).sum()) > 1000  # and a wrong one far above


def test_removed_tokens_are_never_drawn():
    scores = _logits(1, 50)
    options, rng = SamplingOptions(temperature=5.0, top_k=3), RNG(0)
    best = set(np.argsort(scores)[-3:].tolist())
    assert {sample(scores, [], options, rng) for _ in range(500)} == best


def test_a_draw_at_either_end_is_a_kept_token():
    class Fixed:
        def __init__(self, value):
            self.value = value

        def random(self):
            return self.value

    scores = np.array([-np.inf, 0.0, 1.0, -np.inf], np.float32)
    assert sampling.draw(scores, Fixed(0.0)) == 1
    assert sampling.draw(scores, Fixed(1.0)) == 2  # rng.random() never gives 1, rounding of the product may


def test_temperature_zero_is_greedy_after_the_penalty():
    scores = np.array([1.0, 5.0, 4.9], np.float32)
    assert sample(scores, [], SamplingOptions(), RNG(0)) == 1
    assert sample(scores, [1], SamplingOptions(repetition_penalty=1.1), RNG(0)) == 2


def test_a_seed_decides_the_draws():
    scores, options = _logits(0), SamplingOptions(temperature=1.0)

    def draws(seed):
        rng = RNG(seed)
        return [sample(scores, [], options, rng) for _ in range(20)]

    assert draws(1) == draws(1)
    assert draws(1) != draws(2)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers_raise(bad, temperature):
    scores = _logits(0)
    scores[500] = bad
    with pytest.raises(EdgeformerError, match="NaN or infinity"):
        sample(scores, [], SamplingOptions(temperature=temperature), RNG(0))


def test_logits_that_are_all_removed_raise_and_one_left_is_taken():
    scores = np.full(10, -np.inf, np.float32)
    with pytest.raises(EdgeformerError, match="NaN or infinity"):
        sample(scores, [], SamplingOptions(temperature=1.0), RNG(0))
    scores[7] = -3.0
    for options in (SamplingOptions(), SamplingOptions(temperature=1.0, top_p=0.5, top_k=3, min_p=0.5)):
        assert sample(scores, [], options, RNG(0)) == 7


@pytest.mark.parametrize(
    ("field", "bad"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("temperature", True),
        ("temperature", "1"),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("top_k", -1),
        ("top_k", 1.5),
        ("top_k", True),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", -1.0),
        ("seed", -1),
        ("seed", 1.0),
    ],
)
def test_options_out_of_range_are_refused(field, bad):
    with pytest.raises(InputError, match=f"{field} is"):
        SamplingOptions(**{field: bad})


def test_all_wrong_options_are_in_one_message():
    with pytest.raises(InputError, match=r"temperature.*top_p.*top_k"):
        SamplingOptions(temperature=-1, top_p=2, top_k=-1)


def test_a_top_k_beyond_the_vocabulary_keeps_all():
    scores = _logits(0, 10)
    assert np.array_equal(sampling.top_k(scores, 1000), scores)
