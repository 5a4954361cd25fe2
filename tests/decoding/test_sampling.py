"""Sampling: filters on a large vocabulary, compared with transformers; the random draw; checks of arguments."""

from __future__ import annotations

import numpy as np
import pytest

from edgeformer.decoding import sampling
from edgeformer.decoding.generation_config import GenerationConfig
from edgeformer.decoding.limits import Limits
from edgeformer.decoding.logits_processors import repetition_penalty
from edgeformer.decoding.request import CallOptions, Request
from edgeformer.decoding.sampling import choose
from edgeformer.errors import EdgeformerError, InputError

ANY_LENGTH = Limits(True, True, None, "", None, frozenset(), None)

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
        (lambda s, a: repetition_penalty(a, np.array([3, 3, 7, 500]), s), "RepetitionPenaltyLogitsProcessor", 1.3),
        (lambda s, a: repetition_penalty(a, np.array([3, 3, 7, 500]), s), "RepetitionPenaltyLogitsProcessor", 0.5),
    ],
)
def test_each_filter_equals_that_of_transformers(seed, ours, name, argument):
    torch = pytest.importorskip("torch")
    processors = pytest.importorskip("transformers.generation.logits_process")
    scores = _logits(seed)
    theirs = getattr(processors, name)(argument)(torch.tensor([[3, 3, 7, 500]]), torch.tensor(scores[None]))
    np.testing.assert_allclose(ours(scores, argument), theirs[0].numpy(), rtol=1e-6)


def test_tokens_are_drawn_with_their_probabilities():
    scores = np.log(np.array([0.5, 0.25, 0.125, 0.125], np.float32))
    rng, draws = RNG(0), 20_000
    counts = np.bincount([choose(scores, rng) for _ in range(draws)], minlength=4)
    expected = np.array([0.5, 0.25, 0.125, 0.125]) * draws
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    assert chi_square < 16.3  # 3 degrees of freedom: a correct sampler exceeds this for one seed in a thousand
    assert float(((counts[::-1] - expected) ** 2 / expected).sum()) > 1000  # and a wrong one exceeds it by far


def test_removed_tokens_are_never_drawn():
    scores = _logits(1, 50)
    rng, best = RNG(0), set(np.argsort(scores)[-3:].tolist())
    assert {choose(sampling.top_k(scores / 5, 3), rng) for _ in range(500)} == best


def test_draws_at_both_ends_of_the_range_give_kept_tokens():
    class Fixed:
        def __init__(self, value):
            self.value = value

        def random(self):
            return self.value

    scores = np.array([-np.inf, 0.0, 1.0, -np.inf], np.float32)
    assert sampling.draw(scores, Fixed(0.0)) == 1
    assert (
        sampling.draw(scores, Fixed(1.0)) == 2
    )  # rng.random() is below 1, but its product with the sum may round up to the sum


def test_the_seed_determines_the_draws():
    scores = _logits(0)

    def draws(seed):
        rng = Request([1], GenerationConfig(do_sample=True), ANY_LENGTH, 1, seed=seed).rng()
        return [choose(scores, rng) for _ in range(20)]

    assert draws(1) == draws(1)
    assert draws(1) != draws(2)
    assert draws(None) != draws(None)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_and_infinite_logits_raise(bad):
    scores = _logits(0)
    scores[500] = bad
    with pytest.raises(EdgeformerError, match="NaN or infinity"):
        sampling.check(scores)


def test_logits_without_any_token_raise_and_a_single_token_is_chosen():
    scores = np.full(10, -np.inf, np.float32)
    with pytest.raises(EdgeformerError, match="NaN or infinity"):
        sampling.check(scores)
    scores[7] = -3.0
    config = GenerationConfig(do_sample=True, top_p=0.5, top_k=3, min_p=0.5, typical_p=0.5, top_h=0.5, eta_cutoff=0.5)
    left = scores
    for mask in sampling.filters(config):
        left = mask(left)
    assert choose(left, RNG(0)) == choose(scores, None) == 7


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("temperature", True),
        ("temperature", "1"),
        ("top_p", -0.1),
        ("top_p", 1.01),
        ("top_k", -1),
        ("top_k", 1.5),
        ("top_k", True),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", -1.0),
    ],
)
def test_arguments_out_of_range_are_refused(name, bad):
    with pytest.raises(InputError, match=f"{name} is"):
        GenerationConfig.of({}, {name: bad})


@pytest.mark.parametrize("seed", [-1, 1.0, True])
def test_a_wrong_seed_is_refused(seed):
    with pytest.raises(InputError, match="seed is"):
        CallOptions(seed)


def test_all_wrong_arguments_are_in_one_message():
    with pytest.raises(InputError, match=r"temperature.*top_k.*top_p"):
        GenerationConfig.of({}, {"temperature": -1, "top_p": 2, "top_k": -1})


def test_a_top_k_above_the_vocabulary_size_keeps_all():
    scores = _logits(0, 10)
    assert np.array_equal(sampling.top_k(scores, 1000), scores)
