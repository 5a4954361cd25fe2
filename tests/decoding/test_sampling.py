"""Sampling: the random draw, what `next_token` makes of all processors, checks of arguments."""

from __future__ import annotations

import numpy as np
import pytest

from edgeformer.decoding import sampling, vocabulary
from edgeformer.decoding.generation_config import GenerationConfig
from edgeformer.decoding.limits import Limits
from edgeformer.decoding.logits_processors import logits_processors, next_token, process
from edgeformer.decoding.request import CallOptions, Request
from edgeformer.decoding.sampling import Candidates, choose
from edgeformer.errors import EdgeformerError, InputError

ANY_LENGTH = Limits(True, True, None, "", None, frozenset(), None)

RNG = np.random.default_rng


def _logits(seed, size=997):
    return (RNG(seed).standard_normal(size) * 3).astype(np.float32)


def reference_draw(scores, share):
    """Inverse transform sampling in the order of the ids, over all tokens, in float64."""
    likely = np.exp(scores - scores.max()).astype(np.float64)
    ends = np.cumsum(likely)
    return int(np.searchsorted(ends, share * ends[-1], side="right"))


@pytest.mark.parametrize("size", [1, 5, 255, 256, 2047, 2048, 2049, 5000, 49_152])
def test_draws_are_those_of_a_running_sum_over_the_vocabulary(size):
    scores = _logits(size, size)
    scores[:: 3 if size > 5 else 9] = -np.inf
    scores[size // 2] = 0.0
    found, expected = RNG(1), RNG(1)
    draws = [(sampling.draw(scores, found), reference_draw(scores, expected.random())) for _ in range(300)]
    assert all(scores[token] > -np.inf for token, _ in draws)
    # Sums of blocks are float32: a share within 1e-6 of a token's end may fall on its other side.
    assert sum(ours != theirs for ours, theirs in draws) <= (1 if size > 2048 else 0)
    assert size < 2000 or len({token for token, _ in draws}) > 50


def test_tokens_are_drawn_with_their_probabilities():
    scores = np.log(np.array([0.5, 0.25, 0.125, 0.125], np.float32))
    rng, draws = RNG(0), 20_000
    counts = np.bincount([choose(Candidates(scores), rng) for _ in range(draws)], minlength=4)
    expected = np.array([0.5, 0.25, 0.125, 0.125]) * draws
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    assert chi_square < 16.3  # 3 degrees of freedom: a correct sampler exceeds this for one seed in a thousand
    assert float(((counts[::-1] - expected) ** 2 / expected).sum()) > 1000  # and a wrong one exceeds it by far


def test_removed_tokens_are_never_drawn():
    scores = _logits(1, 50)
    rng, best = RNG(0), set(np.argsort(scores)[-3:].tolist())
    settings = GenerationConfig(do_sample=True, top_k=3, temperature=5.0)
    assert {next_token(logits_processors(settings, 1, 9, None), np.array([1]), scores, rng) for _ in range(500)} == best


def test_draws_at_both_ends_of_the_range_give_kept_tokens():
    class Fixed:
        def __init__(self, value):
            self.value = value

        def random(self):
            return self.value

    for before, between, after in ((1, 0, 1), (3000, 0, 9), (700, 2500, 700)):
        gap = [[-np.inf] * count for count in (before, between, after)]
        scores = np.array([*gap[0], 0.0, *gap[1], 1.0, *gap[2]], np.float32)
        assert sampling.draw(scores, Fixed(0.0)) == before
        # rng.random() is below 1, but its product with the sum may round up to the sum
        assert sampling.draw(scores, Fixed(1.0)) == before + 1 + between


def test_the_seed_determines_the_draws():
    scores = _logits(0)

    def draws(seed):
        rng = Request([1], GenerationConfig(do_sample=True), ANY_LENGTH, 1, seed=seed).rng()
        return [choose(Candidates(scores), rng) for _ in range(20)]

    assert draws(1) == draws(1)
    assert draws(1) != draws(2)
    assert draws(None) != draws(None)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_and_infinite_logits_raise(bad):
    scores = _logits(0)
    scores[500] = bad
    with pytest.raises(EdgeformerError, match="NaN or infinity"):
        sampling.check(scores.max())


def test_logits_without_any_token_raise_and_a_single_token_is_chosen():
    scores = np.full(10, -np.inf, np.float32)
    with pytest.raises(EdgeformerError, match="NaN or infinity"):
        sampling.check(scores.max())
    scores[7] = -3.0
    config = GenerationConfig(do_sample=True, top_p=0.5, top_k=3, min_p=0.5, typical_p=0.5, top_h=0.5, eta_cutoff=0.5)
    processors = logits_processors(config, 1, 9, None)
    assert next_token(processors, np.array([1]), scores, RNG(0)) == choose(Candidates(scores), None) == 7


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


SAMPLED = [
    {"top_k": 0},
    {"temperature": 0.7, "top_k": 50},
    {"top_k": 0, "top_p": 0.9},
    {"top_k": 0, "min_p": 0.05, "repetition_penalty": 1.2},
    {"top_k": 0, "typical_p": 0.8, "renormalize_logits": True},
    {"top_k": 0, "top_h": 0.8, "frequency_penalty": 0.5, "presence_penalty": 0.5},
    {"top_k": 0, "epsilon_cutoff": 3e-4, "eta_cutoff": 3e-4},
    {"top_k": 0, "xtc_probability": 0.5, "xtc_threshold": 0.02},
    {"dry_multiplier": 0.8, "top_k": 200, "top_p": 0.95, "min_p": 0.01, "xtc_probability": 0.5, "logit_bias": {3: 9.0}},
]


@pytest.mark.parametrize("settings", SAMPLED, ids=str)
def test_next_token_is_a_draw_of_what_process_leaves(settings):
    config = GenerationConfig.of({"do_sample": True, "eos_token_id": 2}, settings)
    processors, ids, seen = logits_processors(config, 3, 99, None), [4, 5, 6], set()
    found, expected = RNG(3), RNG(3)
    for step in range(60):
        scores = _logits(step, 3000)
        before = scores.copy()
        token = next_token(processors, np.array(ids), scores, found)
        assert np.array_equal(scores, before)
        left = process(processors, np.array(ids), scores, expected)
        assert token == choose(Candidates(left), expected) and left[token] > -np.inf
        ids.append(token)
        seen.add(token)
    assert found.random() == expected.random() and len(seen) > 10


def test_no_processors_leave_the_scores_as_they_are():
    scores = _logits(0, 10)
    assert process((), np.array([1]), scores) is scores
    assert next_token((), np.array([1]), scores, None) == scores.argmax()
    config = GenerationConfig(do_sample=True, top_k=1000)
    assert np.array_equal(process(logits_processors(config, 1, 9, None), np.array([1]), scores), scores)


def reference_weights(scores):
    """exp(score - max), their sum and slope, in float64."""
    shifted = scores.astype(np.float64) - scores.max()
    likely = np.exp(shifted)
    return likely, likely.sum(), (likely * np.where(np.isfinite(shifted), shifted, 0)).sum()


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("size", [1, 17, 255, 256, 2047, 2048, 2049, 2300, 5000, 49_152])
def test_weights_are_exponentials_with_the_sums_of_blocks(size, native, monkeypatch):
    if native:
        pytest.importorskip("edgeformer._native")
    else:
        monkeypatch.setattr(vocabulary, "_loaded", lambda: None)
    for spread in (0.01, 1.0, 9.0):
        scores = (_logits(size, size) * spread).astype(np.float32)
        scores[1::7] = -np.inf
        found = sampling.weights(scores)
        likely, total, slope = reference_weights(scores)
        # exp: 2 ulp, and the rounding of its argument; a sum of 256: numpy adds pairs of 8 lanes of 16
        relative = 4 * 2**-24 + float(np.abs(scores - scores.max())[likely > 0].max()) * 2**-24
        each = found.at(None)
        assert np.allclose(each, likely, rtol=relative, atol=1.7e-38)  # 0 below exp(-87)
        assert (each[1::7] == 0).all() and each[scores.argmax()] == 1
        assert np.array_equal(found.at(np.array([0, size - 1])), each[[0, size - 1]])
        assert found.entropy == pytest.approx(np.log(total) - slope / total, rel=1e-5, abs=1e-5)
        assert found.total == pytest.approx(total, rel=relative + 24 * 2**-24)
        blocks = -(-size // vocabulary.BLOCK) if size >= sampling.LONG else 1
        assert len(found.sums) == blocks and found.sums.dtype == np.float64
        if blocks > 1:
            edges = range(0, size, vocabulary.BLOCK)
            parts = [likely[at : at + vocabulary.BLOCK].sum() for at in edges]
            assert np.allclose(found.sums, parts, rtol=relative + 24 * 2**-24)


def test_the_extension_makes_the_weights_of_large_vocabularies():
    native = pytest.importorskip("edgeformer._native")
    assert vocabulary._loaded() is native and native.SUM_BLOCK == vocabulary.BLOCK
    for call in (native.exponential_sums, native.places_reaching):
        with pytest.raises(InputError, match="2 dimensions"):
            call(np.zeros((2, 3), np.float32), 0.0)
        with pytest.raises(TypeError):
            call(np.zeros(3, np.float64), 0.0)
    sums, slope = native.exponential_sums(np.zeros(0, np.float32), 0.0)
    assert len(sums) == slope == 0
    assert np.isnan(native.exponential_sums(np.array([0, np.nan], np.float32), 0.0)[0][0])


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("size", [1, 15, 16, 17, 2047, 2048, 2063, 30_001])
def test_places_reaching_a_bound_are_those_of_a_comparison(size, native, monkeypatch):
    if native:
        pytest.importorskip("edgeformer._native")
    monkeypatch.setattr(vocabulary, "LONG", 0 if native else 10**9)
    scores = np.round(_logits(size, size))  # many are equal to a bound
    scores[::5], scores[1::7] = -np.inf, np.nan
    for bound in (-np.inf, -3.0, 0.0, np.float32(4.0), 1e9, np.inf, np.nan):
        found = vocabulary.places_reaching(scores, bound)
        assert found.dtype == np.intp and np.array_equal(found, np.flatnonzero(scores >= bound))
    backwards = scores[::-1]  # no view that the extension takes
    assert np.array_equal(vocabulary.places_reaching(backwards, 0.0), np.flatnonzero(backwards >= 0))
